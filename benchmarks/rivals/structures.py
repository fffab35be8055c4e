"""Small Linen models, each built another way, and what counts as adapting one.

A library adapts a structure if, with factors that are not zero, the model runs, answers otherwise
than without them, and gives each factor a finite gradient that is not all zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

WIDTH, EXPERTS, TOKENS = 8, 3, 12
Pytree = Any
# (factors, x) -> output, factors, x
Adapted = tuple[Callable[[Pytree, jax.Array], jax.Array], Pytree, jax.Array]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        return nn.tanh(nn.Dense(WIDTH, name="dense")(x)), None


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Layer(name="layer")(x)[0]


class Scan(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        over = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
        return nn.scan(Layer, **over)(name="layer")(x, None)[0]


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.remat(Layer)(name="layer")(x)[0]


class General(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.DenseGeneral((2, WIDTH // 2), name="dense")(x)
        return nn.DenseGeneral(WIDTH, axis=(-2, -1), name="dense_out")(nn.tanh(x))


class Embedding(nn.Module):
    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        return nn.Embed(TOKENS, WIDTH, name="dense")(ids)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        embed = nn.Embed(TOKENS, WIDTH, name="dense")
        return embed.attend(nn.tanh(embed(ids)))


class Convolution(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        return nn.Conv(WIDTH, (3, 3), strides=2, name="dense")(images)


class Experts(nn.Module):
    """Each expert has its own tokens, (experts, tokens, width)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (EXPERTS, WIDTH, WIDTH))
        return jnp.einsum("etd,edf->etf", x, kernel)


class Ragged(nn.Module):
    """All tokens in one array, sorted by expert."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (EXPERTS, WIDTH, WIDTH))
        return lax.ragged_dot(x, kernel, jnp.array([3, 0, 5]))


def draw(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)


IDS = jnp.arange(TOKENS)[None]
MODELS: dict[str, tuple[nn.Module, jax.Array]] = {
    "Dense": (Dense(), draw(4, WIDTH)),
    "scan over layers": (Scan(), draw(4, WIDTH)),
    "remat": (Remat(), draw(4, WIDTH)),
    "DenseGeneral": (General(), draw(4, WIDTH)),
    "embedding": (Embedding(), IDS),
    "tied output head": (Tied(), IDS),
    "convolution": (Convolution(), draw(2, 8, 8, 3)),
    "experts, einsum": (Experts(), draw(EXPERTS, 4, WIDTH)),
    "experts, ragged_dot": (Ragged(), draw(8, WIDTH)),
}


def attempt_all(adapt: Callable[[nn.Module, jax.Array], Adapted]) -> dict[str, str]:
    """Of each structure "yes", or why not."""
    return {name: attempt(lambda built=built: adapt(*built)) for name, built in MODELS.items()}


def attempt(adapt: Callable[[], Adapted]) -> str:
    """Says "yes", or why not."""
    try:
        return judge(*adapt())
    except Exception as error:  # noqa: BLE001 (whatever a library raises is the answer)
        first, *_ = str(error).strip().split("\n")
        return f"{type(error).__name__}: {first}"


def judge(apply: Callable[..., jax.Array], factors: Pytree, x: jax.Array) -> str:
    """Says "yes", or what is wrong with an adapted model that could be built."""
    if not jax.tree.leaves(factors):
        return "no factors were made"
    random = jax.tree.map(lambda leaf: 0.1 + 0.0 * leaf, factors)
    output, pull = jax.vjp(lambda factors: apply(factors, x), random)
    without = apply(jax.tree.map(jnp.zeros_like, factors), x)
    if not float(jnp.abs(output - without).max()) > 1e-6:
        return "the factors change nothing"
    for gradient in jax.tree.leaves(pull(jnp.ones_like(output))[0]):
        if not bool(jnp.isfinite(gradient).all()) or not float(jnp.abs(gradient).max()) > 0:
            return "a factor has no gradient"
    return "yes"
