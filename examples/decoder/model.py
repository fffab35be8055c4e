"""A small decoder-only transformer in Flax Linen: layers under `nn.scan`, embeddings tied.

There is no LoRA in here: the model is an ordinary function of its params.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    """Pre-norm causal attention and MLP; a carry and no output, as `nn.scan` wants it."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        width = x.shape[-1]
        split = (*x.shape[:2], self.heads, width // self.heads)
        normal = nn.LayerNorm(use_bias=False, name="attention_norm")(x)
        query, key, value = (
            nn.Dense(width, use_bias=False, name=name)(normal).reshape(split)
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True).reshape(x.shape)
        x = x + nn.Dense(width, use_bias=False, name="out")(mixed)
        normal = nn.LayerNorm(use_bias=False, name="mlp_norm")(x)
        hidden = nn.gelu(nn.Dense(4 * width, use_bias=False, name="up")(normal))
        return x + nn.Dense(width, use_bias=False, name="down")(hidden), None


class Decoder(nn.Module):
    """Tokens (batch, length) to logits of the next ones (batch, length, vocabulary)."""

    vocabulary: int
    width: int = 128
    layers: int = 3
    heads: int = 4
    longest: int = 128

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(self.vocabulary, self.width, name="embed")
        x = embed(tokens)
        x += nn.Embed(self.longest, self.width, name="positions")(jnp.arange(tokens.shape[1]))
        layers = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
        )
        x, _ = layers(self.heads, name="layers")(x, None)
        return embed.attend(nn.LayerNorm(use_bias=False, name="norm")(x))
