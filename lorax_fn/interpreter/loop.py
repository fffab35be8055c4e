"""The interpreter's loop: a jaxpr evaluated with symbolic weights among its values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax.extend.core.primitives as primitives
from jax.extend.core import Literal

from lorax_fn.interpreter import compat
from lorax_fn.interpreter.pending import (
    PendingLookup,
    accepted,
    add_before_shares,
    is_addition,
    settled,
)
from lorax_fn.interpreter.rule import Context, apply_rule
from lorax_fn.interpreter.weight import Weight


def interpret(ctx: Context, jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr, closed or open without constants, on arrays and `Weight`s.

    An equation without a weight among its operands is bound unchanged. The results may be weights.
    """
    return [settled(result) for result in interpret_in_place(ctx, jaxpr, operands)]


def interpret_in_place(ctx: Context, jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    """As `interpret`, for a jaxpr that is part of another: results may also be pending sums."""
    jaxpr, consts = compat.open_jaxpr(jaxpr)
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, operands, strict=True))

    uses = Counter(atom for atom in _atoms_read(jaxpr) if not isinstance(atom, Literal))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    def write(var: Any, value: Any) -> None:
        waits = uses[var] == 1 or isinstance(value, PendingLookup)
        env[var] = value if waits else settled(value)

    for eqn, dead in zip(jaxpr.eqns, _last_uses(jaxpr), strict=True):
        values = [read(atom) for atom in eqn.invars]
        with compat.equation_context(eqn):
            results = _evaluate(ctx, eqn, values)
        for var, result in zip(eqn.outvars, results, strict=True):
            write(var, result)
        for var in dead:
            env.pop(var, None)  # eager evaluation should hold no activation longer than needed
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate(ctx: Context, eqn: Any, values: list[Any]) -> Sequence[Any]:
    if not any(isinstance(value, Weight) for value in values) and is_addition(eqn, values):
        return [add_before_shares(eqn, values)]
    if eqn.primitive is primitives.transpose_p and isinstance(values[0], PendingLookup):
        return [values[0].transpose(eqn)]
    values = accepted(eqn, values)
    has_weight = any(isinstance(value, Weight | PendingLookup) for value in values)
    results = apply_rule(ctx, eqn, values) if has_weight else compat.bind(eqn, values)
    return results if eqn.primitive.multiple_results else [results]


def _atoms_read(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield from eqn.invars
    yield from jaxpr.outvars


def _last_uses(jaxpr: Any) -> list[list[Any]]:
    """For each equation, the variables that nothing after it reads."""
    needed = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    dead: list[list[Any]] = []
    for eqn in reversed(jaxpr.eqns):
        variables = {v for v in (*eqn.invars, *eqn.outvars) if not isinstance(v, Literal)}
        dead.append(list(variables - needed))
        needed |= variables
    return dead[::-1]
