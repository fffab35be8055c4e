"""Terms that learn what goes into a weight: the cotangent of A is made xᵀ·(x·A).

With B = 0 such a term changes no result, and one differentiation of the function yields, for every
weight at once, the second moment of its inputs times A: through scans, remats, convolutions and
experts, because it is the ordinary transpose that brings it back.
"""

from __future__ import annotations

import jax
from jax import lax

from lorax_fn.interpreter.factor import Factor
from lorax_fn.interpreter.weight import Term


def enter(x: Factor, term: Term) -> Factor:
    """What meets A. What an observing term makes of its cotangent shall not flow back into x."""
    return x.with_array(lax.stop_gradient(x.array)) if term.observes else x


def observe(thin: Factor, term: Term) -> Factor:
    """x·A, which is its own cotangent if the term observes."""
    return thin.with_array(_own_cotangent(thin.array)) if term.observes else thin


@jax.custom_vjp
def _own_cotangent(thin: jax.Array) -> jax.Array:
    return thin


def _forward(thin: jax.Array) -> tuple[jax.Array, jax.Array]:
    return thin, thin


def _backward(thin: jax.Array, _: jax.Array) -> tuple[jax.Array]:
    return (thin,)


_own_cotangent.defvjp(_forward, _backward)
