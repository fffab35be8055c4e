"""quax: `LoraArray`s among the params, and multiple dispatch under `quaxify`.

It has no alpha: its B holds alpha/rank · B.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import quax

from benchmarks.rivals import structures as shapes
from benchmarks.rivals.jax_step import JaxStep, plain
from benchmarks.rivals.problem import Problem, nested

try:
    from quax.examples.lora import LoraArray
except ImportError:  # before 0.1
    from quax.lora import LoraArray


class Step(JaxStep):
    def build(self, problem: Problem) -> tuple[Any, Any, Callable[..., jax.Array]]:
        flat = dict(problem.weights)
        for path, a in problem.a.items():
            node = lora_array(flat[path], problem.sizes.rank)
            b = problem.sizes.scale * problem.b[path]
            flat[path] = eqx.tree_at(lambda n: (n.a, n.b), node, (jnp.asarray(a), jnp.asarray(b)))
        model = plain(problem.sizes)
        return *split(nested(flat)), joined(lambda params, x: model.apply({"params": params}, x))


def structures() -> dict[str, str]:
    """Which structures run without adding the weight up."""
    return shapes.attempt_all(_adapted)


def _adapted(model: nn.Module, x: jax.Array) -> shapes.Adapted:
    params = model.init(jax.random.key(0), x)
    wrapped = jax.tree_util.tree_map_with_path(_wrapped, params)
    trained, frozen = split(wrapped)
    forward = joined(model.apply)
    return lambda factors, x: forward(factors, frozen, x), trained, x


def _wrapped(path: Any, leaf: jax.Array) -> Any:
    name = path[-1].key
    return lora_array(leaf, 2) if name in ("kernel", "embedding") else leaf


def lora_array(weight: Any, rank: int) -> LoraArray:
    """A weight with factors beside it."""
    return LoraArray(jnp.asarray(weight), rank=rank, key=jax.random.key(0))


def split(params: Any) -> tuple[Any, Any]:
    """The factors, and all else."""
    is_node = lambda node: isinstance(node, LoraArray)

    def mask(node: Any) -> Any:
        blank = jax.tree.map(lambda _: False, node)
        return eqx.tree_at(lambda n: (n.a, n.b), blank, (True, True)) if is_node(node) else blank

    return eqx.partition(params, jax.tree.map(mask, params, is_leaf=is_node))


def joined(apply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """(factors, frozen, x) -> output."""
    adapted = quax.quaxify(apply)
    return lambda trained, frozen, x: adapted(eqx.combine(trained, frozen), x)
