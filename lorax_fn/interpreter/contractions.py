"""Where a symbolic weight meets data in a matmul or a ragged matmul.

Every rule computes the equation on the base, with the equation's own parameters, and adds for each
term the same contraction done in two thin steps: with the factor that holds the contracted dims
first, with the other one then. A·B is never formed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core.primitives as primitives
import jax.numpy as jnp
from jax import lax

from lorax_fn.interpreter import compat
from lorax_fn.interpreter.dropout import drop
from lorax_fn.interpreter.factor import RANK, Factor, Label, is_smaller, labelled_dot
from lorax_fn.interpreter.gains import (
    apply_gains,
    can_gain,
    fold,
    gained_product,
    gained_share,
    is_narrow,
)
from lorax_fn.interpreter.kronecker import KroneckerTerm
from lorax_fn.interpreter.observation import enter, observe
from lorax_fn.interpreter.pending import PendingSum
from lorax_fn.interpreter.rule import RULES, Context
from lorax_fn.interpreter.weight import Term, Weight

Dot = Callable[..., Factor]


@dataclasses.dataclass(frozen=True)
class Contraction:
    """How x meets the weight, in labels: a dim of the weight is its number.

    Attributes:
        summed: the weight's dims that are summed over.
        out: the labels of the result's dims, in order.
        shape: the result's shape.
        dtype: the dtype in which the weight enters the product.
        dot: multiplies x, or what has become of it, with a factor: `dot(x, factor, keep)`.
    """

    summed: frozenset[int]
    out: tuple[Label, ...]
    shape: tuple[int, ...]
    dtype: Any
    dot: Dot

    def shares(
        self, ctx: Context, x: Factor, weight: Weight, gains: tuple[Factor, ...]
    ) -> tuple[jax.Array, ...]:
        """The share of every term, multiplied by those gains of the weight that x did not take."""
        terms, left = fold(weight.terms, gains)
        shares = (
            self.kronecker(x, term, weight.shape)
            if isinstance(term, KroneckerTerm)
            else self.low_rank(x, term, next(ctx.uses))
            for term in terms
        )
        return tuple(gained_share(share, self.out, left) for share in shares)

    def kronecker(self, x: Factor, term: KroneckerTerm, shape: tuple[int, ...]) -> jax.Array:
        """The share of a Kronecker term, of the result's shape."""
        x = x.astype(joint_dtype(x.array.dtype, self.dtype))
        return term.share(x, shape, self.summed, self.out, self.dot).reshape(self.shape)

    def low_rank(self, x: Factor, term: Term, use: int) -> jax.Array:
        """The share of one term: s · x·first·second, of the result's shape.

        `use` numbers the contraction: each draws dropout of its own.
        """
        if not self._meets_gains(x, term):
            term = term.folded()
        dtype = joint_dtype(x.array.dtype, self.dtype)
        x = x.astype(dtype)  # one-hot integers, masks and 8-bit floats must not round x·first
        first, second = order_factors(term, self.summed)
        # A summed dim that neither factor spans was broadcast: let the first one span it.
        spanned = {*first.dims, *second.dims}
        missing = [d for d in x.dims if d in self.summed and d not in spanned]
        first = first.widen(missing, [x.length(d) for d in missing])

        later = (*self.out, *second.dims)
        x, gains = apply_gains(x, term.gains)
        into = enter(drop(x, term, use), term)
        thin = observe(self.dot(into, first.astype(dtype), later), term)  # (x's free dims…, r)
        thin, gains = apply_gains(thin.astype(dtype), gains)
        second = second.astype(joint_dtype(second.array.dtype, dtype))  # not rounded when scaled
        thin, second = scale_smaller(term.scale, thin, second)
        second = _in_order(second, [d for d in self.out if d not in thin.dims])
        wide = self.dot(thin, second.astype(dtype), self.out)  # (x's free…, w's free…)
        wide, _ = apply_gains(wide, gains)
        missing = [d for d in self.out if d not in wide.dims]
        lengths = dict(zip(self.out, self.shape, strict=True))
        wide = wide.widen(missing, [lengths[d] for d in missing])
        return wide.transpose(self.out).array

    def _meets_gains(self, x: Factor, term: Term) -> bool:
        """Whether x, x·first or x·first·second spans all dims of each of the term's gains."""
        first, second = order_factors(term, self.summed)
        thin = {*x.dims, *first.dims} - (self.summed - {*second.dims})
        wide = {*x.dims, *first.dims, *second.dims} - self.summed - {RANK}
        stages = ({*x.dims}, thin, wide)
        return all(any({*gain.dims} <= stage for stage in stages) for gain in term.gains)


def joint_dtype(x: Any, weight: Any) -> Any:
    """The dtype in which data meets a factor: the wider of the data's and the weight's.

    At least bfloat16: floats of eight bits or fewer are for storage, and have no common type.
    """
    wide = [jnp.bfloat16 if is_narrow(dtype) else dtype for dtype in (x, weight)]
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(*wide)


def order_factors(term: Term, summed: frozenset[int]) -> tuple[Factor, Factor]:
    """(first, second): the factor with more of the summed dims meets x first.

    That is A, but for a weight contracted on its output side, such as a tied head.
    """
    if term.b.size(summed) > term.a.size(summed):
        return term.b, term.a
    return term.a, term.b


def scale_smaller(scale: float, thin: Factor, second: Factor) -> tuple[Factor, Factor]:
    """Multiplies the scale into the smaller of the thin activation and the second factor."""
    if scale == 1.0:
        return thin, second
    if is_smaller(thin.array, second.array):
        return thin.with_array(thin.array * scale), second
    return thin, second.with_array(second.array * scale)


def _in_order(factor: Factor, free: Sequence[Label]) -> Factor:
    """The factor with its free dims in the result's order, so that no result is transposed."""
    wanted = [d for d in free if d in factor.dims]
    if [d for d in factor.dims if d in wanted] == wanted:
        return factor
    return factor.transpose((*(d for d in factor.dims if d not in wanted), *wanted))


# ------------------------------------------------------------------------------------------
# dot_general


def _dot_general(ctx: Context, eqn: Any, lhs: Any, rhs: Any) -> Any:
    if isinstance(lhs, Weight) and isinstance(rhs, Weight):
        return _weight_times_weight(ctx, eqn, lhs, rhs)
    weight_is_lhs = isinstance(lhs, Weight)
    weight, x = (lhs, rhs) if weight_is_lhs else (rhs, lhs)
    contracted, batch = eqn.params["dimension_numbers"]
    w_side, x_side = (0, 1) if weight_is_lhs else (1, 0)
    meeting = {
        x_dim: w_dim
        for pairs in (contracted, batch)
        for w_dim, x_dim in zip(pairs[w_side], pairs[x_side], strict=True)
    }
    x_labels = tuple(meeting.get(axis, ("x", axis)) for axis in range(x.ndim))
    x_free = [label for axis, label in enumerate(x_labels) if axis not in meeting]
    w_free = [d for d in range(weight.ndim) if d not in meeting.values()]
    free = (*w_free, *x_free) if weight_is_lhs else (*x_free, *w_free)
    if not can_gain(x, x_labels, weight.gains, contracted[w_side]):
        return NotImplemented

    labelled, gains = apply_gains(Factor(x, x_labels), weight.gains)
    x = labelled.array
    out = (*batch[w_side], *free)
    operands = [weight.base, x] if weight_is_lhs else [x, weight.base]
    base = gained_product(eqn, operands, x_side, out, gains)
    contraction = Contraction(
        summed=frozenset(contracted[w_side]),
        out=out,
        shape=base.shape,
        dtype=weight.dtype,
        dot=functools.partial(
            _dot,
            weight_is_lhs=weight_is_lhs,
            precision=eqn.params["precision"],
            preferred_element_type=eqn.params["preferred_element_type"],
        ),
    )
    ctx.factored(weight, eqn)
    return PendingSum(base, contraction.shares(ctx, labelled, weight, gains))


def _dot(
    x: Factor, factor: Factor, keep: Sequence[Label], *, weight_is_lhs: bool, **options: Any
) -> Factor:
    """`labelled_dot` in the equation's own operand order, so that dims come out in its order."""
    operands = (factor, x) if weight_is_lhs else (x, factor)
    return labelled_dot(*operands, keep, **options)


def _weight_times_weight(ctx: Context, eqn: Any, lhs: Weight, rhs: Weight) -> Any:
    """Adds up the smaller of two weights, which then plays the part of the data.

    One that is merely quantised rather than one that is adapted.
    """
    if (lhs.is_adapted, lhs.base.size) <= (rhs.is_adapted, rhs.base.size):
        return _dot_general(ctx, eqn, ctx.add_up(lhs, eqn), rhs)
    return _dot_general(ctx, eqn, lhs, ctx.add_up(rhs, eqn))


RULES[primitives.dot_general_p] = _dot_general


# ------------------------------------------------------------------------------------------
# ragged_dot: rows of x grouped by expert, each group with its own matrix


def _ragged_dot_general(ctx: Context, eqn: Any, x: Any, weight: Any, group_sizes: Any) -> Any:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_summed, w_summed), (x_batch, w_batch) = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    ragged = tuple(numbers.lhs_ragged_dimensions)
    if not isinstance(weight, Weight) or isinstance(x, Weight):
        return NotImplemented
    if len(groups) != 1 or set(ragged) & {*x_summed, *x_batch}:
        return NotImplemented  # ragged contracted or batch dims: no weight's usual place
    meeting = dict(zip((*x_summed, *x_batch), (*w_summed, *w_batch), strict=True))
    x_labels = tuple(meeting.get(axis, ("x", axis)) for axis in range(x.ndim))
    x_free = [label for axis, label in enumerate(x_labels) if axis not in meeting]
    w_free = [d for d in range(weight.ndim) if d not in (*meeting.values(), *groups)]

    # Rows of no group give zero: at least one factor has to know the groups.
    grouped = tuple(_spanning(term.folded(), groups[0], weight.shape) for term in weight.terms)
    weight = dataclasses.replace(weight, terms=grouped)
    rows = ("x", ragged[0])
    n_rows = x.shape[ragged[0]]
    by_row = [_by_row(g, groups[0], rows, n_rows, eqn, group_sizes) for g in weight.gains]
    if (group_sizes.ndim > 1 and weight.gains) or not can_gain(x, x_labels, by_row, w_summed):
        return NotImplemented
    labelled, gains = apply_gains(Factor(x, x_labels), by_row)
    out = (*w_batch, *x_free, *w_free)
    base = gained_product(eqn, [labelled.array, weight.base, group_sizes], 0, out, gains)
    contraction = Contraction(
        summed=frozenset(w_summed),
        out=out,
        shape=base.shape,
        dtype=weight.dtype,
        dot=functools.partial(
            _ragged_dot,
            group=groups[0],
            ragged=rows,
            group_sizes=group_sizes,
            precision=eqn.params["precision"],
            preferred_element_type=eqn.params["preferred_element_type"],
            group_offset=eqn.params["group_offset"],
        ),
    )
    ctx.factored(weight, eqn)
    return PendingSum(base, contraction.shares(ctx, labelled, weight, gains))


def _by_row(
    gain: Factor, group: int, rows: Label, n_rows: int, eqn: Any, group_sizes: Any
) -> Factor:
    """A gain that differs between the groups, as one that differs between the rows of x."""
    if group not in gain.dims:
        return gain
    gain = gain.lead_with(group)
    groups, *lengths = gain.array.shape
    ones = jnp.ones((n_rows, 1), gain.array.dtype)
    by_row = lax.ragged_dot(
        ones,
        gain.array.reshape(groups, 1, -1),
        group_sizes,
        group_offset=eqn.params["group_offset"],
    )  # (rows, the gain's other dims)
    return Factor(by_row.reshape(n_rows, *lengths), (rows, *gain.dims[1:]))


def _spanning(term: Term, dim: int, shape: tuple[int, ...]) -> Term:
    """The term with at least one factor that spans dim."""
    if dim in term.a.dims or dim in term.b.dims:
        return term
    return dataclasses.replace(term, b=term.b.widen([dim], [shape[dim]]))


def _ragged_dot(
    x: Factor,
    factor: Factor,
    keep: Sequence[Label],
    *,
    group: int,
    ragged: Label,
    group_sizes: Any,
    group_offset: Any,
    **options: Any,
) -> Factor:
    """`labelled_dot`, where each run of rows along `ragged` meets its own slice of `group`."""
    if group not in factor.dims:  # one factor for all experts
        return labelled_dot(x, factor, keep, **options)
    shared = [d for d in x.dims if d in factor.dims]
    batch = [d for d in dict.fromkeys(keep) if d in shared]
    summed = [d for d in shared if d not in batch]
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(
            (x.axes(summed), factor.axes(summed)),
            (x.axes(batch), factor.axes(batch)),
        ),
        lhs_ragged_dimensions=x.axes([ragged]),
        rhs_group_dimensions=factor.axes([group]),
    )
    array = lax.ragged_dot_general(
        x.array, factor.array, group_sizes, numbers, group_offset=group_offset, **options
    )
    free = [d for side in (x, factor) for d in side.dims if d not in (*shared, group)]
    return Factor(array, (*batch, *free))


RULES[compat.ragged_dot_general_p] = _ragged_dot_general
