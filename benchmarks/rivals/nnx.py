"""`nnx.LoRA`: the model is written with `nnx.LoRALinear` in place of `nnx.Linear`.

It has no alpha: its B holds alpha/rank · B.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.rivals import structures as shapes
from benchmarks.rivals.jax_step import JaxStep
from benchmarks.rivals.problem import HEAD_DIM, Problem, Sizes


class Block(nnx.Module):
    def __init__(self, sizes: Sizes, rngs: nnx.Rngs) -> None:
        width = sizes.width
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        for name, n_in, n_out in (
            *((name, width, width) for name in ("query", "key", "value", "out")),
            ("up", width, 4 * width),
            ("down", 4 * width, width),
        ):
            setattr(self, name, nnx.LoRALinear(n_in, n_out, lora_rank=sizes.rank, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        heads = (*x.shape[:-1], max(1, x.shape[-1] // HEAD_DIM), -1)
        normal = self.attention_norm(x)
        query, key, value = (f(normal).reshape(heads) for f in (self.query, self.key, self.value))
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Transformer(nnx.Module):
    """`benchmarks.model.Transformer`, plain, in NNX."""

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(sizes.vocabulary, sizes.width, rngs=rngs)
        self.layers = nnx.List([Block(sizes, rngs) for _ in range(sizes.layers)])
        self.norm = nnx.LayerNorm(sizes.width, rngs=rngs)
        self.head = nnx.LoRALinear(sizes.width, sizes.vocabulary, lora_rank=sizes.rank, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Step(JaxStep):
    def build(self, problem: Problem) -> tuple[Any, Any, Callable[..., jax.Array]]:
        model = Transformer(problem.sizes, nnx.Rngs(0))
        for path, weight in problem.weights.items():
            _set(model, path, weight)
        for path, a in problem.a.items():
            _set(model, path.replace("kernel", "lora/lora_a"), a)
            b = problem.sizes.scale * problem.b[path]
            _set(model, path.replace("kernel", "lora/lora_b"), b)
        graph, trained, frozen = nnx.split(model, nnx.LoRAParam, ...)
        return trained, frozen, lambda t, f, tokens: nnx.merge(graph, t, f)(tokens)


def _set(model: nnx.Module, path: str, value: Any) -> None:
    node: Any = model
    *parents, name = path.replace("layer_", "layers/").replace("attention/", "").split("/")
    for parent in parents:
        node = node[int(parent)] if parent.isdecimal() else getattr(node, parent)
    getattr(node, name)[...] = jnp.asarray(value)


def structures() -> dict[str, str]:
    """Which structures `nnx.LoRA` or `nnx.LoRALinear` can stand in or beside."""
    linear = lambda rngs: nnx.LoRALinear(shapes.WIDTH, shapes.WIDTH, lora_rank=2, rngs=rngs)
    beside = lambda base, n_in, n_out: nnx.LoRA(n_in, 2, n_out, base_module=base, rngs=nnx.Rngs(1))
    width, inputs = shapes.WIDTH, {name: x for name, (_, x) in shapes.MODELS.items()}
    rngs = nnx.Rngs(0)

    def scanned(model: nnx.Module, x: jax.Array) -> jax.Array:
        over = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return over(x, model)

    def stack() -> nnx.Module:
        return nnx.vmap(linear, in_axes=0, out_axes=0)(nnx.Rngs(0).fork(split=3))

    call = lambda model, x: model(x)
    remat = nnx.remat(call)
    general = lambda: beside(nnx.LinearGeneral(width, (2, width // 2), rngs=rngs), width, width)
    embed = lambda: beside(nnx.Embed(shapes.TOKENS, width, rngs=rngs), shapes.TOKENS, width)
    conv = lambda: beside(nnx.Conv(3, width, (3, 3), strides=2, rngs=rngs), 3, width)
    ways: dict[str, tuple[Callable[[], nnx.Module], Callable[..., jax.Array]]] = {
        "Dense": (lambda: linear(rngs), call),
        "scan over layers": (stack, scanned),
        "remat": (lambda: linear(rngs), remat),
        "DenseGeneral": (general, call),
        "embedding": (embed, call),
        "tied output head": (embed, call),
        "convolution": (conv, call),
    }
    answers = {
        name: shapes.attempt(lambda way=way, x=inputs[name]: _adapted(*way, x))
        for name, way in ways.items()
    }
    none = "no layer: one A and B of two dims each"
    return answers | dict.fromkeys(("experts, einsum", "experts, ragged_dot"), none)


def _adapted(
    make: Callable[[], nnx.Module], call: Callable[..., jax.Array], x: jax.Array
) -> shapes.Adapted:
    graph, trained, frozen = nnx.split(make(), nnx.LoRAParam, ...)
    run = jax.jit(lambda trained, frozen, x: call(nnx.merge(graph, trained, frozen), x))
    return lambda trained, x: run(trained, frozen, x), trained, x
