"""What a quantised frozen base saves and costs: float32, bfloat16, int8 and NF4 side by side.

    python -m benchmarks.quantized              # 4 layers of width 512, rank 8, 30 steps
    python -m benchmarks.quantized --smoke      # a few seconds

A transformer is first trained for some steps as a whole, in float32, so that there is something to
lose. That model is the frozen base of all rows: as it is, cast to bfloat16 together with the
activations, and with its matrices quantised and the activations in float32. LoRA on every kernel
then learns another task from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import lorax_fn as lora
from benchmarks.cost import align, machine
from benchmarks.measure import interleaved
from benchmarks.model import STRUCTURES, Config, Transformer

Pytree = Any

BASES = ("float32", "bfloat16", "int8", "nf4")
ALPHABET = 32  # tokens that occur: few, so that some steps learn what follows each
MATRICES = r".*/(kernel|embedding)"
KERNELS = r".*/(query|key|value|out|up|down)/kernel"
SMOKE = {
    "layers": 2,
    "width": 64,
    "batch": 2,
    "length": 16,
    "pretraining": 4,
    "steps": 3,
    "rounds": 1,
}
COLUMNS = ("base MiB", "temp MiB", "peak MiB", "", "first loss", "last loss", "error", "step")


@dataclasses.dataclass(frozen=True)
class Row:
    """One base: XLA's bytes of a whole training step, and its time against float32's."""

    base_bytes: int
    temp_bytes: int
    peak_bytes: int  # arguments, temporaries and results that reuse no argument
    losses: list[float]
    error: float  # of all matrices together, relative
    step_ratio: float


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    print("  ".join(f"{key} {value}" for key, value in machine().items()))
    report: dict[str, Any] = {"machine": machine(), "options": vars(options) | {"json": None}}
    report["rows"] = {}
    for structure in options.structures:
        rows = measure(options, structure)
        print(f"\n{structure}\n{render(rows)}", flush=True)
        report["rows"][structure] = {name: dataclasses.asdict(row) for name, row in rows.items()}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwrote {options.json}")
    return report


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=64, dest="length", help="tokens in an example")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--block", type=int, default=64, help="weights that share a scale")
    parser.add_argument("--pretraining", type=int, default=40, help="steps that make the base")
    parser.add_argument("--steps", type=int, default=30, help="steps of LoRA on it")
    parser.add_argument("--rounds", type=int, default=3, help="times each step is timed")
    parser.add_argument(
        "--structures", nargs="+", choices=STRUCTURES, default=["plain", "scan", "remat"]
    )
    parser.add_argument("--json", type=pathlib.Path, help="file to write the figures to")
    parser.add_argument("--smoke", action="store_true", help="defaults that take seconds")
    if parser.parse_args(arguments).smoke:
        parser.set_defaults(**SMOKE)
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, structure: str) -> dict[str, Row]:
    """Trains LoRA on every base, from the same factors and on the same batches."""
    config = Config(structure=structure, layers=options.layers, width=options.width)
    params = pretrained(Transformer(config), options)
    tx = lora.freeze(optax.adamw(2e-3))
    compiled, calls, bases, losses = {}, {}, {}, {}
    for name in BASES:
        dtype = jnp.bfloat16 if name == "bfloat16" else jnp.float32
        model = Transformer(dataclasses.replace(config, dtype=dtype))
        bases[name] = base = base_of(name, params, options.block)
        axes = lora.infer_axes(model.apply, base, batch_of(options, 1, 0))
        rule = lora.LoRA(KERNELS, rank=options.rank, alpha=2.0 * options.rank)
        factors = lora.init(jax.random.key(1), base, rule, axes=axes)
        operands = (base, factors, tx.init(factors))
        step = jax.jit(training_step(lora.wrap(model.apply, dense="error"), tx))
        compiled[name] = step.lower(*operands, batch_of(options, 1, 0)).compile()
        calls[name] = functools.partial(compiled[name], *operands, batch_of(options, 1, 0))
        losses[name] = train(compiled[name], operands, options, f"{structure} {name}")
    times = interleaved(calls, options.rounds)
    return {
        name: row_of(
            compiled[name],
            bases[name],
            losses=losses[name],
            error=error_of(params, bases[name]),
            step_ratio=float(np.median(times[name] / times["float32"])),
        )
        for name in BASES
    }


def batch_of(options: argparse.Namespace, task: int, i: int) -> jax.Array:
    """Tokens (batch, length) of a task: each follows from the one before, but for a tenth."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(task), i), 3)
    size = ALPHABET

    def follow(
        token: jax.Array, inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        is_noise, noise = inputs
        following = jnp.where(is_noise, noise, (5 * token + 3 + 8 * task) % size)
        return following, following

    shape = (options.length, options.batch)
    noise = jax.random.randint(keys[0], shape, 0, size)
    first = jax.random.randint(keys[1], shape[1:], 0, size)
    _, tokens = jax.lax.scan(follow, first, (jax.random.bernoulli(keys[2], 0.1, shape), noise))
    return tokens.T


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Of each token, given those before it."""
    logits = logits[:, :-1].astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def pretrained(model: Transformer, options: argparse.Namespace) -> Pytree:
    """The model after some steps of task 0, every parameter trained."""
    params = model.init(jax.random.key(0), batch_of(options, 0, 0))
    tx = optax.adamw(1e-3)
    apply = lambda _, params, tokens: model.apply(params, tokens)
    step = jax.jit(training_step(apply, tx), donate_argnums=(1, 2))
    state = tx.init(params)
    for i in tqdm(range(options.pretraining), desc="pretraining", unit="step"):
        params, state, _ = step(None, params, state, batch_of(options, 0, i))
    return params


def training_step(apply: Callable[..., jax.Array], tx: Any) -> Callable[..., tuple]:
    """(base, trained, state, tokens) -> (trained, state, loss)."""

    def step(base: Pytree, trained: Pytree, state: Pytree, tokens: jax.Array) -> tuple:
        loss_of = lambda trained: cross_entropy(apply(base, trained, tokens), tokens)
        loss, grads = jax.value_and_grad(loss_of)(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    return step


def train(step: Callable, operands: tuple, options: argparse.Namespace, name: str) -> list[float]:
    """The loss of each step on task 1."""
    base, factors, state = operands
    losses = []
    for i in tqdm(range(options.steps), desc=name, unit="step"):
        factors, state, loss = step(base, factors, state, batch_of(options, 1, i))
        losses.append(float(loss))
    return losses


def base_of(name: str, params: Pytree, block: int) -> Pytree:
    """The float32 params as this row's base."""
    if name in ("float32", "bfloat16"):
        return jax.tree.map(lambda leaf: leaf.astype(name), params)
    return lora.quantize(params, MATRICES, dtype=name, block=block)


def error_of(params: Pytree, base: Pytree) -> float:
    """‖W - Q‖ / ‖W‖ of the whole model."""
    nothing = jax.tree.map(lambda _: None, params)
    held = lora.merge(base, nothing)
    return float(optax.global_norm(jax.tree.map(jnp.subtract, params, held))) / float(
        optax.global_norm(params)
    )


def row_of(compiled: Any, base: Pytree, **figures: Any) -> Row:
    """The bytes of a compiled step and of its base, as XLA holds them."""
    memory = compiled.memory_analysis()
    held = jax.jit(lambda base: base, keep_unused=True).lower(base).compile().memory_analysis()
    return Row(
        base_bytes=held.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        **figures,
    )


def render(rows: dict[str, Row]) -> str:
    """One line for each base; the peak also as a ratio to float32's."""
    lines = [("", *COLUMNS)]
    mib = lambda size: f"{size / 2**20:.2f}"
    for name, row in rows.items():
        lines.append((
            name,
            mib(row.base_bytes),
            mib(row.temp_bytes),
            mib(row.peak_bytes),
            f"{row.peak_bytes / rows['float32'].peak_bytes:.3f}×",
            f"{row.losses[0]:.3f}",
            f"{row.losses[-1]:.3f}",
            f"{row.error:.2%}",
            f"{row.step_ratio:.2f}×",
        ))  # fmt: skip
    return align(lines)


if __name__ == "__main__":
    main()
