"""What the libraries for JAX share: a training step, compiled, counted and timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks import flops
from benchmarks.model import Config, Transformer
from benchmarks.rivals.problem import HEAD_DIM, LEARNING_RATE, STEPS, WEIGHT_DECAY, Problem, Sizes

Pytree = Any


def config(sizes: Sizes) -> Config:
    """The sizes as the model's."""
    return Config("plain", sizes.layers, sizes.width, HEAD_DIM, sizes.vocabulary)


def plain(sizes: Sizes) -> nn.Module:
    """The model without LoRA."""
    return Transformer(config(sizes))


class JaxStep:
    """AdamW on what `build` says is trained."""

    def __init__(self, problem: Problem) -> None:
        self.tokens = jnp.asarray(problem.tokens)
        self.trained, self.frozen, forward = self.build(problem)
        tx = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.state = tx.init(self.trained)

        def step(trained: Pytree, state: Pytree, frozen: Pytree, tokens: jax.Array) -> tuple:
            loss_of = lambda trained: cross_entropy(forward(trained, frozen, tokens), tokens)
            loss, grads = jax.value_and_grad(loss_of)(trained)
            updates, state = tx.update(grads, state, trained)
            return optax.apply_updates(trained, updates), state, loss

        self.step = step

    def build(self, problem: Problem) -> tuple[Pytree, Pytree, Callable[..., jax.Array]]:
        """(trained, frozen, forward), where forward(trained, frozen, tokens) gives logits."""
        raise NotImplementedError

    def costs(self) -> dict[str, Any]:
        """Times in seconds, sizes in bytes."""
        operands = self.trained, self.state, self.frozen, self.tokens
        begin = time.perf_counter()
        lowered = jax.jit(self.step).lower(*operands)
        between = time.perf_counter()
        self.compiled = lowered.compile()
        end = time.perf_counter()
        trained, state, losses = self.trained, self.state, []
        for _ in range(STEPS):
            trained, state, loss = self.compiled(trained, state, *operands[2:])
            losses.append(float(loss))
        return {
            "trace_and_lower": between - begin,
            "compile": end - between,
            "flops": flops.count(self.compiled.as_text()),
            "temp_bytes": self.compiled.memory_analysis().temp_size_in_bytes,
            "trained": sum(leaf.size for leaf in jax.tree.leaves(self.trained)),
            "losses": losses,
        }

    def __call__(self) -> None:
        """One step, waited for."""
        operands = self.trained, self.state, self.frozen, self.tokens
        jax.block_until_ready(self.compiled(*operands))


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean loss of predicting each next token."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return losses.mean()
