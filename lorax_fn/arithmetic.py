"""Adapter arithmetic: several adapters of one base as one, scaled, subtracted, of another rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax_fn import task_vectors
from lorax_fn.adapters import Adapter, FullDelta, is_adapter
from lorax_fn.adapters.low_rank import check_rank, is_finite
from lorax_fn.adapters.matrices import product_svd
from lorax_fn.errors import LoraError
from lorax_fn.keys import check_key
from lorax_fn.node_arithmetic import (
    Recipe,
    check_sums,
    combine_nodes,
    matrices,
    times,
    truncated,
)
from lorax_fn.pairing import align
from lorax_fn.paths import map_with_paths

Pytree = Any

METHODS = (
    "cat",
    "svd",
    *task_vectors.METHODS,
    *(f"{name}_svd" for name in task_vectors.METHODS if name != "linear"),
)


def combine(
    adapters: Sequence[Pytree],
    weights: Any,
    *,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    key: jax.Array | None = None,
) -> Pytree:
    """Makes one adapter of several, weighted; the methods have the names and formulas of PEFT.

    "cat"
        Σ wᵢ·ΔWᵢ, exact; the ranks add up.
    "svd"
        The best approximation of Σ wᵢ·ΔWᵢ of the asked rank. From the factors: no ΔW is formed.
    "linear"
        (Σ ±√wᵢ·Aᵢ)·(Σ √wᵢ·Bᵢ), with the scales in wᵢ, of adapters of one rank. Has cross terms: it
        is not Σ wᵢ·ΔWᵢ.
    "magnitude_prune", "ties", "dare_linear", "dare_ties"
        What they do to task vectors (TIES arXiv:2306.01708, DARE arXiv:2311.03099; formulas in
        `task_vectors.py`), done to the As and to the Bs, with the weights of "linear". "dare" is
        short for "dare_linear".
    "magnitude_prune_svd", "ties_svd", "dare_linear_svd", "dare_ties_svd"
        The same done to the ΔWs, as in the papers, then cut to the asked rank. Forms ΔW and
        decomposes it, one leaf at a time.

    Where a leaf is adapted by some of them only, those are combined. Each layer and expert of a
    stack is combined by itself. `Full` changes are task vectors as they are, and get what the
    method does to those: Σ wᵢ·Δᵢ by "cat", "linear" and "svd". Scales end up in the factors, which
    then have scale 1; other settings (dtype, dropout) are the first adapter's.

    Args:
        adapters: factors of the same params, of LoRA and Full nodes. What PiSSA and its kin take
            off the weight is part of their change: [A, A₀], [B, -B₀].
        weights: one number for each, also negative; may be traced.
        method: one of the above.
        rank: of the result, for methods with "svd"; None means the largest of the adapters' ranks.
        density: the share of the entries to keep, in (0, 1], for the methods that drop any.
        majority_sign_method: "total" or "frequency": whether entries vote for a sign with their
            size, for the methods with "ties".
        key: a PRNG key, for the methods with "dare".

    Returns:
        Factors of the same structure.

    Raises:
        LoraError: if the adapters are none, or an option is missing, out of range, or does not
            belong to the method.
        StructureError: if the adapters belong to different params, hold other kinds, or have ranks
            that the method cannot combine.

    >>> import jax, jax.numpy as jnp, lorax_fn as lora
    >>> params, key = {"w": jnp.ones((4, 3))}, jax.random.key(0)
    >>> f, g = (lora.init(key, params, [lora.LoRA("w", rank=r, alpha=4)]) for r in (1, 2))
    >>> lora.combine([f, g], [0.7, -0.3], method="cat")["w"].a.shape
    (4, 3)
    """
    recipe = _checked(method, rank, density, majority_sign_method, key)
    treedef, places = align(adapters)
    amounts = _weights(weights, len(adapters))
    combined = [_combined(recipe, path, nodes, amounts) for path, nodes in places]
    return jax.tree.unflatten(treedef, combined)


def subtract(f: Pytree, g: Pytree) -> Pytree:
    """The adapter whose change is that of `f` less that of `g`, exactly; the ranks add up.

    Raises:
        StructureError: if they belong to different params, or hold nodes of kinds other than LoRA
            and Full.

    >>> import jax, jax.numpy as jnp, lorax_fn as lora
    >>> f = lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, [lora.LoRA("w", rank=1)])
    >>> lora.subtract(f, f)["w"].rank
    2
    """
    return combine([f, g], [1.0, -1.0], method="cat")


def scale(factors: Pytree, by: Any) -> Pytree:
    """The adapter whose change is `by` times that of `factors`.

    By -1 it negates a task: the model unlearns it (Ilharco et al. 2022, arXiv:2212.04089).

    Args:
        factors: of LoRA and Full nodes.
        by: a number; may be traced, since B is multiplied, and the nodes' scale stays.

    Raises:
        LoraError: if `by` is no finite number.
        StructureError: if factors hold nodes of other kinds.

    >>> import jax, jax.numpy as jnp, lorax_fn as lora
    >>> params = {"w": jnp.ones((4, 3))}
    >>> f = jax.tree.map(
    ...     jnp.ones_like, lora.init(jax.random.key(0), params, [lora.LoRA("w", rank=2)])
    ... )
    >>> float(lora.scale(f, -0.5)["w"].b[0, 0])
    -0.5
    """
    (amount,) = _weights([by], 1)

    def scaled(path: str, node: Any) -> Adapter:
        node = check_sums(path, node)
        if isinstance(node, FullDelta):
            return FullDelta(times(node.delta, amount))
        start = node.start and (node.start[0], times(node.start[1], amount))
        return dataclasses.replace(node, b=times(node.b, amount), start=start)

    return map_with_paths(scaled, factors, is_leaf=is_adapter)


def resize(factors: Pytree, rank: int) -> tuple[Pytree, dict[str, jax.Array]]:
    """The adapter of another rank that comes nearest (truncated SVD), and how far off it is.

    The SVD is computed from the factors at O((contract + out)·r²); no ΔW is formed. A rank above a
    node's own is filled up with zeros. Full nodes stay as they are.

    Args:
        factors: of LoRA and Full nodes.
        rank: the new r, for every LoRA node.

    Returns:
        The factors, with the singular values shared evenly between A and B, and for the path of
        each LoRA node the relative error ‖ΔW - ΔW'‖/‖ΔW‖ (Frobenius; 0 where ΔW is zero), an array
        of the leaf's batch dims: one number for each layer and expert.

    Raises:
        LoraError: if rank is no positive integer.
        StructureError: if factors hold nodes of other kinds.

    >>> import jax, jax.numpy as jnp, lorax_fn as lora
    >>> f = lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, [lora.LoRA("w", rank=2)])
    >>> smaller, errors = lora.resize(f, 1)
    >>> smaller["w"].rank, float(errors["w"])
    (1, 0.0)
    """
    check_rank(rank)
    errors = {}

    def resized(path: str, node: Any) -> Adapter:
        node = check_sums(path, node)
        if isinstance(node, FullDelta):
            return node
        plain = node.plain()
        u, s, vt = product_svd(*matrices(plain, plain.scale))
        total, lost = (jnp.linalg.norm(x, axis=-1) for x in (s, s[:, rank:]))
        relative = jnp.where(total > 0, lost / jnp.where(total > 0, total, 1), 0)
        errors[path] = relative.reshape(node.a.shape[: len(node.axes.batch)])
        return truncated(plain, u, s, vt, rank)

    return map_with_paths(resized, factors, is_leaf=is_adapter), errors


def _combined(recipe: Recipe, path: str, nodes: Sequence[Any], weights: jax.Array) -> Any:
    """The node of one path, of those adapters that have one."""
    pairs = zip(nodes, weights, strict=True)
    present = [(check_sums(path, node), weight) for node, weight in pairs if node is not None]
    return combine_nodes(recipe, path, *zip(*present, strict=True)) if present else None


def _weights(weights: Any, n: int) -> jax.Array:
    """The weights as an array (n,)."""
    try:
        array = jnp.asarray(weights, jnp.float32)
    except (TypeError, ValueError) as e:
        raise LoraError(f"got {weights!r} for weights; wanted {n} numbers.") from e
    if array.shape != (n,):
        raise LoraError(f"got {list(array.shape)} weights for {n} adapters; wanted one for each.")
    if not isinstance(array, jax.core.Tracer) and not bool(jnp.isfinite(array).all()):
        raise LoraError(f"the weights {weights!r} are not all finite.")
    return array


def _checked(method: Any, rank: Any, density: Any, majority_sign_method: Any, key: Any) -> Recipe:
    method = "dare_linear" if method == "dare" else method
    if method not in METHODS:
        raise LoraError(f"method={method!r} is unknown; wanted one of {list(METHODS)}.")
    prunes, draws = "ties" in method or "dare" in method or "prune" in method, "dare" in method
    for name, value, belongs in (
        ("rank", rank, "svd" in method),
        ("density", density, prunes),
        ("key", key, draws),
    ):
        if value is not None and not belongs:
            raise LoraError(f"method={method!r} takes no {name}; leave it out.")
    if rank is not None:
        check_rank(rank)
    if prunes and not (is_finite(density) and 0 < density <= 1):
        raise LoraError(
            f"density={density!r}: method={method!r} keeps a share of the entries; wanted a number "
            "in (0, 1], such as density=0.5."
        )
    if majority_sign_method not in ("total", "frequency"):
        raise LoraError(
            f"majority_sign_method={majority_sign_method!r} is unknown; wanted 'total' or "
            "'frequency'."
        )
    if draws:
        key = check_key(key, "key")
    return Recipe(method, rank, density, majority_sign_method, key)
