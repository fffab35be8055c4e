"""What rank, alpha and targets are worth on a real task, against full fine-tuning: three seeds.

    python -m benchmarks.quality                                 # about fifteen minutes of one core
    python -m benchmarks.quality --layers 6 --steps 220 --picture quality.png   # the whole encoder

The task is that of `examples/finetune_minilm.py`. The last `--layers` layers of the encoder are
adapted; what goes before them is frozen, so its output is computed once. Adapters of the same rules
are trained in one step: `lorax_fn.stack`, and `jax.vmap` over factors, scales and batches.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import lorax_fn as lora
from benchmarks.cost import align, machine
from benchmarks.minilm_task import BATCH, HEAD, Split, batches, encoder, load, predict

CONFIG = encoder.Config()
RANKS = (1, 2, 4, 8, 16, 32, 64)  # at alpha = 2 · rank
ALPHAS = (4.0, 8.0, 32.0, 64.0)  # at rank 8
KERNELS, QUERY_VALUE = r".*/kernel", r".*/(query|value)/kernel"
LR, FULL_LR = 2e-3, 3e-4


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row: LoRA with these numbers, or full fine-tuning where there is no rank."""

    rank: int | None
    alpha: float
    targets: str = KERNELS

    @property
    def name(self) -> str:
        if self.rank is None:
            return "full fine-tuning"
        where = "q, v" if self.targets == QUERY_VALUE else "every kernel"
        return f"rank {self.rank}, alpha {self.alpha:g}, {where}"

    @property
    def group(self) -> tuple:
        """Settings that are trained in one step: of one shape, or padded to it at little cost."""
        return self.rank is None, self.targets, (self.rank or 0) > 8

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 1.0


SETTINGS = (
    *(Setting(rank, 2.0 * rank) for rank in RANKS),
    *(Setting(8, alpha) for alpha in ALPHAS),
    Setting(8, 16.0, QUERY_VALUE),
    Setting(None, 0.0),
)


class Beginning(nn.Module):
    """Token ids to hidden states (batch, time, width), before the layers that are adapted."""

    layers: int

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        x = encoder.Embeddings(CONFIG, name="embeddings")(ids)
        for i in range(CONFIG.layers - self.layers):
            x = encoder.Layer(CONFIG, name=str(i))(x, mask.astype(bool))
        return x


class Ending(nn.Module):
    """Hidden states to logits (batch, classes)."""

    layers: int
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        for i in range(CONFIG.layers - self.layers, CONFIG.layers):
            x = encoder.Layer(CONFIG, name=str(i))(x, mask.astype(bool))
        share = mask.astype(x.dtype)[:, :, None]
        pooled = (x * share).sum(1) / share.sum(1)
        unit = pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)
        return nn.Dense(self.classes, name="classifier")(unit * CONFIG.feature_scale)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The function that is adapted, its frozen variables, and splits whose ids are its inputs."""

    model: nn.Module
    variables: dict[str, Any]
    splits: dict[str, Split]

    @functools.cached_property
    def axes(self) -> Any:
        """How the model uses its weights."""
        example = self.splits["train"].take(slice(BATCH))
        return lora.infer_axes(self.model.apply, self.variables, example.ids, example.mask)

    def factors(self, setting: Setting, seed: int) -> Any:
        """The scale is left out of them: it is an operand of the step."""
        of_layers = r"params/\d/.*"
        rule: Any = lora.Full(of_layers)
        if setting.rank is not None:
            rule = lora.LoRA(setting.targets, rank=setting.rank, exclude=r".*/classifier/.*")
        return lora.init(jax.random.key(seed), self.variables, [rule, HEAD], axes=self.axes)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    report = {"machine": machine(), "options": vars(options) | {"json": None, "picture": None}}
    print("  ".join(f"{key} {value}" for key, value in report["machine"].items()))
    problem = prepare(options.layers, options.limit)
    rows: dict[Setting, dict[str, Any]] = {}
    for group in dict.fromkeys(setting.group for setting in SETTINGS):
        settings = [setting for setting in SETTINGS if setting.group == group]
        rows |= train(problem, settings, options)
        print(f"\n{render(rows)}", flush=True)
    report["rows"] = {setting.name: row for setting, row in rows.items()}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.picture:
        draw(options.picture, rows)
    return report


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=2, help="how many of the last are adapted")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="cap the examples of each split")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--picture", type=Path, help="PNG to draw")
    return parser.parse_args(arguments)


def prepare(layers: int, limit: int | None) -> Problem:
    """The task, its frozen beginning computed; the head is the one trained on the frozen model."""
    task = load(limit)
    bert, first = task.variables["params"]["bert"], CONFIG.layers - layers
    frozen = {str(i): bert["encoder"]["layer"][str(i)] for i in range(CONFIG.layers)}
    last = {name: frozen.pop(name) for name in [*frozen][first:]}
    begin = {"params": {"embeddings": bert["embeddings"], **frozen}}
    encode = functools.partial(jax.jit(Beginning(layers).apply), begin)
    head = task.variables["params"]["classifier"]
    splits = {
        name: dataclasses.replace(split, ids=predict(encode, split, BATCH))
        for name, split in task.splits.items()
    }
    model = Ending(layers, head["bias"].shape[0])
    return Problem(model, {"params": {**last, "classifier": head}}, splits)


def train(
    problem: Problem, settings: Sequence[Setting], options: argparse.Namespace
) -> dict[Setting, dict[str, Any]]:
    """All seeds of all settings in one step."""
    each = [(setting, seed) for setting in settings for seed in range(options.seeds)]
    factors = lora.stack([problem.factors(*one) for one in each])
    scales = jnp.array([setting.scale for setting, _ in each], jnp.float32)
    apply = lora.wrap(problem.model.apply)
    peak = FULL_LR if settings[0].rank is None else LR
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, peak, max(1, options.steps // 10), options.steps
    )
    tx = lora.freeze(optax.adam(schedule))

    def loss_of(factors: Any, scale: jax.Array, batch: Split) -> jax.Array:
        logits = apply(problem.variables, scaled(factors, scale), batch.ids, batch.mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(factors: Any, state: Any, batch: Split) -> tuple:
        total = lambda factors: jax.vmap(loss_of)(factors, scales, batch).sum()
        updates, state = tx.update(jax.grad(total)(factors), state, factors)
        return optax.apply_updates(factors, updates), state

    state = tx.init(factors)
    for batch in tqdm(together(problem, each, options.steps), total=options.steps, desc="step"):
        factors, state = step(factors, state, batch)
    rows: dict[Setting, dict[str, Any]] = {}
    for i, (setting, _) in enumerate(each):
        merged = lora.merge(problem.variables, scaled(lora.take(factors, i), scales[i]))
        row = rows.setdefault(setting, {"trained": trained_numbers(problem, setting)})
        for split in ("validation", "test"):
            row.setdefault(split, []).append(accuracy(problem, merged, split))
    return rows


def scaled(factors: Any, scale: Any) -> Any:
    """LoRA's change times a scale that may be traced; `Full` has none."""
    is_lora = lambda node: hasattr(node, "b")
    scale_one = lambda node: dataclasses.replace(node, b=scale * node.b) if is_lora(node) else node
    return jax.tree.map(scale_one, factors, is_leaf=is_lora)


def together(problem: Problem, each: Sequence[tuple[Setting, int]], steps: int) -> Iterable[Split]:
    """Of every step the batches of all adapters, stacked: an adapter's order is its seed's."""
    orders = [batches(problem.splits["train"], steps, BATCH, seed) for _, seed in each]
    for drawn in zip(*orders, strict=True):
        yield jax.tree.map(lambda *parts: np.stack(parts), *drawn)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: nn.Module, params: Any, x: Any, mask: Any) -> jax.Array:
    return model.apply(params, x, mask)


def accuracy(problem: Problem, params: Any, split: str) -> float:
    """Of the plain model with merged params."""
    data = problem.splits[split]
    logits = predict(functools.partial(_logits, problem.model, params), data, 4 * BATCH)
    return float((logits.argmax(-1) == data.labels).mean())


def trained_numbers(problem: Problem, setting: Setting) -> int:
    """How many numbers are trained, the head's left out."""
    factors = jax.eval_shape(lambda: problem.factors(setting, 0))["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(factors | {"classifier": None}))


def render(rows: dict[Setting, dict[str, Any]]) -> str:
    header = ("", "test", "each seed", "validation", "trained", "of the layers")
    whole = rows.get(SETTINGS[-1], {}).get("trained")
    lines = [
        (
            setting.name,
            f"{np.mean(row['test']):.1%}",
            " ".join(f"{value:.1%}" for value in row["test"]),
            f"{np.mean(row['validation']):.1%}",
            f"{row['trained']:,}",
            f"{row['trained'] / whole:.1%}" if whole else "",
        )
        for setting, row in rows.items()
    ]
    return align([header, *lines])


def draw(file: Path, rows: dict[Setting, dict[str, Any]]) -> None:
    """Accuracy against rank and against alpha, full fine-tuning as a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import PercentFormatter

    figure, both = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
    plain = [setting for setting in rows if setting.rank and setting.targets == KERNELS]
    sweeps = {
        "rank": [setting for setting in plain if setting.alpha == 2 * setting.rank],
        "alpha": sorted((s for s in plain if s.rank == 8), key=lambda setting: setting.alpha),
    }
    full = np.array(rows[SETTINGS[-1]]["test"])
    few = rows[SETTINGS[-2]]["test"]
    for axes, (name, settings) in zip(both, sweeps.items(), strict=True):
        places = [getattr(setting, name) for setting in settings]
        values = np.array([rows[setting]["test"] for setting in settings])  # (settings, seeds)
        axes.plot(places, values, "o", color="tab:blue", alpha=0.35, ms=4)
        axes.plot(places, values.mean(1), "-", color="tab:blue", label="LoRA, every kernel")
        axes.plot(
            [8 if name == "rank" else 16.0], [np.mean(few)], "s", color="tab:red", label="q, v"
        )
        axes.axhline(full.mean(), color="black", ls="--", label="full fine-tuning")
        axes.axhspan(full.min(), full.max(), color="black", alpha=0.08)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="rank, at alpha = 2 · rank" if name == "rank" else "alpha, at rank 8")
        axes.grid(alpha=0.3)
    both[0].set(ylabel="test accuracy")
    both[0].yaxis.set_major_formatter(PercentFormatter(xmax=1))
    both[1].legend(fontsize="small")
    figure.savefig(file, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
