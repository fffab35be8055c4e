"""This library: the model as it is, under `wrap`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import lorax_fn as lora
from benchmarks.rivals import structures as shapes
from benchmarks.rivals.jax_step import JaxStep, plain
from benchmarks.rivals.problem import TARGETS, Problem, nested


class Step(JaxStep):
    def build(self, problem: Problem) -> tuple[Any, Any, Callable[..., jax.Array]]:
        sizes, params = problem.sizes, jax.device_put(nested(problem.weights))
        model = plain(sizes)
        apply = lambda params, tokens: model.apply({"params": params}, tokens)
        rules = [lora.LoRA(list(TARGETS), rank=sizes.rank, alpha=sizes.alpha)]
        made = lora.init(jax.random.key(0), params, rules)
        a, b = nested(problem.a), nested(problem.b)
        is_place = lambda node: node is None or hasattr(node, "a")
        factors = jax.tree.map(_filled, made, _like(made, a), _like(made, b), is_leaf=is_place)
        wrapped = lora.wrap(apply, dense="error")
        return factors, params, lambda factors, params, tokens: wrapped(params, factors, tokens)


def structures() -> dict[str, str]:
    """Which structures are adapted, and kept factored."""
    return shapes.attempt_all(_adapted)


def _adapted(model: nn.Module, x: jax.Array) -> shapes.Adapted:
    params = model.init(jax.random.key(0), x)
    axes = lora.infer_axes(model.apply, params, x)
    rules = [lora.LoRA(r".*/(kernel|embedding)", rank=2, alpha=4)]
    factors = lora.init(jax.random.key(1), params, rules, axes=axes)
    wrapped = lora.wrap(model.apply, dense="error")
    return lambda factors, x: wrapped(params, factors, x), factors, x


def _like(made: Any, values: Any) -> Any:
    """The values in the structure of the factors, None where there are none."""
    if isinstance(made, dict):
        return {name: _like(node, (values or {}).get(name)) for name, node in made.items()}
    return values


def _filled(node: Any, a: Any, b: Any) -> Any:
    return node and dataclasses.replace(node, a=jnp.asarray(a), b=jnp.asarray(b))
