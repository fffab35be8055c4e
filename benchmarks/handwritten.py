"""LoRA written by hand into the layers, as one would write it for one's own model.

`x @ W + b + scale * ((x @ A) @ B)`, with A and B in a Flax collection of their own, "lora", so
that the gradient with respect to it is all that a step computes. Layers keep their parameters'
names: the plain model's variables fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.model import Config, dense


@dataclasses.dataclass(frozen=True)
class LoRALayers:
    """Makes a `LoRADense` of each layer named in `targets`, a plain layer of the others."""

    targets: tuple[str, ...]
    rank: int
    scale: float

    def __call__(
        self, config: Config, features: Sequence[int], *, inputs: int = 1, name: str
    ) -> nn.Module:
        if name not in self.targets:
            return dense(config, features, inputs=inputs, name=name)
        return LoRADense(config, tuple(features), inputs, self.rank, self.scale, name=name)


class LoRADense(nn.Module):
    """A dense layer over the last `inputs` dims, with a low-rank term beside its kernel."""

    config: Config
    features: tuple[int, ...]
    inputs: int
    rank: int
    scale: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype, summed = self.config.dtype, x.shape[x.ndim - self.inputs :]
        kernel_shape = (*summed, *self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), kernel_shape, dtype)
        bias = self.param("bias", nn.initializers.zeros, self.features, dtype)
        a = self._factor("a", (*summed, self.rank)).astype(dtype)
        b = self._factor("b", (self.rank, *self.features)).astype(dtype)
        low_rank = jnp.tensordot(jnp.tensordot(x, a, self.inputs), b, 1)
        return jnp.tensordot(x, kernel, self.inputs) + bias + self.scale * low_rank

    def _factor(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        return self.variable("lora", name, jnp.zeros, shape, jnp.float32).value


def add_up(params: Any, lora: Any, scale: float) -> Any:
    """Params with every kernel replaced by W + scale * A·B: one matrix to apply, and to store."""
    if "a" in lora:
        return params | {"kernel": _sum(params["kernel"], lora["a"], lora["b"], scale)}
    return {
        name: add_up(sub, lora[name], scale) if name in lora else sub
        for name, sub in params.items()
    }


def _sum(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    product = lambda a, b: jnp.tensordot(a, b, 1)
    if a.ndim + b.ndim - 2 > kernel.ndim:  # layers stacked by nn.scan, in both factors
        product = jax.vmap(product)
    return (kernel + scale * product(a, b)).astype(kernel.dtype)
