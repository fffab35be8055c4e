"""Merging task vectors: several changes of one array, thinned out and summed.

    method           each is thinned out      then
    linear           not at all               Σ wᵢ·τᵢ
    magnitude_prune  to its largest entries   Σ wᵢ·τᵢ
    dare_linear      at random, rescaled      Σ wᵢ·τᵢ
    ties             to its largest entries   Σ wᵢ·τᵢ / n over those n that have the majority's sign
    dare_ties        at random, rescaled      the same

TIES is Yadav et al. 2023 (arXiv:2306.01708), DARE Yu et al. 2023 (arXiv:2311.03099). As in PEFT,
the majority's sign is that of the unweighted sum (or count, "frequency"); plus, where it is zero.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

METHODS = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")


def merge(
    method: str,
    vectors: jax.Array,
    weights: jax.Array,
    density: float | None,
    majority_sign_method: str,
    key: jax.Array | None,
) -> jax.Array:
    """One array of the vectors (adapters, …), for weights (adapters,)."""
    if density is not None and key is not None:
        keys = jax.random.split(key, len(vectors))
        dropped = [_drop(k, vector, density) for k, vector in zip(keys, vectors, strict=True)]
        vectors = jnp.stack(dropped)
    elif density is not None:
        vectors = jnp.stack([_keep_largest(vector, density) for vector in vectors])
    weighted = vectors * weights.reshape(-1, *[1] * (vectors.ndim - 1))
    if not method.endswith("ties"):
        return weighted.sum(0)
    signs = jnp.sign(vectors)
    votes = vectors if majority_sign_method == "total" else signs
    majority = jnp.where(votes.sum(0) >= 0, 1, -1).astype(signs.dtype)
    agrees = (signs == majority[None]).astype(weighted.dtype)
    return (weighted * agrees).sum(0) / jnp.maximum(agrees.sum(0), 1)


def _keep_largest(vector: jax.Array, density: float) -> jax.Array:
    """The vector with all but that share of its entries, the largest, at zero."""
    flat = vector.ravel()
    _, kept = jax.lax.top_k(jnp.abs(flat), int(density * flat.size))
    return jnp.zeros_like(flat).at[kept].set(flat[kept]).reshape(vector.shape)


def _drop(key: jax.Array, vector: jax.Array, density: float) -> jax.Array:
    """The vector with each entry kept by that probability and divided by it, or else zero."""
    kept = jax.random.bernoulli(key, density, vector.shape)
    return jnp.where(kept, vector / density, 0)
