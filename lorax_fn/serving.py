"""Several adapters of one base as one pytree, to train, sweep or serve them together."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lorax_fn.adapters import Adapter
from lorax_fn.errors import LoraError, StructureError
from lorax_fn.pairing import align, name_kind

Pytree = Any


def stack(adapters: Sequence[Pytree]) -> Pytree:
    """Stacks factors of one base along a new leading axis, one entry for each adapter.

    `jax.vmap` over the result, and over data where each adapter has its own, runs all adapters at
    once; the products with the base are then done once, on all data together:

        jax.vmap(lambda f, x: apply(params, f, x))(lora.stack([f, g]), xs)

    Adapters of different rank are padded with zeros, which stay zero in training. Different scales
    are multiplied into B; a scale that all share stays, so that training goes as it would alone.
    To train at scales that differ, stack at one scale and multiply B within the loss, by an array
    with an entry for each adapter: `examples/sweep_many_adapters.py`.

    Args:
        adapters: factors that `init` made for the same params with the same targets and kinds.

    Returns:
        Factors like each, every array with a leading axis. `take` gives one of them back.

    Raises:
        StructureError: if they differ in their targets, kinds, axes or settings, or in a length
            that is no rank.
        LoraError: if there are none.

    >>> import jax, jax.numpy as jnp, lorax_fn as lora
    >>> params, key = {"w": jnp.ones((4, 3))}, jax.random.key(0)
    >>> each = [lora.init(key, params, [lora.LoRA("w", rank=r)]) for r in (1, 2)]
    >>> lora.stack(each)["w"].a.shape
    (2, 4, 2)
    """
    treedef, places = align(adapters)
    stacked = [_stacked(path, nodes) for path, nodes in places]
    return jax.tree.unflatten(treedef, stacked)


def take(stacked: Pytree, i: Any) -> Pytree:
    """Adapter `i` of what `stack` made; `i` may be traced: another adapter needs no compile.

    Raises:
        LoraError: if `i` is out of range, or nothing is stacked. A traced `i` cannot be looked at:
            out of range it gives NaN.

    >>> import jax, jax.numpy as jnp, lorax_fn as lora
    >>> params = {"w": jnp.ones((4, 3))}
    >>> f = lora.init(jax.random.key(0), params, [lora.LoRA("w", rank=1)])
    >>> lora.take(lora.stack([f, f]), 1)["w"].a.shape
    (4, 1)
    """
    n = count_stacked(stacked)
    if isinstance(i, jax.core.Tracer):
        exists = (i >= 0) & (i < n)
        return jax.tree.map(lambda array: jnp.where(exists, _at(array, i), jnp.nan), stacked)
    i = operator.index(i)
    if not 0 <= i < n:
        raise LoraError(f"adapter {i} of {n} stacked ones does not exist; wanted 0 to {n - 1}.")
    return jax.tree.map(lambda array: array[i], stacked)


def count_stacked(stacked: Pytree) -> int:
    """How many adapters are stacked.

    Raises:
        LoraError: if there is nothing, or arrays of different first axes.
    """
    lengths = {jnp.shape(array)[:1] for array in jax.tree.leaves(stacked)}
    if len(lengths) != 1 or () in lengths:
        what = "different first axes" if lengths else "no arrays"
        hint = ": lora.stack(factors)" if isinstance(stacked, list | tuple) else ""
        raise LoraError(f"the factors hold {what}; wanted what lora.stack made{hint}.")
    return lengths.pop()[0]


def _at(array: Any, i: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(array, i, keepdims=False)


def _stacked(path: str, nodes: Sequence[Any]) -> Adapter | None:
    for i, node in enumerate(nodes):
        if name_kind(node) != name_kind(nodes[0]):
            raise StructureError(
                f"factors 0 have {name_kind(nodes[0])} at {path!r}, factors {i} have "
                f"{name_kind(node)}; wanted factors of the same params, targets and kinds."
            )
    if nodes[0] is None:
        return None
    scales = {getattr(node, "scale", None) for node in nodes}
    if len(scales) > 1:
        nodes = [node.unscaled() for node in nodes]
    treedefs: list[Any] = [jax.tree.structure(node) for node in nodes]
    for i, treedef in enumerate(treedefs):
        if treedef != treedefs[0]:
            raise StructureError(
                f"the {nodes[0].kind} nodes of factors 0 and {i} at {path!r} differ in "
                f"{_differences(nodes[0], nodes[i])}; wanted the same settings in all."
            )
    first, *others = nodes
    return jax.tree.map(
        lambda array, dims, *arrays: _join(path, dims, (array, *arrays)),
        first,
        first.dims(),
        *others,
    )


def _differences(first: Any, other: Any) -> str:
    """The settings in which two nodes of a kind differ, and both values."""
    pairs = {
        field.name: (getattr(first, field.name), getattr(other, field.name))
        for field in dataclasses.fields(first)
        if field.metadata.get("static")
    }
    unequal = [f"{name} ({a!r}, {b!r})" for name, (a, b) in pairs.items() if a != b]
    return " and ".join(unequal) or "which arrays they have"


def _join(path: str, dims: tuple[int | str | None, ...], arrays: Sequence[Any]) -> jax.Array:
    """The arrays stacked, their ranks padded to the largest."""
    for i, array in enumerate(arrays):
        lengths = zip(dims, arrays[0].shape, array.shape, strict=True)
        if any(d is not None and n != m for d, n, m in lengths):
            raise StructureError(
                f"factors 0 and {i} at {path!r} have arrays of shape {list(arrays[0].shape)} and "
                f"{list(array.shape)}, which differ in more than the rank; wanted factors of the "
                "same params."
            )
    longest = [max(lengths) for lengths in zip(*(a.shape for a in arrays), strict=True)]
    gaps = [[(0, m - n) for m, n in zip(longest, a.shape, strict=True)] for a in arrays]
    return jnp.stack([jnp.pad(a, gap) for a, gap in zip(arrays, gaps, strict=True)])
