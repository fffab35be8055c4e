"""What a user writes, for mypy to check against the package (`files` in pyproject.toml); it runs too."""

from collections.abc import Callable
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import optax

import lorax_fn as lora

Params = dict[str, jax.Array]


def apply_fn(params: Params, x: jax.Array) -> jax.Array:
    """Two layers."""
    return jnp.tanh(x @ params["up"]) @ params["down"]


def is_up(path: str, leaf: Any) -> bool:
    """A target, as a function."""
    return path == "up" and leaf.ndim == 2


RULES = [
    lora.LoRA(["up"], rank=2, alpha=4),
    lora.Full(r".*", exclude=is_up),
]
OTHERS = [
    lora.LoRA(r"up", rank=2, alpha=4.0, dropout=0.1, dtype=jnp.bfloat16, exclude=["down"]),
    lora.DoRA(is_up, rank=2),
]


def fine_tune(params: Params, x: jax.Array, steps: int) -> tuple[Params, list[float]]:
    """From rules to merged params."""
    axes = lora.infer_axes(apply_fn, params, x)
    factors = lora.init(jax.random.key(0), params, RULES, axes=axes)
    apply = lora.wrap(apply_fn, dense="error")
    assert_type(apply, Callable[..., Any])
    tx = lora.freeze(optax.adam(1e-2))
    state = tx.init(factors)
    losses: list[float] = []
    for _ in range(steps):
        loss, grads = jax.value_and_grad(lambda f: jnp.square(apply(params, f, x)).mean())(factors)
        updates, state = tx.update(grads, state, factors)
        factors = optax.apply_updates(factors, updates)
        losses.append(float(loss))
    report = lora.inspect(apply_fn, params, factors, x)
    assert_type(report, lora.Report)
    assert_type(report.dense, list[str])
    assert_type(report.totals.trainable, int)
    assert_type(report.rows[0].axes, lora.Axes | None)
    merged: Params = lora.merge(params, factors, check_finite=True)
    return merged, losses


def what_went_wrong(params: Params) -> str:
    """Errors have a common root."""
    try:
        lora.init(jax.random.key(0), params, [lora.LoRA("nowhere")])
    except lora.TargetError as error:
        root: lora.LoraError = error
        return str(root)
    return ""
