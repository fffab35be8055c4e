"""Ways to draw A. B starts at zero, so that training starts at the base model.

Each has the signature of `jax.nn.initializers`: (key, shape, dtype) -> array, called with the shape
(fan_in, rank): fan-in counts contracted dims alone, never layers or experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def kaiming(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """U(±1/√fan_in): He et al. 2015 with a = √5, the default of Hugging Face PEFT."""
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def gaussian(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """N(0, 1/r²), PEFT's "gaussian"."""
    return jax.random.normal(key, shape, dtype) / shape[-1]


def orthogonal(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Orthonormal columns (Saxe et al. 2013)."""
    return jax.nn.initializers.orthogonal()(key, shape, jnp.float32).astype(dtype)


INITIALIZERS: dict[str, Initializer] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
}
