"""From a call `apply_fn(params, *args, **kwargs)` to a jaxpr over flat arrays, and back.

Leaves that are arrays are traced. All others (bools, strings, callables, Python numbers) are
static: the function sees them as they are; those among its outputs are put back by `rebuild`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend import core as jax_core

from lorax_fn.errors import LoraError, StructureError
from lorax_fn.interpreter import compat
from lorax_fn.leaves import as_shape, is_quantized

Pytree = Any

_TRACED = (np.number, np.bool_, jax.dtypes.extended)


def is_array(leaf: Any) -> bool:
    """Whether `leaf` is traced: it has a shape and a dtype that JAX computes with.

    True of JAX arrays and tracers, numpy arrays and scalars, typed PRNG keys and
    `jax.ShapeDtypeStruct`; False of Python scalars and of numpy arrays of strings or objects.
    """
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return False
    try:
        return any(jax.dtypes.issubdtype(leaf.dtype, kind) for kind in _TRACED)
    except TypeError:  # a dtype of another library
        return False


@dataclass(frozen=True)
class Traced:
    """A call, traced once.

    Attributes:
        jaxpr: closed jaxpr without dead code; its inputs are `param_leaves`, then `arg_leaves`.
        param_leaves: the array leaves of `params`, in flatten order. A quantised one is one leaf,
            and one input of the jaxpr, of the shape and dtype of the floating weight.
        param_slots: for each of these, its position among all leaves of `params`, static ones
            included.
        arg_leaves: the array leaves of `(args, kwargs)`, in flatten order.
        rebuild: from the jaxpr's flat outputs to what `apply_fn` returned.
    """

    jaxpr: jax_core.ClosedJaxpr
    param_leaves: list[Any]
    param_slots: tuple[int, ...]
    arg_leaves: list[Any]
    rebuild: Callable[[Sequence[Any]], Pytree]


def trace(
    apply_fn: Callable[..., Pytree], params: Pytree, args: Sequence[Any], kwargs: dict[str, Any]
) -> Traced:
    """Traces `apply_fn(params, *args, **kwargs)` without computing anything.

    Arrays may be abstract (`jax.ShapeDtypeStruct`); weak types are kept. Whatever `apply_fn` raises
    while it is traced comes through unchanged, unless it would trace with params second: then a
    `StructureError` says so. Costs one Python run of `apply_fn`.

    >>> import jax.numpy as jnp
    >>> t = trace(lambda w, x, on: (x @ w, on), jnp.ones((2, 3)), (jnp.ones(2), True), {})
    >>> inputs = [*t.param_leaves, *t.arg_leaves]
    >>> t.rebuild(jax.core.eval_jaxpr(t.jaxpr.jaxpr, t.jaxpr.consts, *inputs))
    (Array([2., 2., 2.], dtype=float32), True)
    """
    check_function(apply_fn)
    param_leaves, param_slots, fill_params = partition(params, is_array, is_quantized)
    arg_leaves, _, fill_args = partition((tuple(args), dict(kwargs)), is_array)
    fill_outputs: list[Callable[[Sequence[Any]], Pytree]] = []

    def flat(*arrays: Any) -> list[Any]:
        args, kwargs = fill_args(arrays[len(param_leaves) :])
        outputs = apply_fn(fill_params(arrays[: len(param_leaves)]), *args, **kwargs)
        computed, _, fill = partition(outputs, _is_computed)
        fill_outputs.append(fill)
        return computed

    try:
        shapes = map(as_shape, param_leaves)
        jaxpr = compat.prune(jax.make_jaxpr(flat)(*shapes, *arg_leaves))
    except _MISUSE as e:
        if _takes_params_second(apply_fn, params, args, kwargs):
            raise StructureError(
                "apply_fn(params, x, …) fails, and apply_fn(x, params, …) traces: either the call "
                "has its arguments in the wrong order, or apply_fn takes params second. Wanted "
                "params first: pass lambda params, x, *rest: apply_fn(x, params, *rest)."
            ) from e
        raise
    return Traced(jaxpr, param_leaves, param_slots, arg_leaves, fill_outputs[0])


def check_function(apply_fn: Any) -> None:
    """Raises `LoraError` unless apply_fn can be called."""
    if not callable(apply_fn):
        raise LoraError(
            f"apply_fn is of type {type(apply_fn).__name__}; wanted a function "
            "apply_fn(params, *args), such as model.apply."
        )


# What a function raises that is given an array for a dict or the other way round.
_MISUSE = (TypeError, ValueError, AttributeError, KeyError, IndexError)


def _takes_params_second(
    apply_fn: Callable[..., Pytree], params: Pytree, args: Sequence[Any], kwargs: dict[str, Any]
) -> bool:
    """Whether the function traces with its first two arguments exchanged."""
    if not args:
        return False
    call = (args[0], params, tuple(args[1:]), dict(kwargs))
    arrays, _, fill = partition(call, is_array, is_quantized)

    def exchanged(*arrays: Any) -> None:
        first, second, rest, kwargs = fill(arrays)
        apply_fn(first, second, *rest, **kwargs)

    try:
        jax.make_jaxpr(exchanged)(*map(as_shape, arrays))
    except Exception:  # noqa: BLE001 (whatever it is, the first call's error is the one to report)
        return False
    return True


def partition(
    tree: Pytree, traced: Callable[[Any], bool], is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[Any], tuple[int, ...], Callable[[Sequence[Any]], Pytree]]:
    """Splits off the traced leaves: (leaves, their positions, a function that puts others back)."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf)
    slots = tuple(i for i, leaf in enumerate(leaves) if traced(leaf))
    static = list(leaves)
    for i in slots:
        static[i] = None  # hold no tracer and no array beyond the trace

    def fill(arrays: Sequence[Any]) -> Pytree:
        if len(arrays) != len(slots):
            raise TypeError(f"got {len(arrays)} arrays for a tree with {len(slots)} of them")
        filled = list(static)
        for i, array in zip(slots, arrays, strict=True):
            filled[i] = array
        return jax.tree.unflatten(treedef, filled)

    return [leaves[i] for i in slots], slots, fill


def _is_computed(leaf: Any) -> bool:
    """A returned `ShapeDtypeStruct` holds no value: it is passed on as it is."""
    return is_array(leaf) and not isinstance(leaf, jax.ShapeDtypeStruct)
