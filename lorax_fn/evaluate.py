"""One call of an adapted function: trace it, put adapted weights in, interpret the jaxpr."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax_fn.errors import StructureError
from lorax_fn.interpreter import Context, Event, Quantized, Weight, compat, interpret
from lorax_fn.keys import fold_path
from lorax_fn.leaves import check_installed, is_quantized
from lorax_fn.pairing import pair
from lorax_fn.tracing import trace

Pytree = Any


def evaluate(
    apply_fn: Callable[..., Any],
    params: Pytree,
    factors: Pytree,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    key: jax.Array | None,
    on_event: Callable[[Event], None],
) -> Any:
    """Returns what `apply_fn(params, *args, **kwargs)` returns with the adapted weights in it."""
    pairs = pair(params, factors)
    traced = trace(apply_fn, params, args, kwargs)
    _check_used(traced.jaxpr, len(traced.param_leaves))
    ctx = Context(on_event)
    weights = []
    for slot, leaf in zip(traced.param_slots, traced.param_leaves, strict=True):
        path, _, adapter = pairs[slot]
        frozen = _frozen(path, leaf)
        own_key = None if key is None else fold_path(key, path)
        if adapter is not None:
            weights.append(adapter.adapt(frozen, path, own_key))
        else:
            weights.append(Weight(frozen, (), (path,)) if is_quantized(leaf) else frozen)
    results = interpret(ctx, traced.jaxpr, [*weights, *map(jnp.asarray, traced.arg_leaves)])
    return traced.rebuild([ctx.returned(result) for result in results])


def _check_used(jaxpr: Any, n_params: int) -> None:
    """Raises `StructureError` if the function reads no leaf of params at all."""
    jaxpr, _ = compat.open_jaxpr(jaxpr)
    read = {id(atom) for eqn in jaxpr.eqns for atom in eqn.invars} | set(map(id, jaxpr.outvars))
    if not any(id(var) in read for var in jaxpr.invars[:n_params]):
        raise StructureError(
            "apply_fn ignores its first argument, so adapters have no effect; wanted a function of "
            "params: apply_fn(params, *args)."
        )


def _frozen(path: str, leaf: Any) -> Any:
    if is_quantized(leaf):
        check_installed(path)
        return Quantized(jax.tree.map(lambda part: lax.stop_gradient(jnp.asarray(part)), leaf))
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return lax.stop_gradient(jnp.asarray(leaf))
    return leaf
