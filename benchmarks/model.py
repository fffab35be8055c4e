"""A small decoder-only transformer in Flax Linen, in four structures that real models come in.

    plain          layers unrolled in Python, attention by `nn.Dense` and a reshape
    scan           the same layers stacked by `nn.scan`: kernels gain a leading layer dim
    remat          the same layers unrolled, each under `nn.remat`
    dense_general  layers unrolled, attention by `nn.DenseGeneral`: kernels (d, heads, head_dim)

It knows nothing of LoRA. Whoever wants other layers passes another `dense`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

STRUCTURES = ("plain", "scan", "remat", "dense_general")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model; `dtype` is that of parameters and activations alike."""

    structure: str = "plain"
    layers: int = 4
    width: int = 256
    head_dim: int = 64
    vocabulary: int = 256
    dtype: Any = jnp.float32

    @property
    def heads(self) -> int:
        return max(1, self.width // self.head_dim)


def dense(config: Config, features: Sequence[int], *, inputs: int = 1, name: str) -> nn.Module:
    """A dense layer that sums over the last `inputs` dims of its input."""
    if len(features) == inputs == 1:
        return nn.Dense(features[0], name=name, **_dtypes(config))
    dims = tuple(range(-inputs, 0))
    return nn.DenseGeneral(tuple(features), dims, name=name, **_dtypes(config))


def _dtypes(config: Config) -> dict[str, Any]:
    return {"dtype": config.dtype, "param_dtype": config.dtype}


class Attention(nn.Module):
    config: Config
    dense: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, split = self.config, (self.config.heads, self.config.width // self.config.heads)
        general = config.structure == "dense_general"

        def project(name: str) -> jax.Array:  # (batch, length, heads, head_dim)
            if general:
                return self.dense(config, split, name=name)(x)
            return self.dense(config, (config.width,), name=name)(x).reshape(*x.shape[:-1], *split)

        query, key, value = project("query"), project("key"), project("value")
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        if general:
            return self.dense(config, (config.width,), inputs=2, name="out")(mixed)
        return self.dense(config, (config.width,), name="out")(mixed.reshape(x.shape))


class Block(nn.Module):
    config: Config
    dense: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        config = self.config
        norm = lambda name: nn.LayerNorm(name=name, **_dtypes(config))
        x = x + Attention(config, self.dense, name="attention")(norm("attention_norm")(x))
        hidden = self.dense(config, (4 * config.width,), name="up")(norm("mlp_norm")(x))
        return x + self.dense(config, (config.width,), name="down")(nn.gelu(hidden)), None


class Transformer(nn.Module):
    config: Config
    dense: Callable[..., nn.Module] = dense

    @nn.compact
    def __call__(self, tokens: jax.Array, nudge: jax.Array | None = None) -> jax.Array:
        """Logits (batch, length, vocabulary) of tokens (batch, length).

        `nudge` (batch, length, width) is added to the first layer's input. Its gradient is what a
        backward pass costs that trains nothing.
        """
        config, dtypes = self.config, _dtypes(self.config)
        x = nn.Embed(config.vocabulary, config.width, name="embed", **dtypes)(tokens)
        x = x if nudge is None else x + nudge
        if config.structure == "scan":
            layers = nn.scan(
                Block,
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True},
                length=config.layers,
            )
            x, _ = layers(config, self.dense, name="layers")(x, None)
        else:
            block = nn.remat(Block) if config.structure == "remat" else Block
            for i in range(config.layers):
                x, _ = block(config, self.dense, name=f"layer_{i}")(x, None)
        x = nn.LayerNorm(name="norm", **dtypes)(x)
        return self.dense(config, (config.vocabulary,), name="head")(x)
