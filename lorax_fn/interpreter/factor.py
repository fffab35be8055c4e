"""Labelled arrays: low-rank factors whose axes know which dim of the weight they span.

A factor of a weight W carries, for each of its axes, the number of the dim of W that the axis
spans, or `RANK`:

    A (d, r)       of W (d, k)      has dims (0, RANK)
    B (r, h, k)    of W (d, h, k)   has dims (RANK, 1, 2)
    A (L, d, r)    of W (L, d, k)   has dims (0, 1, RANK)

Transposing the weight only renames labels; every other linear shape operation acts on the axes
that its dims name, and leaves a factor alone that does not span them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from jax import lax
from jax.typing import DTypeLike

from lorax_fn.interpreter.explicit import placed_like
from lorax_fn.interpreter.thin_dot import thin_dot

Label = Any
"""A dim of the weight (an int), or whatever names a dim of the data it meets."""

RANK = -1
"""The label of the axis that A and B share and that their product sums over."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factor:
    """An array whose axis i spans dim `dims[i]` of the weight (or is the rank axis)."""

    array: Any
    dims: tuple[Label, ...] = dataclasses.field(metadata={"static": True})

    @property
    def spanned(self) -> frozenset[Label]:
        """The weight's dims that the factor spans."""
        return frozenset(self.dims) - {RANK}

    def axes(self, dims: Sequence[Label]) -> tuple[int, ...]:
        """The axes that span `dims`."""
        return tuple(self.dims.index(d) for d in dims)

    def length(self, dim: Label) -> int:
        """The length of the axis that spans `dim`."""
        return self.array.shape[self.dims.index(dim)]

    def size(self, dims: Collection[Label]) -> int:
        """The product of the lengths of those of `dims` that the factor spans."""
        product = 1
        for dim, length in zip(self.dims, self.array.shape, strict=True):
            product *= length if dim in dims else 1
        return product

    def with_array(self, array: Any) -> Factor:
        """The same labels on another array."""
        return Factor(array, self.dims)

    def astype(self, dtype: DTypeLike) -> Factor:
        """The same factor in another dtype."""
        return self.with_array(self.array.astype(dtype))

    def relabel(self, rename: Callable[[int], Label]) -> Factor:
        """The same array, for a weight whose dim d is now called `rename(d)`."""
        return Factor(self.array, tuple(d if d == RANK else rename(d) for d in self.dims))

    def relabel_rank(self, label: Label) -> Factor:
        """The same array, its rank axis called `label`, to tell it from another one."""
        return Factor(self.array, tuple(label if d == RANK else d for d in self.dims))

    def transpose(self, dims: Sequence[Label]) -> Factor:
        """The same factor, its axes in the order of `dims`."""
        if tuple(dims) == self.dims:
            return self
        return Factor(lax.transpose(self.array, self.axes(dims)), tuple(dims))

    def lead_with(self, dim: Label) -> Factor:
        """The same factor, the axis that spans `dim` moved to the front."""
        return self.transpose((dim, *(d for d in self.dims if d != dim)))

    def squeeze(self, dims: Collection[Label]) -> Factor:
        """Drops those of `dims` that the factor spans; their length must be one."""
        axes = [axis for axis, d in enumerate(self.dims) if d in dims]
        if not axes:
            return self
        return Factor(lax.squeeze(self.array, axes), tuple(d for d in self.dims if d not in dims))

    def widen(self, dims: Sequence[Label], lengths: Sequence[int]) -> Factor:
        """Spans the new `dims` too, by broadcasting along them."""
        if not dims:
            return self
        shape = (*lengths, *self.array.shape)
        axes = tuple(range(len(dims), len(shape)))
        return Factor(lax.broadcast_in_dim(self.array, shape, axes), (*dims, *self.dims))

    def times(self, other: Factor, op: Callable[[Any, Any], Any] = lax.mul) -> Factor:
        """Multiplies (or divides, by `op`) by a factor whose dims are all among these."""
        dims = [d for d in self.dims if d in other.dims]
        values = other.transpose(dims).array.astype(self.array.dtype)
        aligned = lax.broadcast_in_dim(values, self.array.shape, self.axes(dims))
        return self.with_array(op(self.array, placed_like(aligned, self.array)))

    def per_axis(self, values: Sequence[Any], rank: Callable[[int], Any]) -> list[Any]:
        """Picks from per-dim `values` those of the factor's axes; `rank(r)` gives the rank's."""
        return [
            rank(length) if d == RANK else values[d]
            for d, length in zip(self.dims, self.array.shape, strict=True)
        ]


def is_smaller(a: Any, b: Any) -> bool:
    """Whether a has fewer elements than b; not, where a size is symbolic (`jax.export`)."""
    return isinstance(a.size, int) and isinstance(b.size, int) and a.size < b.size


def labelled_dot(
    lhs: Factor,
    rhs: Factor,
    keep: Sequence[Label],
    *,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Factor:
    """Multiplies two labelled arrays and sums over the shared labels that are not in `keep`.

    Labels that only one side has are kept. The result's axes are ordered as `lax.dot_general`
    orders them: shared kept labels (as `keep` orders them), the rest of lhs, the rest of rhs.
    """
    shared = [d for d in lhs.dims if d in rhs.dims]
    batch = [d for d in dict.fromkeys(keep) if d in shared]
    summed = [d for d in shared if d not in batch]
    numbers = (
        (lhs.axes(summed), rhs.axes(summed)),
        (lhs.axes(batch), rhs.axes(batch)),
    )
    array = thin_dot(
        lhs.array,
        rhs.array,
        numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    free = [d for side in (lhs, rhs) for d in side.dims if d not in shared]
    return Factor(array, (*batch, *free))
