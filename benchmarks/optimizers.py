"""Steps to reach a loss: LoRA, LoRA+ and Riemannian preconditioning, on one real task.

    python -m benchmarks.optimizers              # about ten minutes on two CPU cores

The task is that of `examples/finetune_minilm.py`; its head stays as it was initialised, so that all
the learning is the factors'. Every method sees the same batches, at each learning rate of a grid.
The loss to reach is the one that plain LoRA, at its own best rate, has at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import lorax_fn as lora
from benchmarks.cost import align, machine
from benchmarks.minilm_task import BATCH, KERNELS, Task, batches, load, train_step

METHODS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "LoRA": optax.adamw,
    "LoRA+": lambda lr: lora.lora_plus(optax.adamw(lr), ratio=16),
    "preconditioned": lambda lr: optax.chain(lora.precondition(), optax.adamw(lr)),
}
RATES = {
    "LoRA": (2e-3, 4e-3),
    "LoRA+": (2e-4, 4e-4),  # of A; B's are 16 times these
    "preconditioned": (2e-3, 4e-3),
}
SMOOTHING = 0.9  # of the running mean of the batches' losses


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    task = with_fresh_head(load(options.limit))
    report = {"machine": machine(), "options": vars(options) | {"json": None}}
    print("  ".join(f"{key} {value}" for key, value in report["machine"].items()))
    curves = {name: {lr: curve(task, make(lr), options) for lr in RATES[name]}
              for name, make in METHODS.items()}  # fmt: skip
    best = {name: min(runs, key=lambda lr: runs[lr][-1]) for name, runs in curves.items()}
    target = curves["LoRA"][best["LoRA"]][-1]
    report["target"] = target
    report["curves"] = {name: {lr: c.tolist() for lr, c in runs.items()}
                        for name, runs in curves.items()}  # fmt: skip
    print(f"\nsteps until the loss is {target:.3f}, mean of {options.seeds} seeds\n")
    print(render(curves, target))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return report


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--limit", type=int, help="cap the examples of each split")
    parser.add_argument("--json", type=Path, help="file to write the curves to")
    return parser.parse_args(arguments)


def with_fresh_head(task: Task) -> Task:
    """The task with a head as it is initialised: what is learnt, the factors have to learn."""
    example = task.example
    fresh = task.model.init(jax.random.key(0), example.ids, example.mask)["params"]["classifier"]
    params = task.variables["params"] | {"classifier": fresh}
    return dataclasses.replace(task, variables={"params": params})


def curve(task: Task, tx: optax.GradientTransformation, options: argparse.Namespace) -> np.ndarray:
    """The smoothed training loss, (steps,), mean over the seeds."""
    tx = lora.freeze(tx)
    step = train_step(lora.wrap(task.model.apply), tx)
    curves = []
    for seed in range(options.seeds):
        rules = [lora.LoRA(KERNELS, rank=8, alpha=16)]
        factors = task.factors(rules, seed, head=False)
        state = tx.init(factors)
        losses = []
        for batch in batches(task.splits["train"], options.steps, BATCH, seed):
            factors, state, loss = step(task.variables, factors, state, batch)
            losses.append(float(loss))
        curves.append(smooth(losses))
    return np.mean(curves, axis=0)


def smooth(losses: Sequence[float]) -> np.ndarray:
    """A running mean that starts at the first loss."""
    means = [losses[0]]
    for loss in losses[1:]:
        means.append(SMOOTHING * means[-1] + (1 - SMOOTHING) * loss)
    return np.array(means)


def steps_to(target: float, losses: np.ndarray) -> int | None:
    """The first step at which the loss is reached, counted from 1."""
    reached = np.flatnonzero(losses <= target)
    return int(reached[0]) + 1 if len(reached) else None


def render(curves: dict[str, dict[float, np.ndarray]], target: float) -> str:
    rows = [("", "rate", "steps", "last loss")]
    for name, runs in curves.items():
        for lr, losses in runs.items():
            steps = steps_to(target, losses)
            rows.append((name, f"{lr:.0e}", str(steps or "never"), f"{losses[-1]:.3f}"))
    return align(rows)


if __name__ == "__main__":
    main()
