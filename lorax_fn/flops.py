"""Floating-point operations of a jaxpr, counted from its contractions.

Counts two operations for each multiply-add of matmuls, convolutions and ragged matmuls, loop bodies
as often as they run (a `while` body once: its trip count is unknown). Elementwise work is left out,
so the figure is a model's arithmetic as papers count it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax.extend.core.primitives as primitives

from lorax_fn.interpreter import compat
from lorax_fn.interpreter.thin_dot import thin_dot_p


def count_flops(jaxpr: Any) -> int:
    """Returns the floating-point operations of a jaxpr's contractions.

    >>> import jax, jax.numpy as jnp
    >>> count_flops(jax.make_jaxpr(jnp.dot)(jnp.ones((4, 5)), jnp.ones((5, 6))))
    240
    """
    jaxpr, _ = compat.open_jaxpr(jaxpr)
    return sum(_of_equation(eqn) for eqn in jaxpr.eqns)


def _of_equation(eqn: Any) -> int:
    if eqn.primitive in _CONTRACTIONS:
        return _CONTRACTIONS[eqn.primitive](eqn)
    inner = [count_flops(jaxpr) for jaxpr in _inner_jaxprs(eqn.params)]
    if eqn.primitive is primitives.cond_p:
        return max(inner)
    return (
        eqn.params.get("length", 1) * sum(inner)
        if eqn.primitive is primitives.scan_p
        else sum(inner)
    )


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns") or hasattr(getattr(item, "jaxpr", None), "eqns"):
                yield item


def _dot_general(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2 * _size(eqn.outvars[0]) * _lengths(eqn.invars[0], contracted)


def _ragged_dot_general(eqn: Any) -> int:
    numbers = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    (contracted, _), _ = numbers
    return 2 * _size(eqn.outvars[0]) * _lengths(eqn.invars[0], contracted)


def _conv(eqn: Any) -> int:
    _, *summed = eqn.params["dimension_numbers"].rhs_spec
    return 2 * _size(eqn.outvars[0]) * _lengths(eqn.invars[1], summed)


def _size(var: Any) -> int:
    return math.prod(var.aval.shape)


def _lengths(var: Any, dims: Any) -> int:
    return math.prod(var.aval.shape[d] for d in dims)


_CONTRACTIONS: dict[Any, Callable[[Any], int]] = {
    primitives.dot_general_p: _dot_general,
    thin_dot_p: _dot_general,
    compat.ragged_dot_general_p: _ragged_dot_general,
    primitives.conv_general_dilated_p: _conv,
}
