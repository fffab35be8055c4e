"""LoRA for any JAX function: frozen params, trainable low-rank factors, pure functions."""

from importlib.metadata import version as _version

from lorax_fn.adapters import (
    IA3,
    AdaLoRA,
    DoRA,
    Frozen,
    Full,
    LoHa,
    LoKr,
    LoRA,
    RankBudget,
    TrainableTokens,
    VeRA,
    orthogonality,
)
from lorax_fn.arithmetic import combine, resize, scale, subtract
from lorax_fn.axes import Axes, infer_axes
from lorax_fn.batched import wrap_batched
from lorax_fn.checkpoint import restore_checkpoint, save_checkpoint
from lorax_fn.compare import Comparison, compare
from lorax_fn.errors import (
    AdapterFileError,
    AxesError,
    DenseWarning,
    LoraError,
    StructureError,
    TargetError,
)
from lorax_fn.init import init
from lorax_fn.io import load, load_peft, save, save_peft
from lorax_fn.loftq import loftq
from lorax_fn.optim import freeze, lora_plus, param_labels, precondition, trainable_mask
from lorax_fn.quantize import quantization_error, quantize
from lorax_fn.report import Report, inspect
from lorax_fn.serving import stack, take
from lorax_fn.sharding import shardings
from lorax_fn.transform import merge, unmerge, wrap

__version__ = _version("lorax-fn")

__all__ = [
    "IA3",
    "AdaLoRA",
    "AdapterFileError",
    "Axes",
    "AxesError",
    "Comparison",
    "DenseWarning",
    "DoRA",
    "Frozen",
    "Full",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoraError",
    "RankBudget",
    "Report",
    "StructureError",
    "TargetError",
    "TrainableTokens",
    "VeRA",
    "combine",
    "compare",
    "freeze",
    "infer_axes",
    "init",
    "inspect",
    "load",
    "load_peft",
    "loftq",
    "lora_plus",
    "merge",
    "orthogonality",
    "param_labels",
    "precondition",
    "quantization_error",
    "quantize",
    "resize",
    "restore_checkpoint",
    "save",
    "save_checkpoint",
    "save_peft",
    "scale",
    "shardings",
    "stack",
    "subtract",
    "take",
    "trainable_mask",
    "unmerge",
    "wrap",
    "wrap_batched",
]


def __dir__() -> list[str]:
    return [*__all__, "adapters", "io"]
