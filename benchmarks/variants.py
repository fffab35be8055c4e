"""The training steps that are compared, all from the same weights.

full         every parameter trained
handwritten  LoRA written into the layers, factors trained
lorax_fn     the plain model under `lorax_fn.wrap`, factors trained
dora         the same with DoRA, its magnitudes trained too
added_up     W + scale * A·B formed first, then the plain model; factors trained
floor        nothing trained: the plain model, differentiated down to its first layer's input
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lorax_fn
from benchmarks.handwritten import LoRALayers, add_up
from benchmarks.model import Config, Transformer
from lorax_fn.adapters import DoRAFactors

NAMES = ("full", "handwritten", "lorax_fn", "dora", "added_up", "floor")
TARGETS = {
    "q,v": ("query", "value"),
    "every kernel": ("query", "key", "value", "out", "up", "down", "head"),
}
ALPHA_PER_RANK = 2.0  # a scale of 1 would hide a forgotten scale


@dataclasses.dataclass(frozen=True)
class Variant:
    """A training step and its operands: `step(trained, state, frozen, tokens)`.

    It returns (what is trained, or its gradient; the optimiser's state; the loss).
    """

    step: Callable[..., tuple[Any, Any, jax.Array]]
    operands: tuple[Any, ...]


def build(
    config: Config, targets: str, *, rank: int, batch: int, length: int, abstract: bool = False
) -> dict[str, Variant]:
    """All variants of one model. Factors are random, B too, as in the middle of training.

    With `abstract`, operands are shapes alone: enough to trace, lower and compile.
    """
    make = jax.eval_shape if abstract else lambda function, *args: function(*args)
    scale = ALPHA_PER_RANK
    tokens = jax.random.randint(jax.random.key(0), (batch, length), 0, config.vocabulary)
    plain = Transformer(config)
    params = make(jax.jit(plain.init), jax.random.key(1), tokens)["params"]
    by_hand = Transformer(config, LoRALayers(TARGETS[targets], rank, scale))
    shapes = jax.eval_shape(by_hand.init, jax.random.key(1), tokens)["lora"]
    lora = make(jax.jit(lambda: _random_like(shapes)))
    summed = make(jax.jit(add_up), params, lora, scale)

    def apply(params: Any, tokens: jax.Array, nudge: jax.Array | None = None) -> jax.Array:
        return plain.apply({"params": params}, tokens, nudge)

    wrapped = lorax_fn.wrap(apply, dense="error")
    axes = lorax_fn.infer_axes(apply, params, tokens)

    def draw(kind: Any) -> Any:
        rule = kind(list(TARGETS[targets]), rank=rank, alpha=scale * rank)
        key = jax.random.key(3)
        made = make(jax.jit(lambda params: lorax_fn.init(key, params, [rule], axes=axes)), params)
        return _filled(made, lora)

    factors = draw(lorax_fn.LoRA)
    dora = make(jax.jit(_keep_lengths), draw(lorax_fn.DoRA), summed)
    adamw = optax.adamw(1e-4)

    def step(forward: Callable[..., jax.Array], tx: Any = adamw) -> Callable[..., Any]:
        def train(trained: Any, state: Any, frozen: Any, tokens: jax.Array) -> Any:
            loss = lambda trained: cross_entropy(forward(trained, frozen, tokens), tokens)
            value, gradient = jax.value_and_grad(loss)(trained)
            updates, state = tx.update(gradient, state, trained)
            return optax.apply_updates(trained, updates), state, value

        return train

    def floor(nudge: jax.Array, _: None, frozen: Any, tokens: jax.Array) -> Any:
        loss = lambda nudge: cross_entropy(apply(frozen, tokens, nudge), tokens)
        value, gradient = jax.value_and_grad(loss)(nudge)
        return gradient, None, value

    def adapted(factors: Any) -> Variant:
        forward = lambda factors, params, tokens: wrapped(params, factors, tokens)
        return Variant(step(forward, tx), (factors, make(tx.init, factors), params, tokens))

    tx = lorax_fn.freeze(adamw)
    nudge = jnp.zeros((batch, length, config.width), config.dtype)
    return {
        "full": Variant(
            step(lambda params, _, tokens: apply(params, tokens)),
            (summed, make(adamw.init, summed), None, tokens),
        ),
        "handwritten": Variant(
            step(lambda lora, p, tokens: by_hand.apply({"params": p, "lora": lora}, tokens)),
            (lora, make(adamw.init, lora), params, tokens),
        ),
        "lorax_fn": adapted(factors),
        "dora": adapted(dora),
        "added_up": Variant(
            step(lambda lora, params, tokens: apply(add_up(params, lora, scale), tokens)),
            (lora, make(adamw.init, lora), params, tokens),
        ),
        "floor": Variant(floor, (nudge, None, summed, tokens)),
    }


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean loss of predicting each next token, in float32."""
    logits = logits[:, :-1].astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def _random_like(shapes: Any) -> Any:
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    draws = [
        0.03 * jax.random.normal(k, s.shape, s.dtype) for k, s in zip(keys, leaves, strict=True)
    ]
    return structure.unflatten(draws)


def _filled(factors: Any, values: Any) -> Any:
    """The factors that `lorax_fn.init` makes, with the hand-written collection's values."""
    if "a" in values:
        return factors | {"kernel": dataclasses.replace(factors["kernel"], **values)}
    return {
        name: _filled(sub, values[name]) if name in values else sub for name, sub in factors.items()
    }


def _keep_lengths(factors: Any, summed: Any) -> Any:
    """DoRA's factors with the magnitudes at which it computes what LoRA does."""

    def each(node: Any, weight: Any) -> Any:
        if not isinstance(node, DoRAFactors):
            return node
        squares = jnp.square(weight.astype(jnp.float32)).sum(node.axes.contract)
        return dataclasses.replace(node, magnitude=jnp.sqrt(squares))

    def is_node(node: Any) -> bool:
        return node is None or isinstance(node, DoRAFactors)

    return jax.tree.map(each, factors, summed, is_leaf=is_node)
