"""`wrap`, `merge` and `unmerge`: a function and its params, with and without the factors."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.adapters import Adapter
from lorax_fn.errors import DenseWarning, LoraError
from lorax_fn.evaluate import evaluate
from lorax_fn.interpreter import Event, Weight, dequantize
from lorax_fn.keys import check_key
from lorax_fn.leaves import check_installed, is_quantized, structure
from lorax_fn.pairing import pair
from lorax_fn.tracing import check_function

Pytree = Any


def wrap(
    apply_fn: Callable[..., Any], *, dense: Literal["warn", "error", "allow"] = "warn"
) -> Callable[..., Any]:
    """Makes `apply_fn` take factors second, and compute with the adapted weights.

    The function is traced with params of their ordinary shapes, and its jaxpr evaluated with every
    adapted weight as frozen base plus low-rank terms, which are kept apart wherever the weight is
    contracted: a training step costs what it costs with LoRA written into the layers by hand. No
    gradient reaches params. Pair the result with `jax.jit`: each eager call traces anew.

    Args:
        apply_fn: any function of a pytree of params and further arguments.
        dense: what to do where a weight meets an operation with no factored form and has to be
            added up as W + s·A·B: "warn" (`DenseWarning`), "error" (`LoraError`) or "allow".

    Returns:
        `wrapped(params, factors, *args, lora_key=None, **kwargs)`, which returns what
        `apply_fn(params, *args, **kwargs)` returns. Arrays among the arguments are traced, all
        others are static. `lora_key`, a PRNG key, turns the adapters' dropout on.

    Raises:
        LoraError: if apply_fn is no function or dense no such word; when called, where
            dense="error" and a weight had to be added up, and where lora_key is no PRNG key.
        StructureError: when called with factors that do not belong to params.

    >>> import jax, jax.numpy as jnp, lorax_fn as lora
    >>> params = {"w": jnp.ones((3, 2))}
    >>> apply_fn = lambda params, x: x @ params["w"]
    >>> factors = lora.init(jax.random.key(0), params, [lora.LoRA("w", rank=1, alpha=2)])
    >>> lora.wrap(apply_fn)(params, factors, jnp.ones((4, 3))).shape
    (4, 2)
    """
    check_function(apply_fn)
    if dense not in ("warn", "error", "allow"):
        raise LoraError(f"dense={dense!r} is unknown; wanted 'warn', 'error' or 'allow'.")

    def wrapped(
        params: Pytree, factors: Pytree, /, *args: Any, lora_key: Any = None, **kwargs: Any
    ) -> Any:
        key = None if lora_key is None else check_key(lora_key, "lora_key")
        added_up: dict[Event, None] = {}

        def on_event(event: Event) -> None:
            if event.dense and dense == "error":
                raise LoraError(_added_up(event) + " Exclude the leaf, or allow it by dense=.")
            if event.dense:
                added_up[event] = None

        result = evaluate(apply_fn, params, factors, args, kwargs, key=key, on_event=on_event)
        if dense == "warn":
            for event in added_up:
                warnings.warn(_added_up(event), DenseWarning, stacklevel=2)
        return result

    # Not functools.wraps: the wrapped function's signature is another.
    wrapped.__name__ = f"lora({getattr(apply_fn, '__name__', type(apply_fn).__name__)})"
    wrapped.__doc__ = "(params, factors, *args, lora_key=None, **kwargs) -> what apply_fn returns."
    return wrapped


def _added_up(event: Event) -> str:
    if not event.adapted:
        return (
            f"{event.path!r} meets {event.primitive} at {event.source}: the quantised weight is "
            "dequantised there, and kept so for the backward pass."
        )
    if event.primitive == "return":
        return f"{event.path!r} is returned by apply_fn: the weight is added up as W + s·A·B."
    return (
        f"{event.path!r} meets {event.primitive} at {event.source}, which has no factored form: "
        "the weight is added up there as W + s·A·B."
    )


def merge(params: Pytree, factors: Pytree, *, check_finite: bool = False) -> Pytree:
    """Adds the factors into params, for the plain function to serve with no extra cost.

    The sum is formed in float32 or wider and cast once, so in half precision too the merged model
    answers as the adapted one does, to one rounding of the weight.

    Of a base that `quantize` made, every quantised leaf becomes a floating array, adapted or not:
    the plain function takes no other. `quantize` makes the result small again, and
    `quantization_error` tells what that costs.

    Args:
        params: the frozen base; not changed.
        factors: what `init` made for it, trained or not.
        check_finite: refuse a merged leaf that holds a NaN or an infinity.

    Returns:
        A pytree of the structure, dtypes and shardings of params. Floating leaves without a factor
        are the very same arrays.

    Raises:
        StructureError: if factors do not belong to params.
        LoraError: if `check_finite` is set, and a merged leaf is not finite or merge is traced; if
            a leaf is quantised, and qwix is not installed.

    >>> import jax, jax.numpy as jnp, lorax_fn as lora
    >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    >>> factors = lora.init(jax.random.key(0), params, [lora.LoRA("w", rank=1, alpha=2)])
    >>> lora.merge(params, factors)["b"] is params["b"]
    True
    """

    def merged(path: str, leaf: Any, adapter: Adapter) -> jax.Array:
        result = _as_leaf(_placed_like(leaf, _merged)(leaf, adapter), leaf)
        if check_finite and isinstance(result, jax.core.Tracer):
            raise LoraError(
                "check_finite looks at values, which a traced merge has not; call merge outside of "
                "jax.jit, or without check_finite."
            )
        if check_finite and not bool(jnp.isfinite(result).all()):
            raise LoraError(
                f"the merged {path!r} is not finite: its base or its factors hold NaN or infinity, "
                "or the sum overflows its dtype. Look at the factors' norms."
            )
        return result

    return _map_adapted(merged, params, factors)


def unmerge(params: Pytree, factors: Pytree) -> Pytree:
    """Takes merged factors out of params again: the inverse of `merge`, to rounding.

    Repeated merging and unmerging in half precision drifts; where the base can be kept, keep it.
    DoRA and IA3 multiply: an output whose multiplier is zero comes back as zero, and one of DoRA's
    whose change is as long as its weight may come back as another weight with the same merged one.

    Args:
        params: what `merge` returned.
        factors: the factors that were merged.

    Returns:
        A pytree of the structure, dtypes and shardings of params.

    Raises:
        StructureError: if factors do not belong to params.
    """

    def unmerged(_: str, leaf: Any, adapter: Adapter) -> jax.Array:
        return _as_leaf(_placed_like(leaf, _unmerged)(leaf, adapter), leaf)

    return _map_adapted(unmerged, params, factors)


def _map_adapted(fn: Callable[..., Any], params: Pytree, factors: Pytree) -> Pytree:
    """Maps `fn(path, leaf, adapter)` over the adapted leaves; quantised ones become arrays."""

    def of(path: str, leaf: Any, adapter: Adapter | None) -> Any:
        if is_quantized(leaf):
            check_installed(path)
        if adapter is not None:
            return fn(path, leaf, adapter)
        return _placed_like(leaf, _array)(leaf) if is_quantized(leaf) else leaf

    results = [of(*entry) for entry in pair(params, factors)]
    return jax.tree.unflatten(structure(params), results)


def _array(leaf: Any) -> jax.Array:
    return dequantize(leaf) if is_quantized(leaf) else jnp.asarray(leaf)


def _merged(leaf: Any, adapter: Adapter) -> jax.Array:
    adapted = adapter.adapt(_array(leaf), "")
    return adapted.add_up() if isinstance(adapted, Weight) else adapted


def _unmerged(leaf: Any, adapter: Adapter) -> jax.Array:
    return adapter.remove(_array(leaf), "")


def _as_leaf(result: jax.Array, leaf: Any) -> Any:
    """The result in the leaf's dtype, also in one that JAX has disabled (numpy's float64)."""
    return result if result.dtype == leaf.dtype else np.asarray(result, leaf.dtype)


def _placed_like(leaf: Any, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` compiled to leave its result where a concrete, committed leaf lies."""
    leaf = leaf.qvalue if is_quantized(leaf) else leaf
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.committed:
        return _compiled(fn, leaf.sharding)
    return _compiled(fn, None)


@functools.cache
def _compiled(fn: Callable[..., Any], sharding: Any) -> Callable[..., Any]:
    return jax.jit(fn) if sharding is None else jax.jit(fn, out_shardings=sharding)
