"""Arithmetic on the nodes of one leaf: LoRA factors summed exactly, truncated, or merged.

Within, A is a stack of matrices (batch, contract, r) and B one of (batch, r, out), in float32 or
wider: each layer and expert of a weight is a matrix of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax_fn import task_vectors
from lorax_fn.adapters import FullDelta, LoRAFactors, is_adapter
from lorax_fn.adapters.matrices import as_columns, as_rows, product_svd
from lorax_fn.errors import StructureError
from lorax_fn.interpreter import wide_dtype
from lorax_fn.keys import fold_path

Nodes = Sequence[LoRAFactors]
Weights = Sequence[jax.Array]


class Recipe(NamedTuple):
    """How to combine: the options of `combine`, checked."""

    method: str
    rank: int | None
    density: float | None
    majority_sign_method: str
    key: jax.Array | None

    def at(self, path: str) -> Recipe:
        """The recipe with the leaf's own key."""
        return self if self.key is None else self._replace(key=fold_path(self.key, path))

    def merge(self, vectors: jax.Array, weights: jax.Array) -> jax.Array:
        """Merges (adapters, batch, …) as task vectors, each index of batch by itself."""
        keys = None if self.key is None else jax.random.split(self.key, vectors.shape[1])

        def merge(key: Any, vectors: jax.Array) -> jax.Array:
            method = self.method.removesuffix("_svd")
            return task_vectors.merge(
                method, vectors, weights, self.density, self.majority_sign_method, key
            )

        return jax.vmap(merge, (0, 1))(keys, vectors)


def combine_nodes(recipe: Recipe, path: str, nodes: Sequence[Any], weights: Weights) -> Any:
    """The node that the nodes at one path make, all of them LoRA or all of them Full."""
    check_alike(path, nodes)
    recipe = recipe.at(path)
    if isinstance(nodes[0], FullDelta):
        deltas = jnp.stack([node.delta for node in nodes])[:, None]
        return FullDelta(recipe.merge(deltas, jnp.stack(weights).astype(deltas.dtype))[0])
    plain = [node.plain() for node in nodes]
    if recipe.method == "cat":
        return with_matrices(plain[0], *_side_by_side(plain, weights))
    if "svd" not in recipe.method:
        return _factors_merged(recipe, path, plain, weights)
    rank = recipe.rank or max(node.rank for node in plain)
    if recipe.method == "svd":
        return truncated(plain[0], *product_svd(*_side_by_side(plain, weights)), rank)
    return truncated(plain[0], *_svd_of_merged(recipe, plain, weights), rank)


def _side_by_side(nodes: Nodes, weights: Weights) -> tuple[jax.Array, jax.Array]:
    """Matrices whose product is the weighted sum, (batch, contract, Σr) and (batch, Σr, out)."""
    parts = [matrices(n, n.scale * w) for n, w in zip(nodes, weights, strict=True)]
    columns, rows = zip(*parts, strict=True)
    return jnp.concatenate(columns, -1), jnp.concatenate(rows, -2)


def _svd_of_merged(
    recipe: Recipe, nodes: Nodes, weights: Weights
) -> tuple[jax.Array, jax.Array, jax.Array]:
    with jax.default_matmul_precision("highest"):
        changes = jnp.stack([jnp.matmul(*matrices(n, n.scale)) for n in nodes])
        merged = recipe.merge(changes, jnp.stack(weights).astype(changes.dtype))
        u, s, vt = jnp.linalg.svd(merged, full_matrices=False)
    return u, s, vt


def _factors_merged(recipe: Recipe, path: str, nodes: Nodes, weights: Weights) -> LoRAFactors:
    """The As merged and the Bs merged, each with the root of its weight, the sign with A."""
    ranks = [node.rank for node in nodes]
    if len(set(ranks)) > 1:
        raise StructureError(
            f"the adapters have ranks {ranks} at {path!r}; wanted the same for method="
            f"{recipe.method!r}. Use method='cat' or one with 'svd', or lora.resize them first."
        )
    columns, rows = (jnp.stack(x) for x in zip(*(matrices(n, 1.0) for n in nodes), strict=True))
    scaled = jnp.stack([w * n.scale for n, w in zip(nodes, weights, strict=True)])
    root = jnp.sqrt(jnp.abs(scaled)).astype(columns.dtype)
    of_b = recipe if recipe.key is None else recipe.at("b")
    a = recipe.merge(columns, jnp.where(scaled < 0, -root, root))
    return with_matrices(nodes[0], a, of_b.merge(rows, root))


def matrices(node: LoRAFactors, amount: Any) -> tuple[jax.Array, jax.Array]:
    """A (batch, contract, r) and amount·B (batch, r, out), in float32 or wider."""
    wide = wide_dtype(jnp.result_type(node.a, node.b))
    a, b = as_columns(node.a, node.axes).astype(wide), as_rows(node.b, node.axes).astype(wide)
    return a, times(b, amount)


def with_matrices(like: LoRAFactors, a: jax.Array, b: jax.Array) -> LoRAFactors:
    """A node for the same weight with these (batch, contract, r) and (batch, r, out), scale 1."""
    n_batch, rank = len(like.axes.batch), a.shape[-1]
    a = a.reshape(*like.a.shape[:-1], rank).astype(like.a.dtype)
    b = b.reshape(*like.b.shape[:n_batch], rank, *like.b.shape[n_batch + 1 :]).astype(like.b.dtype)
    return dataclasses.replace(like, a=a, b=b, scale=1.0)


def truncated(
    like: LoRAFactors, u: jax.Array, s: jax.Array, vt: jax.Array, rank: int
) -> LoRAFactors:
    """The node of the first triplets, the root of each singular value on either side."""
    root = jnp.sqrt(s[:, :rank])  # (batch, k)
    gap = (0, max(rank - s.shape[-1], 0))
    a = jnp.pad(u[:, :, :rank] * root[:, None], ((0, 0), (0, 0), gap))
    b = jnp.pad(root[:, :, None] * vt[:, :rank], ((0, 0), gap, (0, 0)))
    return with_matrices(like, a, b)


def times(array: jax.Array, amount: Any) -> jax.Array:
    """The array times a number, multiplied in float32 or wider."""
    is_complex = jnp.issubdtype(array.dtype, jnp.complexfloating)
    wide = array.dtype if is_complex else wide_dtype(array.dtype)
    return (array.astype(wide) * jnp.asarray(amount, wide)).astype(array.dtype)


def check_sums(path: str, node: Any) -> Any:
    """Returns the node.

    Raises:
        StructureError: unless it is of a kind that arithmetic is defined on.
    """
    if type(node) in (LoRAFactors, FullDelta):
        return node
    if not is_adapter(node):
        raise StructureError(
            f"{path!r} holds a {type(node).__name__}; wanted factors, which lora.init makes."
        )
    raise StructureError(
        f"{path!r} is adapted by {node.kind}; arithmetic is defined on LoRA and Full, whose "
        "changes are sums. Merge the adapters, and do arithmetic on the merged params instead."
    )


def check_alike(path: str, nodes: Sequence[Any]) -> None:
    """Raises `StructureError` unless nodes are of one kind, for a weight of one shape."""

    def kind_and_shape(node: Any) -> Any:
        if isinstance(node, FullDelta):
            return "Full", node.delta.shape
        n_batch = len(node.axes.batch)
        return "LoRA", node.axes, node.a.shape[:-1], node.b.shape[n_batch + 1 :]

    for i, node in enumerate(nodes):
        ours, theirs = kind_and_shape(nodes[0]), kind_and_shape(node)
        if ours != theirs:
            raise StructureError(
                f"at {path!r} the adapters 0 and {i} of those that adapt it are {ours} and "
                f"{theirs}; wanted the same kind, for the same weight."
            )
