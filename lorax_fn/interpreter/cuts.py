"""A symbolic weight cut, reversed, padded and split.

Along a dim that a factor spans, the factor is cut as the base is; other factors stay whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.extend.core.primitives as primitives
import jax.numpy as jnp
import numpy as np
from jax import lax

from lorax_fn.interpreter import compat
from lorax_fn.interpreter.factor import Factor
from lorax_fn.interpreter.lookup import finish_thin
from lorax_fn.interpreter.quantized import carried
from lorax_fn.interpreter.rule import RULES, Context
from lorax_fn.interpreter.weight import Term, Weight


def _slice(ctx: Context, eqn: Any, weight: Weight) -> Any:
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * weight.ndim

    def cut(factor: Factor) -> Factor:
        return factor.with_array(
            lax.slice(
                factor.array,
                factor.per_axis(start, rank=lambda r: 0),
                factor.per_axis(limit, rank=lambda r: r),
                factor.per_axis(strides, rank=lambda r: 1),
            )
        )

    return finish_thin(ctx, eqn, weight.map(carried(eqn, [weight.base]), cut))


def _dynamic_slice(ctx: Context, eqn: Any, weight: Any, *starts: Any) -> Any:
    if not isinstance(weight, Weight):
        return NotImplemented
    sizes = eqn.params["slice_sizes"]

    def cut(factor: Factor) -> Factor:
        zero = jnp.zeros((), jnp.result_type(starts[0]))
        corner = factor.per_axis(starts, rank=lambda r: zero)
        return factor.with_array(
            # Not lax.dynamic_slice: it would count a start that is negative still from the end.
            primitives.dynamic_slice_p.bind(
                *compat.unify_varying_axes(factor.array, *corner),
                slice_sizes=tuple(factor.per_axis(sizes, rank=lambda r: r)),
            )
        )

    return finish_thin(ctx, eqn, weight.map(carried(eqn, [weight.base, *starts]), cut))


def _rev(ctx: Context, eqn: Any, weight: Weight) -> Weight:
    def flip(factor: Factor) -> Factor:
        axes = factor.axes([d for d in factor.dims if d in eqn.params["dimensions"]])
        return factor.with_array(lax.rev(factor.array, axes))

    return weight.map(carried(eqn, [weight.base]), flip)


def _pad(ctx: Context, eqn: Any, weight: Any, value: Any) -> Any:
    if not isinstance(weight, Weight) or isinstance(value, Weight) or weight.gains:
        return NotImplemented
    config = eqn.params["padding_config"]
    base = carried(eqn, [weight.base, value])
    dims = [d for d, edges in enumerate(config) if tuple(edges) != (0, 0, 0)]
    terms = tuple(pad_term(term, config, dims, weight.shape) for term in weight.terms)
    return Weight(base, terms, weight.paths)


def pad_term(term: Term, config: Sequence, dims: Sequence[int], shape: Sequence[int]) -> Term:
    """Pads a term with zeros along `dims`, by padding those of its factors that span them.

    Whatever value the base is padded with belongs to the base alone.
    """
    term = term.folded()
    loose = [d for d in dims if d not in term.a.dims and d not in term.b.dims]
    a = term.a.widen(loose, [shape[d] for d in loose])

    def pad(factor: Factor) -> Factor:
        edges = factor.per_axis(config, rank=lambda r: (0, 0, 0))
        return factor.with_array(lax.pad(factor.array, jnp.zeros((), factor.array.dtype), edges))

    keys = term.keys
    if keys is not None and set(dims) & keys.spanned:  # a key has no zero to pad with
        keys = Factor(keys.array.reshape(-1)[0], ())
    return dataclasses.replace(term, a=pad(a), b=pad(term.b), keys=keys)


def _split(ctx: Context, eqn: Any, weight: Weight) -> list[Any]:
    dim, parts = eqn.params["axis"], carried(eqn, [weight.base])
    ends = np.cumsum(eqn.params["sizes"]).tolist()

    def part(start: int, end: int) -> Callable[[Factor], Factor]:
        def cut(factor: Factor) -> Factor:
            if dim not in factor.dims:
                return factor
            axis = factor.dims.index(dim)
            return factor.with_array(lax.slice_in_dim(factor.array, start, end, axis=axis))

        return cut

    spans = zip([0, *ends[:-1]], ends, strict=True)
    return [weight.map(base, part(*span)) for base, span in zip(parts, spans, strict=True)]


def _unstack(ctx: Context, eqn: Any, weight: Weight) -> list[Any]:
    dim = eqn.params["axis"]
    kept = [d for d in range(weight.ndim) if d != dim]

    def pick(index: int) -> Callable[[Factor], Factor]:
        def cut(factor: Factor) -> Factor:
            if dim in factor.dims:
                axis = factor.dims.index(dim)
                piece = lax.slice_in_dim(factor.array, index, index + 1, axis=axis)
                factor = factor.with_array(piece).squeeze([dim])
            return factor.relabel(kept.index)

        return cut

    parts = enumerate(carried(eqn, [weight.base]))
    return [finish_thin(ctx, eqn, weight.map(base, pick(i))) for i, base in parts]


RULES[primitives.slice_p] = _slice
RULES[primitives.dynamic_slice_p] = _dynamic_slice
RULES[primitives.rev_p] = _rev
RULES[primitives.pad_p] = _pad
RULES[compat.split_p] = _split
if compat.unstack_p is not None:
    RULES[compat.unstack_p] = _unstack
