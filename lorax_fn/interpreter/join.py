"""Symbolic weights joined into one: concatenated (fused q/k/v) or stacked (layers to scan over).

Joined along a dim that A or B alone spans, each weight keeps its terms, padded with zeros:
[ΔQ 0 0] + [0 ΔK 0] + [0 0 ΔV]. Joined along a new dim or a batch dim, terms of one form become one
term whose factors are stacked, so that L layers cost what L layers cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core.primitives as primitives
import jax.numpy as jnp
from jax import lax

from lorax_fn.interpreter import compat
from lorax_fn.interpreter.cuts import pad_term
from lorax_fn.interpreter.factor import RANK, Factor
from lorax_fn.interpreter.quantized import carried
from lorax_fn.interpreter.rule import RULES, Context
from lorax_fn.interpreter.weight import Term, Weight, bases


def _concatenate(ctx: Context, eqn: Any, *operands: Any) -> Weight:
    base = carried(eqn, bases(operands))
    return _joined(base, operands, int(eqn.params["dimension"]))  # jnp.roll gives a numpy one


def _stack(ctx: Context, eqn: Any, *operands: Any) -> Weight:
    dim = eqn.params["axis"]
    base = carried(eqn, bases(operands))
    return _joined(base, [_with_dim(operand, dim) for operand in operands], dim)


def _with_dim(operand: Any, dim: int) -> Any:
    """The operand with a new dim of length one."""
    if not isinstance(operand, Weight):
        return lax.expand_dims(operand, [dim])
    shape = (*operand.shape[:dim], 1, *operand.shape[dim:])
    base = jax.ShapeDtypeStruct(shape, operand.dtype)  # the joined base is made already
    return operand.relabel(base, lambda d: d + (d >= dim))


def _joined(base: Any, operands: Sequence[Any], dim: int) -> Weight:
    weights = [operand for operand in operands if isinstance(operand, Weight)]
    paths = tuple(dict.fromkeys(path for weight in weights for path in weight.paths))
    operands = [op.base if isinstance(op, Weight) and not op.is_adapted else op for op in operands]
    weights = [weight for weight in weights if weight.is_adapted]
    if not weights:
        return Weight(base, (), paths)
    gains = _joined_gains(base, operands, dim) if any(w.gains for w in weights) else ()
    if all(_is_stackable(weight, weights[0], dim) for weight in weights):
        places = range(len(weights[0].terms))
        terms = tuple(_stacked_term(operands, weights[0], i, dim) for i in places)
        return Weight(base, terms, paths, gains)
    return Weight(base, _padded_terms(base, operands, dim), paths, gains)


def _joined_gains(base: Any, operands: Sequence[Any], dim: int) -> tuple[Factor, ...]:
    """One gain for the whole: along dim the operands' own products of gains, or ones."""
    gains = [operand.gains if isinstance(operand, Weight) else () for operand in operands]
    spanned = sorted({d for group in gains for gain in group for d in gain.dims} - {dim})
    lengths = [base.shape[d] for d in spanned]
    pieces = []
    for operand, group in zip(operands, gains, strict=True):
        whole = Factor(jnp.ones((operand.shape[dim], *lengths)), (dim, *spanned))
        for gain in group:
            whole = whole.times(gain)
        pieces.append(whole.array)
    return (Factor(jnp.concatenate(pieces), (dim, *spanned)),)


# ------------------------------------------------------------------------------------------
# Side by side, padded with zeros


def _padded_terms(base: Any, operands: Sequence[Any], dim: int) -> tuple[Term, ...]:
    terms: list[Term] = []
    before = 0
    for operand in operands:
        after = base.shape[dim] - before - operand.shape[dim]
        if isinstance(operand, Weight):
            config = [(before, after, 0) if d == dim else (0, 0, 0) for d in range(base.ndim)]
            terms += [pad_term(term, config, [dim], operand.shape) for term in operand.terms]
        before += operand.shape[dim]
    return tuple(terms)


# ------------------------------------------------------------------------------------------
# Stacked along a batch dim


def _is_stackable(weight: Weight, model: Weight, dim: int) -> bool:
    """Whether the weight's terms have the model's forms, with dim a batch dim or a new one."""
    return len(weight.terms) == len(model.terms) and all(
        _has_form(term, wanted, dim) for term, wanted in zip(weight.terms, model.terms, strict=True)
    )


def _has_form(term: Term, wanted: Term, dim: int) -> bool:
    return (
        (dim in term.a.dims) == (dim in term.b.dims)
        and (term.a.dims, term.b.dims) == (wanted.a.dims, wanted.b.dims)
        and (term.dropout, term.observes) == (wanted.dropout, wanted.observes)
        and (term.keys is None) == (wanted.keys is None)
    )


def _stacked_term(operands: Sequence[Any], model: Weight, place: int, dim: int) -> Term:
    """One term for those at this place in all operands; plain arrays get zero factors."""
    form = model.terms[place].folded()
    terms = [op.terms[place].folded() if isinstance(op, Weight) else None for op in operands]
    lengths = [op.shape[dim] for op in operands]
    rank = max(term.a.length(RANK) for term in terms if term is not None)
    # The scales may differ from layer to layer: they go into B.
    return dataclasses.replace(
        form,
        a=_stacked([t.a if t else None for t in terms], form.a, dim, lengths, rank),
        b=_stacked([_scaled(t) if t else None for t in terms], form.b, dim, lengths, rank),
        keys=form.keys
        and _stacked([t.keys if t else None for t in terms], form.keys, dim, lengths, rank),
        scale=1.0,
    )


def _scaled(term: Term) -> Factor:
    return term.b.with_array(term.b.array * term.scale)


def _stacked(
    factors: Sequence[Factor | None], form: Factor, dim: int, lengths: Sequence[int], rank: int
) -> Factor:
    """The factors joined along dim, made their leading axis; ranks padded, gaps of zeros."""
    form = _leading(form, dim, 1)
    pieces = [
        _zeros(form, length, rank)
        if factor is None
        else _ranked(_leading(factor, dim, length), rank)
        for factor, length in zip(factors, lengths, strict=True)
    ]
    return Factor(jnp.concatenate(pieces), form.dims)


def _leading(factor: Factor, dim: int, length: int) -> Factor:
    return factor.lead_with(dim) if dim in factor.dims else factor.widen([dim], [length])


def _ranked(factor: Factor, rank: int) -> jax.Array:
    if RANK not in factor.dims:
        return factor.array
    missing = rank - factor.length(RANK)
    edges = [(0, missing if d == RANK else 0, 0) for d in factor.dims]
    return (
        lax.pad(factor.array, jnp.zeros((), factor.array.dtype), edges) if missing else factor.array
    )


def _zeros(form: Factor, length: int, rank: int) -> jax.Array:
    shape = [rank if d == RANK else n for d, n in zip(form.dims, form.array.shape, strict=True)]
    if jax.dtypes.issubdtype(form.array.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(form.array[:1], (length, *shape[1:]))
    return jnp.zeros((length, *shape[1:]), form.array.dtype)


RULES[primitives.concatenate_p] = _concatenate
if compat.stack_p is not None:
    RULES[compat.stack_p] = _stack
