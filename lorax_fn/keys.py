"""PRNG keys: checked, and folded so that each leaf has its own."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from lorax_fn.errors import LoraError


def fold_path(key: jax.Array, path: str) -> jax.Array:
    """The key of one leaf: the same for the same path, whatever other leaves there are."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def check_key(key: Any, name: str) -> jax.Array:
    """Returns a typed PRNG key.

    Raises:
        LoraError: unless `key` is one key, typed or of the old uint32 kind.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) and key.ndim == 0:
        return key
    if dtype == jnp.uint32 and key.shape == jax.random.key_data(jax.random.key(0)).shape:
        return jax.random.wrap_key_data(key)
    got = f"{dtype}{list(key.shape)}" if dtype is not None else f"{type(key).__name__} {key!r}"
    raise LoraError(f"{name} is {got[:80]}; wanted one PRNG key: jax.random.key(0).")
