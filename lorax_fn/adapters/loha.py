"""LoHa: the elementwise product of two low-rank matrices (arXiv:2108.06098, arXiv:2309.14859).

    ΔW = s · (A₁·B₁) ∘ (A₂·B₂)

Its rank is at most r², and it factors: the columns of A are the elementwise products of one column
of A₁ and one of A₂, the rows of B those of B₁ and B₂. So no matrix of the weight's size is formed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lorax_fn.adapters.base import Rule, static
from lorax_fn.adapters.low_rank import (
    SummedAdapter,
    alpha_over_rank,
    check_alpha,
    check_dtype,
    check_fits,
    check_largest_rank,
    check_rank,
    resolve_axes,
    split_shape,
)
from lorax_fn.axes import Axes
from lorax_fn.interpreter import RANK, Factor, Term, wide_dtype
from lorax_fn.targets import Targets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoHaFactors(SummedAdapter):
    """The two pairs of factors of one weight.

    Attributes:
        a1, a2: (batch dims…, contract dims…, r).
        b1, b2: (batch dims…, r, out dims…).
        scale: alpha/rank.
        axes: the roles of the weight's dims.
    """

    kind: ClassVar[str] = "LoHa"

    a1: Any
    b1: Any
    a2: Any
    b2: Any
    scale: float = static()
    axes: Axes = static()

    @property
    def rank(self) -> int:
        """r, of each of the two."""
        return self.a1.shape[-1]

    def check(self, path: str, leaf: Any) -> None:
        """Raises `StructureError` unless every array has the shape that the leaf's demands."""
        batch, contract, out = split_shape(leaf.shape, self.axes)
        a, b = (*batch, *contract, self.rank), (*batch, self.rank, *out)
        parts = {"a1": (self.a1, a), "b1": (self.b1, b), "a2": (self.a2, a), "b2": (self.b2, b)}
        check_fits(path, leaf, self.axes, parts)

    def dims(self) -> LoHaFactors:
        """As LoRA's, of both pairs."""
        a = (*self.axes.batch, *self.axes.contract, None)
        b = (*self.axes.batch, None, *self.axes.out)
        return dataclasses.replace(self, a1=a, b1=b, a2=a, b2=b)

    def unscaled(self) -> LoHaFactors:
        """With s·B₁ for B₁."""
        return dataclasses.replace(self, b1=self.scale * self.b1, scale=1.0)

    def trainable(self) -> LoHaFactors:
        """All four factors are trained."""
        return dataclasses.replace(self, a1=True, b1=True, a2=True, b2=True)

    def terms(self, shape: Sequence[int], key: jax.Array | None) -> tuple[Term, ...]:
        """One term of rank r²."""
        axes = self.axes
        at = len(axes.batch)
        a1, b1, a2, b2 = (
            x.astype(wide_dtype(x.dtype)) for x in (self.a1, self.b1, self.a2, self.b2)
        )
        a = _products(a1, a2, a1.ndim - 1)
        b = _products(b1, b2, at)
        term = Term(
            Factor(a, (*axes.batch, *axes.contract, RANK)),
            Factor(b, (*axes.batch, RANK, *axes.out)),
            None,
            self.scale,
            0.0,
        )
        return (term,)


def _products(first: jax.Array, second: jax.Array, axis: int) -> jax.Array:
    """All products of a slice of `first` and one of `second` along axis: r slices make r²."""
    product = jnp.expand_dims(first, axis + 1) * jnp.expand_dims(second, axis)  # (…, r, r, …)
    shape = (*first.shape[:axis], first.shape[axis] ** 2, *first.shape[axis + 1 :])
    return product.reshape(shape)


@dataclasses.dataclass(frozen=True)
class LoHa(Rule):
    """Rule: the elementwise product of two low-rank changes, of rank up to r².

    Hyeon-Woo et al. 2021, arXiv:2108.06098; Yeh et al. 2023, arXiv:2309.14859 (LyCORIS). Trains
    twice what `LoRA` of the same rank trains, and computes what LoRA of rank r² computes.

    Args:
        targets: which leaves, in any form that `LoRA` takes.
        rank: r, of each of the two matrices.
        alpha: the update is scaled by alpha/rank. None means alpha = rank.
        dtype: the factors' dtype.
        exclude: leaves to leave out.
        axes: the roles of the dims of every targeted weight, in place of what `init` is given.

    Raises:
        LoraError: if rank, alpha or dtype are out of their range.

    >>> import jax, jax.numpy as jnp, lorax_fn as lora
    >>> rules = [lora.LoHa("w", rank=2, alpha=4)]
    >>> factors = lora.init(jax.random.key(0), {"w": jnp.ones((9, 5))}, rules)
    >>> factors["w"].a1.shape, factors["w"].b2.shape
    ((9, 2), (2, 5))
    """

    targets: Targets
    _: dataclasses.KW_ONLY
    rank: int = 8
    alpha: float | None = None
    dtype: DTypeLike = jnp.float32
    exclude: Targets | None = None
    axes: Axes | None = None

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_alpha(self.alpha)
        check_dtype(self.dtype)

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return alpha_over_rank(self.alpha, self.rank)

    def make(self, key: jax.Array, path: str, leaf: Any, axes: Axes | None) -> LoHaFactors:
        """Normal factors, B₁ of deviation 0.1; B₂ zero."""
        axes = resolve_axes("LoHa", path, leaf, self.axes or axes)
        check_largest_rank(path, leaf, axes, self.rank)
        batch, contract, out = split_shape(leaf.shape, axes)
        a, b = (*batch, *contract, self.rank), (*batch, self.rank, *out)
        keys = jax.random.split(key, 3)
        return LoHaFactors(
            a1=jax.random.normal(keys[0], a, self.dtype),
            b1=jax.random.normal(keys[1], b, self.dtype) / 10,
            a2=jax.random.normal(keys[2], a, self.dtype),
            b2=jnp.zeros(b, self.dtype),
            scale=self.scale,
            axes=axes,
        )
