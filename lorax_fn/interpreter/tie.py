"""Codes that cannot be dequantised before the data is there that they are to meet.

To XLA a dequantised weight is a function of the params alone. It would compute that of the forward
pass and that of the backward pass once, and keep it in between; a scheduler that likes to start
early would even compute those of all layers first. An optimisation barrier that holds the codes
back until the data is there prevents both, on GPU and TPU. XLA:CPU drops barriers before it looks
for common subexpressions: there a zero is added that only the data's bits can tell.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from lorax_fn.interpreter import compat
from lorax_fn.interpreter.explicit import explicit_spec, laid_out_by_compiler


def tied(codes: Any, data: Any) -> Any:
    """Returns the codes, which XLA now takes to depend on the data."""
    return tied_p.bind(*compat.unify_varying_axes(codes, lax.stop_gradient(data)))


def _held_back(codes: Any, data: Any) -> Any:
    return lax.optimization_barrier((codes, data))[0]


def _with_zero(codes: Any, data: Any) -> Any:
    if explicit_spec(codes) is None:
        return _added_zero(codes, data)
    return laid_out_by_compiler(_added_zero, jax.typeof(codes).sharding, codes, data)


def _added_zero(codes: Any, data: Any) -> Any:
    """The codes plus a zero: a word of at most 64 bits has fewer than 128 of them set."""
    if data.size == 0:
        return codes
    first = lax.slice(data, [0] * data.ndim, [1] * data.ndim).reshape(())
    if jnp.issubdtype(first.dtype, jnp.complexfloating):
        first = lax.real(first)
    if first.dtype.itemsize == 1:  # bool and what is narrower than a byte among them
        first = lax.convert_element_type(first, jnp.float32)
    word = lax.bitcast_convert_type(first, f"uint{8 * first.dtype.itemsize}")
    zero = lax.shift_right_logical(lax.population_count(word), jnp.array(7, word.dtype))
    if not jnp.issubdtype(codes.dtype, jnp.floating):
        return codes + zero.astype(codes.dtype)
    bits = lax.bitcast_convert_type(codes, jnp.uint8)
    return lax.bitcast_convert_type(bits + zero.astype(jnp.uint8), codes.dtype)


def _batch(operands: Any, dims: Any) -> tuple[Any, Any]:
    """All entries of a batch meet the same codes: one is enough to wait for."""
    (codes, data), (codes_dim, data_dim) = operands, dims
    if data_dim is not None:
        data = lax.index_in_dim(data, 0, data_dim, keepdims=False)
    return tied_p.bind(codes, data), codes_dim


tied_p = Primitive("tied")
tied_p.def_impl(lambda codes, _: codes)
tied_p.def_abstract_eval(lambda codes, _: codes)
mlir.register_lowering(tied_p, mlir.lower_fun(_held_back, multiple_results=False))
mlir.register_lowering(tied_p, mlir.lower_fun(_with_zero, multiple_results=False), platform="cpu")
batching.primitive_batchers[tied_p] = _batch
