"""What rank, alpha and targets are worth on a real task, against full fine-tuning: three seeds.

    python -m benchmarks.quality                                   # digits: a few minutes of a core
    python -m benchmarks.quality --task minilm --layers 6 --steps 220    # an hour of two cores

Adapters of like settings are trained in one step: `lorax_fn.stack`, and `jax.vmap` over factors,
scales and batches. Those of convolutions one by one: many kernels at once are slow on a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import lorax_fn as lora
from benchmarks.cost import align, machine
from benchmarks.quality_tasks import TASKS, Examples, Task

RANK = 8  # at which alpha is swept
ALPHAS = (4.0, 8.0, 32.0, 64.0)  # beside 16, which the sweep of ranks has
Pytree = Any
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row: LoRA with these numbers, or full fine-tuning where there is no rank."""

    rank: int | None
    alpha: float = 0.0
    on: Literal["all", "few", "small"] = "all"  # every kernel, some, or what `Task.small` says

    @property
    def group(self) -> tuple:
        """Settings that are trained in one step: of one shape, or padded to it at little cost."""
        return self.rank is None, self.on, (self.rank or 0) > RANK

    @property
    def scale(self) -> float:
        """What B is multiplied by; the rules of `Task.small` have scales of their own."""
        return self.alpha / self.rank if self.rank else 1.0


FULL = Setting(None)
FEW = Setting(RANK, 2.0 * RANK, "few")
SMALL = Setting(None, on="small")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    report = {"machine": machine(), "options": vars(options) | {"json": None, "picture": None}}
    print("  ".join(f"{key} {value}" for key, value in report["machine"].items()))
    task = TASKS[options.task](options)
    settings = settings_of(task)
    rows: dict[Setting, Row] = {}
    for group in reversed(dict.fromkeys(setting.group for setting in settings)):  # full first
        rows |= train(task, [each for each in settings if each.group == group], options)
        rows = {setting: rows[setting] for setting in settings if setting in rows}
        print(f"\n{render(task, rows)}", flush=True)
        report["rows"] = {name_of(task, setting): row for setting, row in rows.items()}
        if options.json:  # after each group: the whole may take hours
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.picture:
        draw(options.picture, task, rows)
    return report


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--layers", type=int, default=2, help="minilm: how many are adapted")
    parser.add_argument("--limit", type=int, help="minilm: cap the examples of each split")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--picture", type=Path, help="PNG to draw")
    return parser.parse_args(arguments)


def settings_of(task: Task) -> tuple[Setting, ...]:
    """Ranks at alpha = 2 · rank, alphas at one rank, some of the weights, and full fine-tuning."""
    ranks = (Setting(rank, 2.0 * rank) for rank in task.ranks)
    small = () if task.small is None else (SMALL,)
    return (*ranks, *(Setting(RANK, alpha) for alpha in ALPHAS), FEW, *small, FULL)


def name_of(task: Task, setting: Setting) -> str:
    if setting == SMALL:
        return task.small.name
    if setting.rank is None:
        return "full fine-tuning"
    where = task.few[1] if setting == FEW else "every kernel"
    return f"rank {setting.rank}, alpha {setting.alpha:g}, {where}"


def factors_of(task: Task, setting: Setting, seed: int) -> Pytree:
    """The scale is left out of them: it is an operand of the step."""
    if setting == SMALL:
        rules: list[Any] = [*task.small.rules, task.head]
    elif setting.rank is None:
        rules = [lora.Full(r".*", exclude=task.frozen)]
    else:
        targets = task.few[0] if setting == FEW else task.kernels
        rules = [lora.LoRA(targets, rank=setting.rank), task.head]
    return lora.init(jax.random.key(seed), task.params, rules, axes=task.axes)


def train(
    task: Task, settings: Sequence[Setting], options: argparse.Namespace
) -> dict[Setting, Row]:
    """All seeds of the settings of one group, as many in one step as the task says."""
    each = [(setting, seed) for setting in settings for seed in range(options.seeds)]
    tx = optimiser(task, settings[0], options.steps)
    step = train_step(task, tx)
    rows: dict[Setting, Row] = {}
    with tqdm(total=len(each) * options.steps, unit="step of an adapter") as bar:
        for start in range(0, len(each), task.at_once):
            part = each[start : start + task.at_once]
            factors = lora.stack([factors_of(task, *one) for one in part])
            scales = jnp.array([setting.scale for setting, _ in part], jnp.float32)
            state = tx.init(factors)
            for batch in together(task, [seed for _, seed in part], options.steps):
                operands = scales, batch.inputs, batch.labels
                factors, state = step(task.params, factors, state, *operands)
                bar.update(len(part))
            for i, (setting, _) in enumerate(part):
                row = rows.setdefault(setting, new_row(task, setting))
                judge(task, row, scaled(lora.take(factors, i), scales[i]))
    return rows


def optimiser(task: Task, setting: Setting, steps: int) -> optax.GradientTransformation:
    """Adam, warmed up over a tenth of the steps, then down to zero along a cosine."""
    ratio, peak = 1.0, task.full_lr if setting == FULL else task.lr
    if setting == SMALL:
        ratio, peak = task.small.b_ratio, task.small.lr
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, max(1, steps // 10), steps)
    return lora.freeze(lora.lora_plus(optax.adam(schedule), ratio))


def train_step(task: Task, tx: optax.GradientTransformation) -> Any:
    """A compiled step of a stack of adapters, each with a scale and a batch of its own."""
    apply = lora.wrap(task.apply)

    def loss_of(factors: Pytree, scale: jax.Array, params: Pytree, inputs: Any, labels: Any) -> Any:
        logits = apply(params, scaled(factors, scale), *inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(
        params: Pytree, factors: Pytree, state: Any, scales: Any, inputs: Any, labels: Any
    ) -> tuple:
        losses = jax.vmap(loss_of, (0, 0, None, 0, 0))
        total = lambda factors: losses(factors, scales, params, inputs, labels).sum()
        updates, state = tx.update(jax.grad(total)(factors), state, factors)
        return optax.apply_updates(factors, updates), state

    return step


def new_row(task: Task, setting: Setting) -> Row:
    """A row without results; the numbers that are trained are counted with the head's."""
    trained = sum(leaf.size for leaf in jax.tree.leaves(factors_of(task, setting, 0)))
    return {"trained": trained, "test": [], "kept": []}


def judge(task: Task, row: Row, factors: Pytree) -> None:
    """Adds the accuracies of the merged model to its setting's row."""
    merged = lora.merge(task.params, factors)
    row["test"].append(task.accuracy(merged))
    if task.kept is not None:
        row["kept"].append(task.kept(merged))


def scaled(factors: Pytree, scale: Any) -> Pytree:
    """LoRA's change times a scale that may be traced; `Full` has none."""
    is_lora = lambda node: hasattr(node, "b")
    scale_one = lambda node: dataclasses.replace(node, b=scale * node.b) if is_lora(node) else node
    return jax.tree.map(scale_one, factors, is_leaf=is_lora)


def together(task: Task, seeds: Sequence[int], steps: int) -> Iterator[Examples]:
    """Of every step the batches of all adapters, stacked; equal seeds see equal batches."""
    own = sorted(set(seeds))
    for drawn in zip(*(task.train(steps, seed) for seed in own), strict=True):
        batch = [drawn[own.index(seed)] for seed in seeds]
        inputs = tuple(np.stack(parts) for parts in zip(*(b.inputs for b in batch), strict=True))
        yield Examples(inputs, np.stack([b.labels for b in batch]))


def render(task: Task, rows: dict[Setting, Row]) -> str:
    whole = sum(leaf.size for leaf in jax.tree.leaves(task.params))
    header = ("", "test", "each seed", "kept", "trained", "of the model")
    lines = [
        (
            name_of(task, setting),
            f"{np.mean(row['test']):.1%}",
            " ".join(f"{value:.1%}" for value in row["test"]),
            f"{np.mean(row['kept']):.1%}" if row["kept"] else "",
            f"{row['trained']:,}",
            f"{row['trained'] / whole:.1%}",
        )
        for setting, row in rows.items()
    ]
    return align([header, *lines])


def draw(file: Path, task: Task, rows: dict[Setting, Row]) -> None:
    """Accuracy against rank and against alpha, what was kept below; full fine-tuning as a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import PercentFormatter

    shown = {"test": "what is learnt"} | ({"kept": "what is kept"} if task.kept else {})
    size = (9, 2.6 * len(shown) + 0.6)
    figure, grid = plt.subplots(
        len(shown), 2, figsize=size, layout="constrained", sharey="row", squeeze=False
    )
    plain = [setting for setting in rows if setting.rank and setting.on == "all"]
    sweeps = {
        "rank": [setting for setting in plain if setting.alpha == 2 * setting.rank],
        "alpha": sorted((s for s in plain if s.rank == RANK), key=lambda setting: setting.alpha),
    }
    for line, (what, title) in zip(grid, shown.items(), strict=True):
        for axes, (name, settings) in zip(line, sweeps.items(), strict=True):
            places = [getattr(setting, name) for setting in settings]
            values = np.array([rows[setting][what] for setting in settings])  # (settings, seeds)
            axes.plot(places, values, "o", color="tab:blue", alpha=0.35, ms=4)
            axes.plot(places, values.mean(1), "-", color="tab:blue", label="LoRA, every kernel")
            place, value = getattr(FEW, name), np.mean(rows[FEW][what])
            axes.plot([place], [value], "s", color="tab:red", label=f"LoRA, {task.few[1]}")
            if task.small is not None:
                best = np.mean(rows[SMALL][what])
                axes.axhline(
                    best, color="tab:green", ls=":", label=f"within 2 %: {task.small.name}"
                )
            full = np.array(rows[FULL][what])
            axes.axhline(full.mean(), color="black", ls="--", label="full fine-tuning")
            axes.axhspan(full.min(), full.max(), color="black", alpha=0.08)
            axes.set_xscale("log", base=2)
            axes.set(
                xlabel="rank, at alpha = 2 · rank" if name == "rank" else f"alpha, at rank {RANK}"
            )
            axes.set(title=title)
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
            axes.grid(alpha=0.3)
    figure.legend(
        *grid[0][0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        fontsize="small",
    )
    figure.savefig(file, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
