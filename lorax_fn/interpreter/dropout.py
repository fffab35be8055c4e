"""Dropout on what goes into the low-rank branch, never on what goes into the base."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lorax_fn.interpreter.factor import Factor
from lorax_fn.interpreter.weight import Term, Weight


def drop(x: Factor, term: Term, use: int) -> Factor:
    """Zeroes entries of x with probability `term.dropout` and scales the rest up to match.

    `use` tells the uses of one weight apart, so that each draws a mask of its own; the steps of a
    `scan` are told apart by `with_step`, those of a `while_loop` share one mask. Does nothing where
    the term has no keys. Experts' rows draw from one key: x's own dims already make their masks
    independent.
    """
    if term.keys is None or term.dropout == 0.0:
        return x
    keep_rate = 1.0 - term.dropout
    key = jax.random.fold_in(term.keys.array.reshape(-1)[0], use)
    keep = jax.random.bernoulli(key, keep_rate, x.array.shape)
    scaled = x.array / jnp.asarray(keep_rate, x.array.dtype)
    return x.with_array(jnp.where(keep, scaled, jnp.zeros_like(scaled)))


def has_dropout(value: Any) -> bool:
    """Whether a value is a weight some of whose terms draw masks."""
    return isinstance(value, Weight) and any(
        isinstance(term, Term) and term.keys is not None and term.dropout > 0
        for term in value.terms
    )


def with_step(value: Any, step: Any) -> Any:
    """A weight that a loop uses in every step, with keys of this step's own; other values pass."""
    if not has_dropout(value):
        return value
    return dataclasses.replace(value, terms=tuple(_with_step(t, step) for t in value.terms))


def _with_step(term: Any, step: Any) -> Any:
    if not isinstance(term, Term) or term.keys is None:
        return term
    keys = term.keys.array
    folded = jax.vmap(jax.random.fold_in, (0, None))(keys.reshape(-1), step).reshape(keys.shape)
    return dataclasses.replace(term, keys=term.keys.with_array(folded))
