"""A symbolic weight cast, copied, scaled, shifted: the same dims, other values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core.primitives as primitives
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from lorax_fn.interpreter import compat
from lorax_fn.interpreter.factor import Factor
from lorax_fn.interpreter.placement import constrain_factors, factor_spec
from lorax_fn.interpreter.quantized import carried, computed
from lorax_fn.interpreter.rule import RULES, Context
from lorax_fn.interpreter.weight import Term, Weight, bases

# ------------------------------------------------------------------------------------------
# Casts, names, copies, barriers


def _on_base(ctx: Context, eqn: Any, weight: Weight) -> Any:
    """Rounding and naming concern the base; the factors keep their own, wider dtype."""
    if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return NotImplemented
    return dataclasses.replace(weight, base=carried(eqn, [weight.base]))


def _on_all(ctx: Context, eqn: Any, *operands: Any) -> Any:
    """What acts alike on arrays of any shape is done to the bases and to every factor in turn."""
    many = eqn.primitive.multiple_results
    leaves, treedef = jax.tree.flatten(list(operands))
    results = [compat.bind(eqn, [leaf]) for leaf in leaves]
    results = jax.tree.unflatten(treedef, [r[0] for r in results] if many else results)
    return results if many else results[0]


def _optimization_barrier(ctx: Context, eqn: Any, *operands: Any) -> list[Any]:
    """All operands behind one barrier, which gives the frozen bases no gradient.

    A barrier's derivative makes zeros of all tangents it lacks, a base's among them, and with them
    a dense weight gradient. So bases and the rest each pass a barrier with the other ones held.
    """
    rest, treedef = jax.tree.flatten([_without_base(operand) for operand in operands])
    frozen, bases_treedef = jax.tree.flatten(
        [operand.base for operand in operands if isinstance(operand, Weight)]
    )
    n = len(frozen)
    passed = compat.bind(eqn, [*frozen, *map(lax.stop_gradient, rest)])[:n]
    rest = compat.bind(eqn, [*map(lax.stop_gradient, frozen), *rest])[n:]
    passed_bases = iter(jax.tree.unflatten(bases_treedef, passed))
    return [
        dataclasses.replace(value, base=next(passed_bases)) if isinstance(value, Weight) else value
        for value in jax.tree.unflatten(treedef, rest)
    ]


def _without_base(operand: Any) -> Any:
    return dataclasses.replace(operand, base=None) if isinstance(operand, Weight) else operand


def _sharding_constraint(ctx: Context, eqn: Any, weight: Weight) -> Weight:
    """Each factor is constrained as the weight is along the dims that it spans."""
    base = carried(eqn, [weight.base])
    unconstrained = eqn.params.get("unconstrained_dims") or ()
    return constrain_factors(weight, base, eqn.params["sharding"], unconstrained)


def _reshard(ctx: Context, eqn: Any, weight: Weight) -> Weight:
    """As the constraint, on meshes whose axes are part of types."""
    sharding = eqn.params["dst_sharding"]

    def reshard(factor: Factor) -> Factor:
        own = NamedSharding(sharding.mesh, factor_spec(factor, sharding.spec, weight.ndim))
        params = dict(eqn.params, dst_sharding=own)
        return factor.with_array(compat.reshard_p.bind(factor.array, **params))

    return weight.map(carried(eqn, [weight.base]), reshard)


for _primitive in (
    primitives.convert_element_type_p,
    primitives.reduce_precision_p,
    compat.name_p,
):
    RULES[_primitive] = _on_base
for _primitive in (
    primitives.copy_p,
    compat.stop_gradient_p,
    compat.pvary_p,
):
    RULES[_primitive] = _on_all
RULES[compat.optimization_barrier_p] = _optimization_barrier
RULES[primitives.sharding_constraint_p] = _sharding_constraint
RULES[compat.reshard_p] = _reshard


# ------------------------------------------------------------------------------------------
# Scaling by a number or by a vector


def _neg(ctx: Context, eqn: Any, weight: Weight) -> Weight:
    base = carried(eqn, [weight.base])
    return dataclasses.replace(weight, base=base, terms=tuple(map(_negated, weight.terms)))


def _negated(term: Term) -> Term:
    return dataclasses.replace(term, scale=-term.scale)


def _mul(ctx: Context, eqn: Any, lhs: Any, rhs: Any) -> Any:
    if isinstance(lhs, Weight) and isinstance(rhs, Weight):
        return NotImplemented
    return _rescaled(eqn, lhs, rhs, lax.mul)


def _div(ctx: Context, eqn: Any, lhs: Any, rhs: Any) -> Any:
    if isinstance(rhs, Weight):
        return NotImplemented
    return _rescaled(eqn, lhs, rhs, lax.div)


def _rescaled(eqn: Any, lhs: Any, rhs: Any, op: Callable) -> Any:
    """Scales each term through the one factor whose dims the multiplier varies along."""
    weight, by = (lhs, rhs) if isinstance(lhs, Weight) else (rhs, lhs)
    if eqn.outvars[0].aval.shape != weight.shape:
        return NotImplemented
    by = jnp.asarray(by)
    varying = [d for d in range(by.ndim) if by.shape[d] != 1]
    vector = Factor(by.reshape([by.shape[d] for d in varying]), tuple(varying))
    rescaled = [_rescaled_term(term, vector, weight.shape, op) for term in weight.terms]
    terms = tuple(term for term in rescaled if term is not None)
    if len(terms) < len(rescaled):
        return NotImplemented
    operands = bases([lhs, rhs])
    if by.size == weight.base.size:  # data of that size is there: nothing is saved by waiting
        if not weight.is_adapted:
            return NotImplemented
        operands = list(map(computed, operands))
    return dataclasses.replace(weight, base=carried(eqn, operands), terms=terms)


def _rescaled_term(term: Term, vector: Factor, shape: tuple[int, ...], op: Callable) -> Term | None:
    loose = vector.spanned - term.a.spanned - term.b.spanned
    if vector.spanned - loose <= term.b.spanned:
        b = term.b.widen(sorted(loose), [shape[d] for d in sorted(loose)])
        return dataclasses.replace(term, b=b.times(vector, op))
    if vector.spanned <= term.a.spanned:
        return dataclasses.replace(term, a=term.a.times(vector, op))
    return None  # varies along dims of A and of B: not low-rank


RULES[primitives.neg_p] = _neg
RULES[primitives.mul_p] = _mul
RULES[primitives.div_p] = _div


# ------------------------------------------------------------------------------------------
# Sums and differences


def _add(ctx: Context, eqn: Any, lhs: Any, rhs: Any) -> Any:
    return _sum(eqn, lhs, rhs, lambda term: term)


def _sub(ctx: Context, eqn: Any, lhs: Any, rhs: Any) -> Any:
    return _sum(eqn, lhs, rhs, _negated)


def _sum(eqn: Any, lhs: Any, rhs: Any, of_rhs: Callable[[Term], Term]) -> Any:
    """A frozen shift joins the base; two weights' terms stand side by side."""
    weights = [operand for operand in (lhs, rhs) if isinstance(operand, Weight)]
    shape = eqn.outvars[0].aval.shape
    if not any(weight.is_adapted for weight in weights) or any(
        weight.shape != shape or weight.gains for weight in weights
    ):
        return NotImplemented
    terms = lhs.terms if isinstance(lhs, Weight) else ()
    terms += tuple(map(of_rhs, rhs.terms)) if isinstance(rhs, Weight) else ()
    paths = dict.fromkeys(path for weight in weights for path in weight.paths)
    return Weight(compat.bind(eqn, list(map(computed, bases([lhs, rhs])))), terms, tuple(paths))


RULES[primitives.add_p] = _add
RULES[primitives.add_jaxvals_p] = _add
RULES[primitives.sub_p] = _sub
