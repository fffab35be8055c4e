"""What is one leaf of params: an array, or a quantised array with all its parts.

A `qwix.QArray` is a pytree of codes and scales. As a leaf of params it is one, with the path, shape
and dtype of the floating weight that it stands for.
"""

from __future__ import annotations

from typing import Any

import jax

from lorax_fn.errors import LoraError
from lorax_fn.interpreter import Quantized

Pytree = Any

INSTALL = "pip install 'lorax-fn[quant]'"


def is_quantized(node: Any) -> bool:
    """Whether a node of params is a `qwix.QArray`; made to be an `is_leaf`. Imports no qwix."""
    return any(
        (cls.__module__.partition(".")[0], cls.__name__) == ("qwix", "QArray")
        for cls in type(node).__mro__
    )


def flatten(params: Pytree) -> tuple[list[Any], Any]:
    """`jax.tree.flatten`, quantised leaves whole."""
    return jax.tree.flatten(params, is_leaf=is_quantized)


def structure(params: Pytree) -> Any:
    """`jax.tree.structure`, quantised leaves whole."""
    return jax.tree.structure(params, is_leaf=is_quantized)


def type_name(qtype: Any) -> str:
    """The name of what a quantised leaf is stored as: "nf4", "int8", …."""
    return qtype if isinstance(qtype, str) else jax.numpy.dtype(qtype).name


def as_array(leaf: Any) -> Any:
    """What computes as the floating weight does in place of a leaf; of shapes alone, its shape."""
    if not is_quantized(leaf):
        return leaf
    if isinstance(leaf.qvalue, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return Quantized(leaf)


def as_shape(leaf: Any) -> Any:
    """The shape and dtype of the floating weight in place of a quantised leaf."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_quantized(leaf) else leaf


def check_installed(path: str) -> None:
    """Raises `LoraError` unless qwix can be imported, which the leaf at `path` needs."""
    try:
        import qwix  # noqa: F401
    except ImportError as e:
        raise LoraError(
            f"{path!r} is to be quantised, or is already, and qwix is not installed; wanted the "
            f"extra: {INSTALL}."
        ) from e
