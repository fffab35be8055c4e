"""`gather` from a symbolic weight: embedding lookup, and picking layers or experts from a stack.

Each factor is gathered along those indexed dims that it spans. If only one factor spans them, as A
(vocab, r) of an embedding does, the result is an activation: base rows + s · (A's rows)·B. If both
do, as for a layer of a stack, the result is a smaller symbolic weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core.primitives as primitives
import jax.numpy as jnp
from jax import lax

from lorax_fn.interpreter import compat
from lorax_fn.interpreter.factor import RANK, Factor
from lorax_fn.interpreter.pending import PendingLookup
from lorax_fn.interpreter.quantized import carried
from lorax_fn.interpreter.rule import RULES, Context
from lorax_fn.interpreter.weight import Term, Weight


def _gather(ctx: Context, eqn: Any, weight: Any, indices: Any) -> Any:
    if not isinstance(weight, Weight) or isinstance(indices, Weight):
        return NotImplemented
    base = carried(eqn, [weight.base, indices])
    lookup = _Lookup.of(eqn, weight.shape, base.ndim)
    spanning = [_spanning(t.folded(), lookup.checked, weight.shape) for t in weight.terms]
    terms = [term for term in spanning if term is not None]
    if len(terms) < len(spanning) or any(map(lookup.would_scale_fill, weight.gains)):
        return NotImplemented
    gathered = Weight(
        base,
        tuple(t.map(lambda f: lookup(f, indices)) for t in terms),
        weight.paths,
        tuple(lookup(gain, indices, fill=1) for gain in weight.gains),
    )
    if not weight.terms and lookup.batch:  # a row for each of many indices

        def add_up() -> Any:
            ctx.factored(weight, eqn)
            return gathered.add_up()

        if weight.gains:
            return add_up()
        return PendingLookup(gathered, frozenset(lookup.batch), add_up)
    activations = [
        lookup.is_activation(before) or after.is_thin
        for before, after in zip(weight.terms, gathered.terms, strict=True)
    ]
    if lookup.batch and all(map(lookup.is_activation, weight.terms)):

        def add_up() -> Any:
            with compat.equation_context(eqn):  # whoever needs it may be under another mesh
                return finish(ctx, eqn, gathered, activations)

        return PendingLookup(gathered, frozenset(lookup.batch), add_up)
    return finish(ctx, eqn, gathered, activations)


def _spanning(term: Term, dims: frozenset[int], shape: Sequence[int]) -> Term | None:
    """The term with each of these dims spanned by A or B; None if that would make a factor longer.

    Where indices may be out of bounds, a factor has to know of them: the term is zero there.
    """
    loose = sorted(dims - term.a.spanned - term.b.spanned)
    if any(shape[d] != 1 for d in loose):
        return None
    return dataclasses.replace(term, a=term.a.widen(loose, [1] * len(loose)))


def finish(ctx: Context, eqn: Any, weight: Weight, finished: Sequence[bool]) -> Any:
    """Adds those terms up that have become activations: one factor is a row per index.

    Such a sum costs what the factored lookup costs, so it does not count as dense.
    """
    done = [t for t, flag in zip(weight.terms, finished, strict=True) if flag]
    if not done:
        return weight
    ctx.factored(weight, eqn)
    base = dataclasses.replace(weight, terms=tuple(done), gains=()).add_up()
    rest = tuple(t for t, flag in zip(weight.terms, finished, strict=True) if not flag)
    weight = dataclasses.replace(weight, base=base, terms=rest)
    return weight if rest else weight.add_up()


def finish_thin(ctx: Context, eqn: Any, weight: Weight) -> Any:
    """A cut that leaves one factor a mere vector over the rank is a lookup too."""
    return finish(ctx, eqn, weight, [term.is_thin for term in weight.terms])


@dataclasses.dataclass(frozen=True)
class _Lookup:
    """A `gather` as it acts on one factor; dims are those of the weight, out dims the result's."""

    params: dict[str, Any]
    window: dict[int, int]  # dims that survive → the result's dim that each becomes
    paired: dict[int, int]  # dims that are batch dims of the indices too → the result's dim
    batch: tuple[int, ...]  # the result's dims that come from the indices
    indexed: frozenset[int]  # dims along which the indices choose

    @property
    def checked(self) -> frozenset[int]:
        """The indexed dims along which an index may be out of bounds, and means nothing then."""
        fills = self.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
        return self.indexed if fills else frozenset()

    def would_scale_fill(self, gain: Factor) -> bool:
        """Whether a gain that knows of no index would change what is filled in out of bounds."""
        value = self.params["fill_value"]
        has_value = value is not None and value != 0 and not math.isnan(value)
        return bool(self.checked) and has_value and not self.indexed & gain.spanned

    @classmethod
    def of(cls, eqn: Any, shape: Sequence[int], out_ndim: int) -> _Lookup:
        numbers = eqn.params["dimension_numbers"]
        gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        kept = [d for d in range(len(shape)) if d not in gone]
        window = dict(zip(kept, numbers.offset_dims, strict=True))
        batch = tuple(d for d in range(out_ndim) if d not in numbers.offset_dims)
        indexed = frozenset(numbers.start_index_map)
        paired = {
            d: batch[axis]
            for d, axis in zip(
                numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
            )
        }
        if eqn.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
            # A slice of full length starts at zero, whatever its index: it is clamped.
            sizes = eqn.params["slice_sizes"]
            indexed -= {d for d in numbers.start_index_map if sizes[d] == shape[d] != 1}
        return cls(eqn.params, window, paired, batch, indexed)

    def is_activation(self, term: Term) -> bool:
        """Whether A's dims are looked up and B's are not, as in an embedding."""
        return bool(self.indexed & term.a.spanned) and not self.indexed & term.b.spanned

    def __call__(self, factor: Factor, indices: jax.Array, fill: int = 0) -> Factor:
        if self.indexed & factor.spanned:
            return self._gathered(factor, indices, fill)
        return self._windowed(factor)

    def _gathered(self, factor: Factor, indices: jax.Array, fill: int) -> Factor:
        numbers = self.params["dimension_numbers"]
        columns = [
            i
            for i, d in enumerate(numbers.start_index_map)
            if d in factor.dims and d in self.indexed
        ]
        pairs = sorted(
            (factor.dims.index(d), axis)
            for d, axis in zip(
                numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
            )
            if d in factor.dims
        )
        # Part of an index says neither that the indices are sorted nor that they are unique.
        n_pairs = len(numbers.operand_batching_dims)
        whole = (len(columns), len(pairs)) == (len(numbers.start_index_map), n_pairs)
        kept = [d for d in factor.dims if d == RANK or d in self.window]
        first = len(self.batch)
        array = lax.gather(
            factor.array,
            indices[..., jnp.array(columns, int)] if len(columns) < indices.shape[-1] else indices,
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(first, first + len(kept))),
                collapsed_slice_dims=factor.axes(
                    [d for d in factor.dims if d in numbers.collapsed_slice_dims]
                ),
                start_index_map=factor.axes([numbers.start_index_map[i] for i in columns]),
                operand_batching_dims=tuple(axis for axis, _ in pairs),
                start_indices_batching_dims=tuple(axis for _, axis in pairs),
            ),
            factor.per_axis(self.params["slice_sizes"], rank=lambda r: r),
            indices_are_sorted=whole and self.params["indices_are_sorted"],
            unique_indices=whole and self.params["unique_indices"],
            mode=self._mode(factor),
            fill_value=fill,  # 0 of a factor: out of bounds the base alone is the answer
        )  # (indices…, window…)
        return Factor(array, (*self.batch, *(d if d == RANK else self.window[d] for d in kept)))

    def _mode(self, factor: Factor) -> Any:
        if jax.dtypes.issubdtype(factor.array.dtype, jax.dtypes.prng_key):
            return lax.GatherScatterMode.CLIP  # keys have no fill value
        return self.params["mode"]

    def _windowed(self, factor: Factor) -> Factor:
        """A factor that no index touches: only the window's sizes cut it."""
        becomes = self.window | self.paired
        sizes = factor.per_axis(self.params["slice_sizes"], rank=lambda r: r)
        limits = [
            length if d in self.paired else size
            for d, length, size in zip(factor.dims, factor.array.shape, sizes, strict=True)
        ]
        array = lax.slice(factor.array, [0] * len(limits), limits)
        gone = [d for d in factor.dims if d != RANK and d not in becomes]
        return Factor(array, factor.dims).squeeze(gone).relabel(becomes.__getitem__)


RULES[primitives.gather_p] = _gather
