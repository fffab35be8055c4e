"""all-MiniLM-L6-v2 in Flax Linen: BERT encoder, mean pooling, L2 norm; and a classifier on top.

Parameters are named as in Hugging Face's Flax BERT (`encoder/layer/0/attention/self/query/kernel`),
so the published weights load by a change of spelling alone (`weights.py`). There is no LoRA in
here, and no dropout: the model is an ordinary function of its params.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Config:
    """The architecture; the defaults are the published model's."""

    vocab_size: int = 30522
    max_positions: int = 512
    token_types: int = 2
    width: int = 384
    layers: int = 6
    heads: int = 12
    mlp_width: int = 1536
    norm_eps: float = 1e-12

    @property
    def feature_scale(self) -> float:
        """What brings the entries of a unit vector, about 1/√width, to about 1 for a head."""
        return self.width**0.5


def layer_norm(config: Config) -> nn.LayerNorm:
    """BERT's layer norm; the two-pass variance is the one the reference computes."""
    return nn.LayerNorm(epsilon=config.norm_eps, use_fast_variance=False, name="LayerNorm")


class Embeddings(nn.Module):
    """Token, position and type embeddings, summed and normalised."""

    config: Config

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        c = self.config
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        x = nn.Embed(c.vocab_size, c.width, name="word_embeddings")(ids)
        x += nn.Embed(c.max_positions, c.width, name="position_embeddings")(positions)
        x += nn.Embed(c.token_types, c.width, name="token_type_embeddings")(jnp.zeros_like(ids))
        return layer_norm(c)(x)  # (batch, time, width)


class SelfAttention(nn.Module):
    """Multi-head attention without the output projection."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        c = self.config
        heads = (*x.shape[:2], c.heads, c.width // c.heads)
        query, key, value = (
            nn.Dense(c.width, name=name)(x).reshape(heads) for name in ("query", "key", "value")
        )
        attended = jax.nn.dot_product_attention(
            query, key, value, mask=mask[:, None, None, :]
        )  # (batch, time, heads, head width)
        return attended.reshape(x.shape)


class Projection(nn.Module):
    """Project back to the model's width, add the residual, normalise."""

    config: Config

    @nn.compact
    def __call__(self, hidden: jax.Array, residual: jax.Array) -> jax.Array:
        return layer_norm(self.config)(residual + nn.Dense(self.config.width, name="dense")(hidden))


class Attention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        attended = SelfAttention(self.config, name="self")(x, mask)
        return Projection(self.config, name="output")(attended, x)


class Intermediate(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.gelu(nn.Dense(self.config.mlp_width, name="dense")(x), approximate=False)


class Layer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = Attention(self.config, name="attention")(x, mask)
        hidden = Intermediate(self.config, name="intermediate")(x)  # (batch, time, mlp width)
        return Projection(self.config, name="output")(hidden, x)


class Layers(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        for i in range(self.config.layers):
            x = Layer(self.config, name=str(i))(x, mask)
        return x


class Stack(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        return Layers(self.config, name="layer")(x, mask)


class SentenceEncoder(nn.Module):
    """Token ids and their mask, both (batch, time), to unit vectors (batch, width)."""

    config: Config = Config()

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        x = Embeddings(self.config, name="embeddings")(ids)
        x = Stack(self.config, name="encoder")(x, mask.astype(bool))
        return pool(x, mask)


def pool(x: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of the tokens (batch, time, width) that count, as a unit vector (batch, width)."""
    weights = mask.astype(x.dtype)[:, :, None]
    pooled = (x * weights).sum(1) / weights.sum(1)
    return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)


class Classifier(nn.Module):
    """A linear head on the sentence embedding: logits (batch, classes)."""

    classes: int
    config: Config = Config()

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        embedding = SentenceEncoder(self.config, name="bert")(ids, mask)
        features = embedding * self.config.feature_scale
        return nn.Dense(self.classes, name="classifier")(features)
