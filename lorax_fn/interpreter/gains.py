"""Multipliers along some dims of a weight, applied to what meets it or to what comes of that.

The gradient of a product with gains, y = (x·W) ∘ g, is where they cost: as JAX derives it, ȳ ∘ g is
formed, as large as y, and g is kept for it broadcast to that size. Here W ∘ g is formed instead
wherever that is smaller, in the backward pass alone, and g is kept as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from lorax_fn.interpreter.factor import Factor, Label, is_smaller
from lorax_fn.interpreter.frozen_dot import frozen_dot
from lorax_fn.interpreter.quantized import Lazy, consumed, product_with
from lorax_fn.interpreter.weight import Term, wide_dtype


def can_gain(
    x: Any, labels: Sequence[Label], gains: Sequence[Factor], summed: Sequence[int]
) -> bool:
    """Whether each gain can be applied to x, or to the result because none of it is summed over."""
    for gain in gains:
        on_x = set(gain.dims) <= set(labels)
        if on_x and (is_narrow(x.dtype) or not jnp.issubdtype(x.dtype, jnp.floating)):
            return False  # x times the gain would be rounded to what x can hold
        if not on_x and gain.spanned & set(summed):
            return False
    return True


def is_narrow(dtype: Any) -> bool:
    """Whether this is a float of eight bits or fewer, which are for storage."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 8


def apply_gains(x: Factor, gains: Sequence[Factor]) -> tuple[Factor, tuple[Factor, ...]]:
    """Multiplies x by the gains that it spans, in float32 or wider: (x, the other gains)."""
    now = [gain for gain in gains if set(gain.dims) <= set(x.dims)]
    later = tuple(gain for gain in gains if not set(gain.dims) <= set(x.dims))
    return x.with_array(_multiplied(x.array, x.dims, now)) if now else x, later


def _multiplied(array: Any, labels: Sequence[Label], gains: Sequence[Factor]) -> jax.Array:
    scaled = Factor(array.astype(wide_dtype(array.dtype)), tuple(labels))
    for gain in gains:
        scaled = scaled.times(gain)
    return scaled.array.astype(array.dtype)


def gained_product(
    eqn: Any, operands: Sequence[Any], at: int, labels: Sequence[Label], gains: tuple[Factor, ...]
) -> jax.Array:
    """A contraction of operand `at` with the base of a weight, its result multiplied by gains.

    Args:
        eqn: the contraction.
        operands: its operands; the first one beside x is the base, lazy or not.
        at: which of them is x.
        labels: the result's labels; a dim of the weight is its number.
        gains: span some of them; there may be none.
    """
    if not gains:
        return consumed(eqn, operands, at)
    contract, constants = product_with(eqn, operands, at)
    weight = operands[1 if at == 0 else 0]
    of_weight = all({*gain.dims} <= {*range(weight.ndim)} for gain in gains)
    into_weight = (
        of_weight
        and is_smaller(weight, eqn.outvars[0].aval)
        and _holds(weight.dtype, operands[at].dtype)
    )
    product = _GainedProduct(
        contract, tuple(labels), isinstance(weight, Lazy), weight.ndim, into_weight
    )
    return product(operands[at], constants, gains)


@dataclasses.dataclass(frozen=True, eq=False)
class _GainedProduct:
    """The function of x, the constants of `contract` (`product_with`'s) and the gains."""

    contract: Callable[..., Any]
    labels: tuple[Label, ...]
    is_lazy: bool
    weight_ndim: int
    into_weight: bool  # where the gains go in the backward pass: into the weight or the cotangent

    def __call__(self, *operands: Any) -> jax.Array:
        product = jax.custom_jvp(self._plain)
        product.defjvp(self._jvp, symbolic_zeros=True)
        return product(*operands)

    def _plain(self, x: Any, constants: Any, gains: Any) -> Any:
        if self.is_lazy:
            return self._gained(frozen_dot(self.contract, x, constants), gains)
        return self._gained(self.contract(x, x, *constants), gains)

    def _gained(self, result: Any, gains: Any) -> Any:
        return _multiplied(result, self.labels, gains)

    def _jvp(self, primals: Any, tangents: Any) -> tuple[Any, Any]:
        x, constants, gains = primals
        x_dot, constants_dot, gains_dot = tangents
        if not all(map(_is_zero, jax.tree.leaves(constants_dot))):  # the weight depends on data
            tangents = jax.tree.map(_instantiated, primals, tangents)
            return jax.jvp(self._plain, primals, tangents)
        result = self.contract(x, x, *constants)
        # Of each operand that has a tangent alone: 0 · result would be NaN where that is infinite.
        changes = []
        for at, gain_dot in enumerate(gains_dot):
            if not _is_zero(gain_dot.array):
                linear = functools.partial(self._linear_in_gain, [g.dims for g in gains], at)
                others = [gain.array for i, gain in enumerate(gains) if i != at]
                changes.append(frozen_dot(linear, gain_dot.array, [result, *others]))
        if not _is_zero(x_dot):
            leaves, treedef = jax.tree.flatten((constants, gains))
            linear = functools.partial(self._linear_in_x, treedef)
            changes.append(frozen_dot(linear, x_dot, leaves))
        gained = self._gained(result, gains)
        if not changes:
            return gained, jnp.zeros_like(gained)
        return gained, functools.reduce(operator.add, changes)

    def _linear_in_gain(
        self,
        dims: Sequence[tuple[Label, ...]],
        at: int,
        _: Any,
        gain: Any,
        result: Any,
        *others: Any,
    ) -> Any:
        arrays = [*others[:at], gain, *others[at:]]
        return self._gained(result, [Factor(a, d) for a, d in zip(arrays, dims, strict=True)])

    def _linear_in_x(self, treedef: Any, ready: Any, x: Any, *leaves: Any) -> Any:
        constants, gains = jax.tree.unflatten(treedef, leaves)
        if not self.into_weight:
            return self._gained(self.contract(ready, x, *constants), gains)
        dims = range(self.weight_ndim)
        scale = functools.partial(_multiplied, labels=dims, gains=gains)
        return self.contract(ready, x, *constants, scale=scale)


def gained_share(share: jax.Array, labels: Sequence[Label], gains: Sequence[Factor]) -> jax.Array:
    """A term's share of the result, multiplied by gains."""
    return _multiplied(share, labels, gains) if gains else share


def fold(
    terms: Sequence[Any], gains: tuple[Factor, ...]
) -> tuple[tuple[Any, ...], tuple[Factor, ...]]:
    """Multiplies gains into low-rank terms: (the terms, the gains that their shares still need).

    A term's own gains stay as they are.
    """
    of_weight = all(isinstance(dim, int) for gain in gains for dim in gain.dims)
    if not of_weight or not all(isinstance(term, Term) for term in terms):
        return tuple(terms), gains
    folded = [dataclasses.replace(term, gains=gains).folded() for term in terms]
    kept = [dataclasses.replace(f, gains=t.gains) for f, t in zip(folded, terms, strict=True)]
    return tuple(kept), ()


def _holds(dtype: Any, data: Any) -> bool:
    """Whether a product with gains of that dtype keeps what the data's would."""
    with jax.numpy_dtype_promotion("standard"):
        return not is_narrow(dtype) and (is_narrow(data) or jnp.promote_types(dtype, data) == dtype)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero) or tangent.dtype == jax.dtypes.float0


def _instantiated(primal: Any, tangent: Any) -> Any:
    if not isinstance(tangent, SymbolicZero):
        return tangent
    if jnp.issubdtype(primal.dtype, jnp.inexact):
        return jnp.zeros_like(primal)
    return np.zeros(primal.shape, jax.dtypes.float0)
