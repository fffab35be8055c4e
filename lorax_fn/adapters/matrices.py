"""Weights and factors as matrices, one for each index of the batch dims, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax_fn.adapters.low_rank import split_shape
from lorax_fn.axes import Axes


def as_matrices(leaf: Any, axes: Axes) -> jax.Array:
    """A weight as (batch, contract, out), in float32."""
    batch, contract, out = map(math.prod, split_shape(leaf.shape, axes))
    order = (*axes.batch, *axes.contract, *axes.out)
    return jnp.transpose(leaf.astype(jnp.float32), order).reshape(batch, contract, out)


def as_columns(a: jax.Array, axes: Axes) -> jax.Array:
    """A factor (batch dims…, contract dims…, r) as (batch, contract, r)."""
    n_batch = len(axes.batch)
    return a.reshape(math.prod(a.shape[:n_batch]), -1, a.shape[-1])


def as_rows(b: jax.Array, axes: Axes) -> jax.Array:
    """A factor (batch dims…, r, out dims…) as (batch, r, out)."""
    n_batch = len(axes.batch)
    return b.reshape(math.prod(b.shape[:n_batch]), b.shape[n_batch], -1)


def as_factors(
    columns: jax.Array, rows: jax.Array, shape: Sequence[int], axes: Axes
) -> tuple[jax.Array, jax.Array]:
    """(batch, contract, r) and (batch, r, out) as the factors of a weight of this shape."""
    batch, contract, out = split_shape(shape, axes)
    rank = columns.shape[-1]
    return columns.reshape(*batch, *contract, rank), rows.reshape(*batch, rank, *out)


def product_svd(columns: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The SVD of columns·rows, (batch, contract, r)·(batch, r, out), without forming the product.

    Two QR decompositions leave a core of r × r to decompose: O((contract + out)·r²).

    Returns:
        u (batch, contract, k), s (batch, k) falling, vt (batch, k, out), for the rank k that the
        shapes allow: min(contract, r, out) at most.
    """
    with jax.default_matmul_precision("highest"):
        q, left = jnp.linalg.qr(columns)  # (batch, contract, i), (batch, i, r)
        p, right = jnp.linalg.qr(jnp.swapaxes(rows, -1, -2))  # (batch, out, j), (batch, j, r)
        core = left @ jnp.swapaxes(right, -1, -2)  # (batch, i, j)
        u, s, vt = jnp.linalg.svd(core, full_matrices=False)
        return q @ u, s, vt @ jnp.swapaxes(p, -1, -2)
