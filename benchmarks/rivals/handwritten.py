"""LoRA written by hand into the layers (`benchmarks/handwritten.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from benchmarks.handwritten import LoRALayers
from benchmarks.model import Transformer
from benchmarks.rivals.jax_step import JaxStep, config
from benchmarks.rivals.problem import TARGETS, Problem, nested


class Step(JaxStep):
    def build(self, problem: Problem) -> tuple[Any, Any, Callable[..., jax.Array]]:
        sizes, params = problem.sizes, jax.device_put(nested(problem.weights))
        model = Transformer(config(sizes), LoRALayers(TARGETS, sizes.rank, sizes.scale))
        name = lambda factors, letter: {
            path.replace("kernel", letter): array for path, array in factors.items()
        }
        factors = jax.device_put(nested(name(problem.a, "a") | name(problem.b, "b")))
        return (
            factors,
            params,
            lambda factors, params, tokens: model.apply(
                {"params": params, "lora": factors}, tokens
            ),
        )


def structures() -> dict[str, str]:
    """Nothing to try: each layer is written anew."""
    return {}
