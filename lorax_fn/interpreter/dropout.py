"""Dropout on what goes into the low-rank branch, never on what goes into the base."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lorax_fn.interpreter.factor import Factor
from lorax_fn.interpreter.weight import Term


def drop(x: Factor, term: Term, use: int) -> Factor:
    """Zeroes entries of x with probability `term.dropout` and scales the rest up to match.

    `use` tells the uses of one weight apart, so that each draws a mask of its own; the steps of a
    loop share one. Does nothing where the term has no keys. Experts' rows draw from one key: x's
    own dims already make their masks independent.
    """
    if term.keys is None or term.dropout == 0.0:
        return x
    keep_rate = 1.0 - term.dropout
    key = jax.random.fold_in(term.keys.array.reshape(-1)[0], use)
    keep = jax.random.bernoulli(key, keep_rate, x.array.shape)
    scaled = x.array / jnp.asarray(keep_rate, x.array.dtype)
    return x.with_array(jnp.where(keep, scaled, jnp.zeros_like(scaled)))
