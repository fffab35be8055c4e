"""qwix: `LoraProvider` intercepts the operations of Flax modules, Linen's or NNX's.

The step is measured in Linen. A structure that cannot be adapted there is tried in NNX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks.rivals import structures as shapes
from benchmarks.rivals.jax_step import JaxStep, plain
from benchmarks.rivals.problem import TARGETS, Problem


class Step(JaxStep):
    def build(self, problem: Problem) -> tuple[Any, Any, Callable[..., jax.Array]]:
        sizes = problem.sizes
        paths = f"(.*/)?({'|'.join(TARGETS)})"
        provider = qwix.LoraProvider(module_path=paths, rank=sizes.rank, alpha=sizes.alpha)
        model = qwix.apply_lora_to_model(plain(sizes), provider)
        shapes = jax.eval_shape(model.init, jax.random.key(0), problem.tokens)["params"]
        wanted = {path: leaf.shape for path, leaf in flatten_dict(shapes, sep="/").items()}
        given = {f"{path}_lora_a": a for path, a in problem.a.items()}
        given |= {f"{path}_lora_b": b for path, b in problem.b.items()}
        given |= problem.weights
        params = jax.device_put({p: given[p].reshape(shape) for p, shape in wanted.items()})
        trained, frozen = split(params)
        return trained, frozen, joined(model)


def structures() -> dict[str, str]:
    """Which structures get factors."""
    answers = shapes.attempt_all(_adapted)
    for name, module in IN_NNX.items():
        if answers[name] != "yes":
            x = shapes.MODELS[name][1]
            answer = shapes.attempt(lambda module=module, x=x: _adapted_in_nnx(module(), x))
            answers[name] = answer if answer == "yes" else answers[name]
    return answers


class Experts(nnx.Module):
    def __init__(self) -> None:
        shape = shapes.EXPERTS, shapes.WIDTH, shapes.WIDTH
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(0), shape))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("etd,edf->etf", x, self.kernel[...])


class Ragged(Experts):
    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, self.kernel[...], jnp.array([3, 0, 5]))


class Embedding(nnx.Module):
    def __init__(self) -> None:
        self.dense = nnx.Embed(shapes.TOKENS, shapes.WIDTH, rngs=nnx.Rngs(0))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.dense(ids)


class Tied(Embedding):
    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.dense.attend(nnx.tanh(self.dense(ids)))


IN_NNX = {
    "embedding": Embedding,
    "tied output head": Tied,
    "experts, einsum": Experts,
    "experts, ragged_dot": Ragged,
}


def _adapted_in_nnx(model: nnx.Module, x: jax.Array) -> shapes.Adapted:
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=4.0)
    adapted = qwix.apply_lora_to_model(model, provider, x, rngs=nnx.Rngs(1))
    graph, trained, frozen = nnx.split(adapted, nnx.LoRAParam, ...)
    run = jax.jit(lambda trained, frozen, x: nnx.merge(graph, trained, frozen)(x))
    return lambda trained, x: run(trained, frozen, x), trained, x


def _adapted(model: nn.Module, x: jax.Array) -> shapes.Adapted:
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=4.0)
    adapted = qwix.apply_lora_to_model(model, provider)
    params = flatten_dict(adapted.init(jax.random.key(0), x)["params"], sep="/")
    trained, frozen = split(params)
    forward = joined(adapted)
    return lambda factors, x: forward(factors, frozen, x), trained, x


def split(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The factors, which stand among the params under names of their own, and the others."""
    trained = {path: leaf for path, leaf in params.items() if path[:-1].endswith("_lora_")}
    return trained, {path: leaf for path, leaf in params.items() if path not in trained}


def joined(model: nn.Module) -> Callable[..., jax.Array]:
    """(factors, frozen, x) -> output."""

    def forward(trained: dict[str, Any], frozen: dict[str, Any], x: jax.Array) -> jax.Array:
        return model.apply({"params": unflatten_dict(trained | frozen, sep="/")}, x)

    return forward
