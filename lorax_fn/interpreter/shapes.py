"""A symbolic weight's dims renamed, added, dropped, merged and split.

A transpose only relabels the factors. A reshape regroups dims: it is done on each factor, unless a
group of dims that it merges or splits belongs in part to A and in part to B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core.primitives as primitives

from lorax_fn.interpreter.factor import RANK, Factor
from lorax_fn.interpreter.lookup import finish_thin
from lorax_fn.interpreter.quantized import carried
from lorax_fn.interpreter.rule import RULES, Context
from lorax_fn.interpreter.weight import Weight


def _transpose(ctx: Context, eqn: Any, weight: Weight) -> Weight:
    base = carried(eqn, [weight.base])
    return weight.relabel(base, eqn.params["permutation"].index)


def _squeeze(ctx: Context, eqn: Any, weight: Weight) -> Any:
    gone = eqn.params["dimensions"]
    kept = [d for d in range(weight.ndim) if d not in gone]
    base = carried(eqn, [weight.base])
    return finish_thin(ctx, eqn, weight.map(base, lambda f: f.squeeze(gone).relabel(kept.index)))


def _broadcast_in_dim(ctx: Context, eqn: Any, weight: Weight, *dynamic_shape: Any) -> Weight:
    to = eqn.params["broadcast_dimensions"]
    base = carried(eqn, [weight.base, *dynamic_shape])
    stretched = [d for d in range(weight.ndim) if weight.shape[d] != base.shape[to[d]]]
    return weight.map(base, lambda f: f.squeeze(stretched).relabel(to.__getitem__))


def _reshape(ctx: Context, eqn: Any, weight: Weight, *dynamic_shape: Any) -> Any:
    order = eqn.params["dimensions"] or range(weight.ndim)  # transposed so before it is reshaped
    shape = [weight.shape[d] for d in order]
    groups = _dim_groups(shape, eqn.params["new_sizes"])
    ordered = weight.relabel(weight.base, list(order).index)
    factors, _ = jax.tree.flatten(
        (ordered.terms, ordered.gains), is_leaf=lambda node: isinstance(node, Factor)
    )
    if not all(_is_whole(f, old, shape) for f in factors for old, _ in groups):
        return NotImplemented
    base = carried(eqn, [weight.base, *dynamic_shape])
    return ordered.map(base, lambda f: _reshaped(f, groups, shape, base.shape))


def _dim_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The finest pairing of runs of old dims with runs of new dims of equal size."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        run_old: list[int] = []
        run_new: list[int] = []
        size_old = size_new = 1
        while (not run_old and not run_new) or size_old != size_new:
            if j == len(new) or (i < len(old) and size_old <= size_new):
                size_old *= old[i]
                run_old.append(i)
                i += 1
            else:
                size_new *= new[j]
                run_new.append(j)
                j += 1
        groups.append((run_old, run_new))
    return groups


def _is_whole(factor: Factor, group: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether the factor spans all of the group's dims or none; dims of length one count not."""
    spans = {d in factor.dims for d in group if shape[d] != 1}
    return len(spans) <= 1


def _reshaped(
    factor: Factor,
    groups: Sequence[tuple[list[int], list[int]]],
    shape: Sequence[int],
    new_shape: Sequence[int],
) -> Factor:
    spanned = [
        (old, new)
        for old, new in groups
        if any(d in factor.dims and shape[d] != 1 for d in old)
        or (old and all(d in factor.dims for d in old))
    ]
    loose = [d for d in factor.spanned if not any(d in old for old, _ in spanned)]
    factor = factor.squeeze(loose)
    absent = [d for old, _ in spanned for d in old if d not in factor.dims]
    factor = factor.widen(absent, [1] * len(absent))
    runs = [old for old, _ in spanned]
    if all(len(old) == len(new) == 1 for old, new in spanned):
        return factor.relabel({old[0]: new[0] for old, new in spanned}.__getitem__)
    # The rank axis keeps its place if that is at an end, and goes to the back if it would split.
    order = [d for run in runs for d in run]
    at_front = factor.dims[:1] == (RANK,)
    dims = (RANK, *order) if at_front else (*order, RANK) if RANK in factor.dims else tuple(order)
    new_dims = [d for _, run in spanned for d in run]
    sizes = [new_shape[d] for d in new_dims]
    rank = [factor.length(RANK)] if RANK in factor.dims else []
    array = factor.transpose(dims).array.reshape(rank + sizes if at_front else sizes + rank)
    if not rank:
        return Factor(array, tuple(new_dims))
    return Factor(array, (RANK, *new_dims) if at_front else (*new_dims, RANK))


RULES[primitives.transpose_p] = _transpose
RULES[primitives.squeeze_p] = _squeeze
RULES[primitives.broadcast_in_dim_p] = _broadcast_in_dim
RULES[primitives.reshape_p] = _reshape
