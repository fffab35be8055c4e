"""`wrap_batched`: one batch whose examples are answered by different adapters of one base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.adapters import Adapter, is_adapter
from lorax_fn.errors import LoraError
from lorax_fn.serving import count_stacked, take
from lorax_fn.tracing import is_array, partition
from lorax_fn.transform import wrap

Pytree = Any

BASE = -1
"""The id of an example that the bare base answers."""


def wrap_batched(
    apply_fn: Callable[..., Any], *, dense: Literal["warn", "error", "allow"] = "warn"
) -> Callable[..., Any]:
    """Makes `apply_fn` answer each example of a batch with an adapter of its own.

    Every example is answered as its own merged model would, alone: `apply_fn` sees batches of one,
    so examples do not meet in it, not in a batch norm either. All products with the base are still
    done once, for the whole batch together (`jax.vmap` sees to that, since params are the same for
    all); only the thin products with the factors are each example's own. Other ids, or other values
    in `stacked`, need no compile.

    Costs beside the base's products: the factors of each example, gathered from `stacked` (of an
    adapted embedding too: all of its A), and their thin products; the number of adapters does not
    matter. DoRA's norms are computed for each example. A leaf that `Full` trains becomes a weight
    for each example: cheap for biases and heads, not for the kernels of a model.

    Args:
        apply_fn: any function of params and arrays whose first axis is the batch.
        dense: what to do where a weight has to be added up, as for `wrap`: here once an example.

    Returns:
        `batched(params, stacked, ids, x, *args, **kwargs)`. `stacked` is what `lora.stack` made, of
        n adapters; ids (batch,) are integers from 0 to n - 1, or -1 for the bare base; x and every
        other array (batch, …) goes to `apply_fn` an example at a time, as (1, …), and what is no
        array as it is. Close over what all examples share. Arrays that `apply_fn` returns as (1, …)
        come back as (batch, …); others with an axis of examples in front.

    Raises:
        LoraError: as `wrap`; and when called, if an id is out of range, ids are no integers, or an
            array does not have the batch as its first axis. Ids that are traced cannot be looked
            at: one out of range makes its example's answer NaN.
        StructureError: when called with factors that are not stacked or do not belong to params.

    >>> import jax, jax.numpy as jnp, lorax_fn as lora
    >>> params = {"w": jnp.ones((3, 2))}
    >>> each = [
    ...     lora.init(jax.random.key(0), params, [lora.LoRA("w", rank=r, alpha=3)]) for r in (1, 2)
    ... ]
    >>> batched = lora.wrap_batched(lambda params, x: x @ params["w"])
    >>> batched(params, lora.stack(each), jnp.array([1, -1, 0, 1]), jnp.ones((4, 3))).shape
    (4, 2)
    """
    adapted = wrap(apply_fn, dense=dense)

    def batched(
        params: Pytree, stacked: Pytree, ids: Any, x: Any, /, *args: Any, **kwargs: Any
    ) -> Any:
        ids = _checked_ids(ids, count_stacked(stacked))
        arrays, _, fill = partition(((x, *args), kwargs), is_array)
        _check_batch(arrays, len(ids))
        fill_results: list[Callable[..., Any]] = []

        def answer(i: jax.Array, example: list[jax.Array]) -> list[jax.Array]:
            args, kwargs = fill([array[None] for array in example])
            results = adapted(params, take_or_base(stacked, i), *args, **kwargs)
            computed, _, fill_result = partition(results, is_array)
            fill_results.append(fill_result)
            return [jnp.asarray(array) for array in computed]

        answers = jax.vmap(answer)(ids, arrays)
        return fill_results[0]([_of_examples(answer) for answer in answers])

    batched.__name__ = f"batched({getattr(apply_fn, '__name__', type(apply_fn).__name__)})"
    batched.__doc__ = "(params, stacked, ids, x, *args, **kwargs) -> what apply_fn returns."
    return batched


def take_or_base(stacked: Pytree, i: jax.Array) -> Pytree:
    """Adapter `i` as `take` gives it, or for -1 factors that change nothing."""
    taken = take(stacked, jnp.where(i == BASE, 0, i))

    def choose(node: Adapter) -> Adapter:
        return jax.tree.map(lambda a, b: jnp.where(i == BASE, a, b), node.neutral(), node)

    return jax.tree.map(choose, taken, is_leaf=is_adapter)


def _checked_ids(ids: Any, n: int) -> jax.Array:
    if not isinstance(ids, jax.core.Tracer):
        ids = np.asarray(ids)
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise LoraError(
            f"ids are {ids.dtype}{list(ids.shape)}; wanted one integer for each example."
        )
    if isinstance(ids, np.ndarray):
        wrong = ids[(ids < BASE) | (ids >= n)]
        if wrong.size:
            raise LoraError(
                f"adapter {wrong[0]} of {n} stacked ones does not exist; wanted ids from 0 to "
                f"{n - 1}, or -1 for the bare base."
            )
    signed = jnp.issubdtype(ids.dtype, jnp.signedinteger)
    return jnp.asarray(ids) if signed else jnp.asarray(ids).astype(jnp.int32)


def _check_batch(arrays: list[Any], batch: int) -> None:
    for array in arrays:
        if not array.ndim or array.shape[0] != batch:
            raise LoraError(
                f"an argument is {array.dtype}{list(array.shape)}, with {batch} ids; wanted arrays "
                f"({batch}, …). What all examples share, let apply_fn close over."
            )


def _of_examples(answer: jax.Array) -> jax.Array:
    """(batch, 1, …) as (batch, …)."""
    return answer[:, 0] if answer.shape[1:2] == (1,) else answer
