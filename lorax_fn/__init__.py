"""LoRA for any JAX function: frozen params, trainable low-rank factors, pure functions."""

from importlib.metadata import version as _version

from lorax_fn.adapters import Frozen, Full, LoRA
from lorax_fn.axes import Axes, infer_axes
from lorax_fn.errors import (
    AdapterFileError,
    AxesError,
    DenseWarning,
    LoraError,
    StructureError,
    TargetError,
)
from lorax_fn.init import init
from lorax_fn.optim import freeze, trainable_mask
from lorax_fn.report import Report, inspect
from lorax_fn.transform import merge, unmerge, wrap

__version__ = _version("lorax-fn")

__all__ = [
    "AdapterFileError",
    "Axes",
    "AxesError",
    "DenseWarning",
    "Frozen",
    "Full",
    "LoRA",
    "LoraError",
    "Report",
    "StructureError",
    "TargetError",
    "freeze",
    "infer_axes",
    "init",
    "inspect",
    "merge",
    "trainable_mask",
    "unmerge",
    "wrap",
]
