"""A Kronecker summand of a symbolic weight: s · L ⊗ R, never multiplied out where data meets it.

Along each dim of length l·r that is not a batch dim, entry i·r + j of L ⊗ R is entry i of L times
entry j of R. So x · (L ⊗ R) is x with that dim split in two, contracted with L and with R. Rules
that do not know of such terms have the weight added up: they find neither A nor B here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from jax import lax

from lorax_fn.interpreter.factor import Factor, Label, labelled_dot


class NotFactoredError(Exception):
    """A rule asked of a term what it cannot give; the weight has to be added up."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KroneckerTerm:
    """One summand s · L ⊗ R; both factors span every dim of the weight, batch dims in full."""

    left: Factor
    right: Factor
    scale: float = dataclasses.field(metadata={"static": True})

    is_thin = False

    @property
    def a(self) -> NoReturn:
        """There is no low-rank factor."""
        raise NotFactoredError

    b = keys = a

    def map(self, fn: Callable[[Factor], Factor]) -> NoReturn:
        """An operation on a dim of L ⊗ R is none on a dim of L and of R."""
        raise NotFactoredError

    def folded(self) -> NoReturn:
        """There is no low-rank form."""
        raise NotFactoredError

    def relabel(self, rename: Callable[[int], Label]) -> KroneckerTerm:
        """The same arrays, for a weight whose dim d is now called `rename(d)`."""
        left, right = self.left.relabel(rename), self.right.relabel(rename)
        return KroneckerTerm(left, right, self.scale)

    def batch(self, shape: Sequence[int]) -> frozenset[int]:
        """The dims that both factors span in full."""
        return frozenset(d for d in range(len(shape)) if self.left.length(d) == shape[d] ==
                         self.right.length(d))  # fmt: skip

    def add_up(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """s · L ⊗ R of the weight's shape."""
        split = set(range(len(shape))) - self.batch(shape)
        left, right = (f.astype(dtype) for f in (self.left, self.right))
        left, right = part(left, split, "left"), part(right, split, "right")
        pairs = parted(range(len(shape)), split)
        product = labelled_dot(left, right, pairs, precision=lax.Precision.HIGHEST).transpose(pairs)
        return product.array.reshape(shape) * self.scale

    def share(
        self,
        x: Factor,
        shape: Sequence[int],
        summed: frozenset[int],
        out: Sequence[Label],
        dot: Callable[..., Factor],
    ) -> jax.Array:
        """s · x · (L ⊗ R), its dims those of `out`, the split ones not yet joined."""
        split = set(range(len(shape))) - self.batch(shape)
        left = part(self.left.astype(x.array.dtype), split, "left")
        right = part(self.right.astype(x.array.dtype), split, "right")
        x = split_dims(x, split, self.left, self.right)
        first, second = (left, right) if _left_first(left, right, summed) else (right, left)
        wanted = parted(out, split)
        second = second.with_array(second.array * self.scale)
        thin = dot(x, first, (*wanted, *second.dims)).astype(x.array.dtype)
        return dot(thin, second, wanted).transpose(wanted).array


def part(factor: Factor, split: set[int], side: str) -> Factor:
    """The factor with its part of each split dim named as such."""
    return factor.relabel(lambda d: (d, side) if d in split else d)


def parted(labels: Sequence[Label], split: set[int]) -> list[Label]:
    """The labels, each split dim replaced by its two parts."""
    pairs = [[(d, "left"), (d, "right")] if d in split else [d] for d in labels]
    return [label for pair in pairs for label in pair]


def split_dims(x: Factor, split: set[int], left: Factor, right: Factor) -> Factor:
    """x with each split dim that it spans reshaped into its two parts."""
    shape: list[int] = []
    for d, length in zip(x.dims, x.array.shape, strict=True):
        shape += [left.length(d), right.length(d)] if d in split else [length]
    return Factor(x.array.reshape(shape), tuple(parted(x.dims, split)))


def _left_first(left: Factor, right: Factor, summed: frozenset[int]) -> bool:
    """Whether to contract with L before R, by the number of multiplications for one row of x."""

    def sizes(factor: Factor) -> tuple[int, int]:
        """(of the summed dims, of the others); batch dims count alike in both and so not at all."""
        pairs = [(d, n) for d, n in zip(factor.dims, factor.array.shape, strict=True)
                 if isinstance(d, tuple)]  # fmt: skip
        inner = math.prod(n for (d, _), n in pairs if d in summed)
        return inner, math.prod(n for (d, _), n in pairs if d not in summed)

    (left_in, left_out), (right_in, right_out) = sizes(left), sizes(right)
    left_cost = left_in * right_in * left_out + right_in * left_out * right_out
    right_cost = left_in * right_in * right_out + left_in * right_out * left_out
    return left_cost <= right_cost
