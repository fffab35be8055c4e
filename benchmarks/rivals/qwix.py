"""qwix: `LoraProvider` intercepts the model's operations (Linen or NNX; here Linen)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import qwix
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
    return shapes.attempt_all(_adapted)


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
