"""Every kind of adapter on one real task: what it reaches, what it trains, what it costs.

    python -m benchmarks.kinds                          # about an hour on two CPU cores
    python -m benchmarks.kinds --kinds LoRA DoRA --seeds 1 --steps 30
    python -m benchmarks.kinds --seeds 0                # the costs alone, in a few minutes

The task is that of `examples/finetune_minilm.py`, the adapters on every kernel of the encoder.
Needs what the example needs. Training steps are timed side by side; memory is what XLA plans for a
step: arguments, results and temporaries.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorax_fn as lora
from benchmarks.cost import align, machine
from benchmarks.measure import interleaved
from benchmarks.minilm_task import BATCH, KERNELS, Task, fit, load, optimiser, train_step

REFERENCE = "LoRA"
TOKENS = 500  # rows of the word embeddings that `trainable tokens` trains: the most frequent


@dataclasses.dataclass(frozen=True)
class Kind:
    """A row of the table: its rules for a task, and the peak learning rate of AdamW."""

    rules: Callable[[Task], list[lora.LoRA]]
    lr: float
    around: Callable[[optax.GradientTransformation, int], Any] = lambda tx, _: tx


def on_kernels(rule: Any, lr: float, **options: Any) -> Kind:
    return Kind(lambda _: [rule(KERNELS, **options)], lr)


def frequent_tokens(task: Task) -> list[Any]:
    counts = np.bincount(task.splits["train"].ids.ravel())
    tokens = np.argsort(-counts)[:TOKENS].tolist()
    return [lora.TrainableTokens(r".*/word_embeddings/embedding", tokens=tokens)]


def budgeted(tx: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    """The optimiser, and after each of its steps AdaLoRA's thinning out."""
    budget = lora.RankBudget(8, total_steps=steps, warmup=steps // 10, final_steps=steps // 3)

    def init(factors: Any) -> Any:
        return tx.init(factors), budget.init(factors)

    def update(grads: Any, state: Any, factors: Any) -> Any:
        updates, inner = tx.update(grads, state[0], factors)
        stepped = optax.apply_updates(factors, updates)
        thinned, outer = budget.update(stepped, grads, state[1])
        return jax.tree.map(jnp.subtract, thinned, factors), (inner, outer)

    return optax.GradientTransformation(init, update)


SIZE = {"rank": 8, "alpha": 16.0}
KINDS: dict[str, Kind] = {
    "LoRA": on_kernels(lora.LoRA, 2e-3, **SIZE),
    "rsLoRA": on_kernels(lora.LoRA, 1e-3, rslora=True, **SIZE),
    "LoRA-FA": on_kernels(lora.LoRA, 5e-3, freeze_a=True, **SIZE),
    "PiSSA": on_kernels(lora.LoRA, 5e-4, init="pissa", **SIZE),
    "OLoRA": on_kernels(lora.LoRA, 1e-4, init="olora", **SIZE),
    "EVA": on_kernels(lora.LoRA, 2e-3, init="eva", **SIZE),
    "CorDA": on_kernels(lora.LoRA, 5e-4, init="corda", **SIZE),
    "LoRA-GA": on_kernels(lora.LoRA, 3e-4, init="lora_ga", **SIZE),
    "DoRA": on_kernels(lora.DoRA, 2e-3, **SIZE),
    "AdaLoRA": Kind(lambda _: [lora.AdaLoRA(KERNELS, rank=12, alpha=24.0)], 5e-3, budgeted),
    "VeRA": on_kernels(lora.VeRA, 5e-3),
    "LoHa": on_kernels(lora.LoHa, 2e-3, **SIZE),
    "LoKr": on_kernels(lora.LoKr, 2e-3, **SIZE),
    "IA3": on_kernels(lora.IA3, 5e-3),
    "bias": Kind(lambda _: [lora.Full(r".*/bert/.*bias")], 2e-3),
    "tokens": Kind(frequent_tokens, 2e-3),
    "full": Kind(lambda _: [lora.Full(r".*/bert/.*")], 2e-4),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """What one kind came to. Accuracies one a seed; memory in bytes."""

    trained: int
    memory: int
    step_ratio: float
    validation: Sequence[float] = ()
    test: Sequence[float] = ()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    task = load(options.limit)
    report = {"machine": machine(), "options": vars(options) | {"json": None}}
    print("  ".join(f"{key} {value}" for key, value in report["machine"].items()))
    rows = costs(task, options)
    print(f"\n{render(rows)}", flush=True)
    for name in options.kinds if options.seeds else ():
        runs = [train(task, name, options.steps, seed, options.lr) for seed in range(options.seeds)]
        accuracies = {"validation": [r.last for r in runs], "test": [r.test for r in runs]}
        rows[name] = dataclasses.replace(rows[name], **accuracies)
        print(f"\n{render(rows)}", flush=True)
    report["rows"] = {name: dataclasses.asdict(row) for name, row in rows.items()}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return report


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, help="peak learning rate, in place of each kind's own")
    parser.add_argument("--rounds", type=int, default=9, help="times each step is timed")
    parser.add_argument("--limit", type=int, help="cap the examples of each split")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser.parse_args(arguments)


def train(task: Task, name: str, steps: int, seed: int, lr: float | None) -> Any:
    kind = KINDS[name]
    return fit(
        f"{name}, seed {seed}",
        lora.wrap(task.model.apply),
        task.variables,
        task.factors(kind.rules(task), seed),
        kind.around(lora.freeze(optimiser(lr or kind.lr, steps)), steps),
        task.splits,
        steps=steps,
        batch=BATCH,
        seed=seed,
    )


def costs(task: Task, options: argparse.Namespace) -> dict[str, Row]:
    """Of each kind its step's time against LoRA's in the same round (median), and its memory."""
    steps: dict[str, Callable[[], Any]] = {}
    rows = {}
    for name in dict.fromkeys([REFERENCE, *options.kinds]):
        kind = KINDS[name]
        factors = task.factors(kind.rules(task), seed=0)
        tx = kind.around(lora.freeze(optimiser(1e-3, options.steps)), options.steps)
        operands = task.variables, factors, tx.init(factors), task.example
        step = train_step(lora.wrap(task.model.apply), tx, donate=False)
        compiled = step.lower(*operands).compile()
        rows[name] = Row(trained_numbers(factors), planned_bytes(compiled), float("nan"))
        steps[name] = functools.partial(compiled, *operands)
    times = interleaved(steps, options.rounds)
    ratio = {name: float(np.median(t / times[REFERENCE])) for name, t in times.items()}
    return {n: dataclasses.replace(row, step_ratio=ratio[n]) for n, row in rows.items()}


def planned_bytes(compiled: Any) -> int:
    plan = compiled.memory_analysis()
    return (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        + plan.temp_size_in_bytes
        - plan.alias_size_in_bytes
    )


def trained_numbers(factors: Any) -> int:
    """How many numbers are trained, the head's left out."""
    mask = lora.trainable_mask(factors)
    sizes = jax.tree.map(lambda on, array: array.size if on else 0, mask, factors)
    return sum(jax.tree.leaves(sizes["params"]["bert"]))


def render(rows: dict[str, Row]) -> str:
    header = ("", "test", "validation", "each seed", "trained", "step", "memory MiB")
    lines = [
        (
            name,
            f"{np.mean(row.test):.1%}" if row.test else "",
            f"{np.mean(row.validation):.1%}" if row.validation else "",
            " ".join(f"{value:.1%}" for value in row.validation),
            f"{row.trained:,}",
            f"{row.step_ratio:.2f}×",
            f"{row.memory / 2**20:.0f}",
        )
        for name, row in rows.items()
    ]
    return align([header, *lines])


if __name__ == "__main__":
    main()
