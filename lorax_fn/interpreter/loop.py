"""The interpreter's loop: a jaxpr evaluated with symbolic weights among its values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import Literal

from lorax_fn.interpreter import compat
from lorax_fn.interpreter.rule import Context, apply_rule
from lorax_fn.interpreter.weight import Weight


def interpret(ctx: Context, jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr, closed or open without constants, on arrays and `Weight`s.

    An equation without a weight among its operands is bound unchanged. The results may be weights.
    """
    jaxpr, consts = compat.open_jaxpr(jaxpr)
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, operands, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn, dead in zip(jaxpr.eqns, _last_uses(jaxpr), strict=True):
        values = [read(atom) for atom in eqn.invars]
        with compat.equation_context(eqn):
            if any(isinstance(value, Weight) for value in values):
                results = apply_rule(ctx, eqn, values)
            else:
                results = compat.bind(eqn, values)
        if not eqn.primitive.multiple_results:
            results = [results]
        env.update(zip(eqn.outvars, results, strict=True))
        for var in dead:
            env.pop(var, None)  # eager evaluation should hold no activation longer than needed
    return [read(atom) for atom in jaxpr.outvars]


def _last_uses(jaxpr: Any) -> list[list[Any]]:
    """For each equation, the variables that nothing after it reads."""
    needed = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    dead: list[list[Any]] = []
    for eqn in reversed(jaxpr.eqns):
        variables = {v for v in (*eqn.invars, *eqn.outvars) if not isinstance(v, Literal)}
        dead.append(list(variables - needed))
        needed |= variables
    return dead[::-1]
