"""Factors that start from the weight itself: PiSSA and OLoRA.

PiSSA (Meng et al. 2024, arXiv:2404.02948) takes the top singular triplets of W, OLoRA (Büyükakyüz
2024, arXiv:2406.01775) the first columns of its QR decomposition. Both then train on W - s·A·B; the
adapter holds that second product, so that the base is never changed.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from lorax_fn.adapters.low_rank import check_abstract
from lorax_fn.adapters.matrices import as_factors, as_matrices
from lorax_fn.axes import Axes

SPECTRAL = re.compile(r"pissa(_niter_(?P<iterations>[0-9]+))?|olora")
OVERSAMPLING = 10  # more columns than the rank, in the range finder of the randomised SVD


def start_from(
    name: str,
    key: jax.Array,
    path: str,
    leaf: Any,
    axes: Axes,
    *,
    rank: int,
    scale: float,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """(a, b), shaped as factors are; s·a·b is the part of the weight that the method trains."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        check_abstract(path, key)
        leaf = jnp.zeros(leaf.shape, leaf.dtype)
    matrices = as_matrices(leaf, axes)  # (batch, contract, out)
    keys = jax.random.split(key, len(matrices))
    with jax.default_matmul_precision("highest"):
        a, b = jax.vmap(lambda k, w: _start(name, k, w, rank, scale))(keys, matrices)
    a, b = as_factors(a, b, leaf.shape, axes)
    return a.astype(dtype), b.astype(dtype)


def _start(
    name: str, key: jax.Array, w: jax.Array, rank: int, scale: float
) -> tuple[jax.Array, jax.Array]:
    """a (in, r) and b (r, out) of one matrix (in, out)."""
    if name == "olora":
        q, r = jnp.linalg.qr(w.T)  # (out, k), (k, in)
        return r[:rank].T, q[:, :rank].T
    found = SPECTRAL.fullmatch(name)
    iterations = found and found["iterations"]
    if iterations is None:
        u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    else:
        u, s, vt = randomised_svd(key, w, rank, int(iterations))
    root = jnp.sqrt(s[:rank] / scale)  # so that scale·a·b is what was taken
    return u[:, :rank] * root[None], root[:, None] * vt[:rank]


def randomised_svd(
    key: jax.Array, w: jax.Array, rank: int, iterations: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The top singular triplets of a matrix (Halko et al. 2011, arXiv:0909.4061, algorithm 5.1).

    Costs (2·iterations + 2) products of w with rank + 10 vectors, in place of a whole SVD.
    """
    columns = min(rank + OVERSAMPLING, *w.shape)
    q = jnp.linalg.qr(w @ jax.random.normal(key, (w.shape[1], columns), w.dtype))[0]
    for _ in range(iterations):
        q = jnp.linalg.qr(w.T @ q)[0]
        q = jnp.linalg.qr(w @ q)[0]
    u, s, vt = jnp.linalg.svd(q.T @ w, full_matrices=False)
    return q @ u, s, vt
