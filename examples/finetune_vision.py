"""Adapt a convolutional network to new classes with LoRA, and measure what it forgets.

A small residual network is pretrained on the handwritten digits 0 to 4, then taught 5 to 9 from a
few images of each, in three ways: a linear head on the frozen model, LoRA, full fine-tuning. Each
half of the digits has its own head; how well the old head still answers after the model was adapted
under it is what was kept. LoRA's factors can also be taken off: the base is as it was.

    python examples/finetune_vision.py           # about a minute on two CPU cores

Written to `--out`: the figures and a picture.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from digits import data, figure
from digits.convnet import ConvNet
from digits.data import Split
from minilm.options import positive
from minilm.training import accuracy, cross_entropy, optimiser
from tqdm import tqdm

import lorax_fn as lora

Pytree = Any
HALVES = {"old": "0 to 4", "new": "5 to 9"}
EVALUATIONS = 12  # over one way of adapting


@dataclasses.dataclass
class Run:
    """What one way of adapting came to: accuracies on the test splits, and on the way there."""

    name: str
    trained: int
    new: float
    old: float
    curve: dict[int, tuple[float, float]]  # step: validation accuracy (new, old)
    answers: np.ndarray  # (new test images,)

    def figures(self) -> dict[str, Any]:
        """All that goes into a JSON file."""
        return {"trained": self.trained, "new": self.new, "old": self.old, "curve": self.curve}


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--rank", type=int, default=4, help="rank of the factors")
    add("--alpha", type=float, default=8.0, help="the update is scaled by alpha / rank")
    add("--targets", default=r".*/(block_\d/.*|stem)/kernel", help="what LoRA adapts: a regex")
    add("--lr", type=float, default=5e-3, help="peak learning rate of LoRA and of the head")
    add("--full-lr", type=float, default=1e-3, help="peak learning rate of full fine-tuning")
    add("--shots", type=positive, default=20, help="training images of each new digit")
    add("--steps", type=positive, default=300, help="steps of each way of adapting")
    add("--pretrain-steps", type=positive, default=500, help="steps on the old digits")
    add("--batch", type=positive, default=32, help="images a step")
    add("--seed", type=int, default=0, help="draws the model, the factors, the order of images")
    out = Path(__file__).parent / "out" / "vision"
    add("--out", type=Path, default=out, help="folder for what is written")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict:
    """Returns the figures that are also written to `results.json`."""
    options = parse_options(arguments)
    halves = data.load(options.shots)
    for half, splits in halves.items():
        sizes = ", ".join(f"{len(split)} {name}" for name, split in splits.items())
        print(f"{half} digits, {HALVES[half]}: {sizes}")
    model = ConvNet()
    params = pretrain(model, halves["old"]["train"], options)
    kept = score(model, params, halves["old"]["test"], "old")
    print(f"pretrained: {kept:.1%} of the old digits\n")

    head = lora.Full(r".*/head_new/.*")
    adapters = [lora.LoRA(options.targets, rank=options.rank, alpha=options.alpha), head]
    ways = {
        "linear head": ([head], options.lr),
        f"LoRA, rank {options.rank}": (adapters, options.lr),
        "full fine-tuning": ([lora.Full(r".*", exclude=r".*/head_old/.*")], options.full_lr),
    }
    print_report(model, params, adapters, halves["new"]["train"].images[: options.batch])
    runs = [adapt(name, model, params, *way, halves, options) for name, way in ways.items()]
    print(f"\n{table(runs, kept)}\n")

    options.out.mkdir(parents=True, exist_ok=True)
    figure.draw(options.out / "digits.png", runs, halves["new"]["test"], kept)
    results = {"options": vars(options) | {"out": str(options.out)}, "pretrained": kept}
    results["runs"] = {run.name: run.figures() for run in runs}
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {options.out}: {', '.join(sorted(p.name for p in options.out.iterdir()))}")
    return results


def pretrain(model: ConvNet, split: Split, options: argparse.Namespace) -> Pytree:
    """Params trained on the old digits."""
    params = model.init(jax.random.key(options.seed), split.images[:1])
    tx = optimiser(1e-3, options.pretrain_steps)
    step = train_step(lambda _, params, images: model.apply(params, images)["old"], tx)
    state = tx.init(params)
    drawn = data.batches(split, options.pretrain_steps, options.batch, options.seed)
    with tqdm(drawn, total=options.pretrain_steps, desc="pretraining", unit="step") as bar:
        for batch in bar:
            params, state, loss = step(None, params, state, batch.images, batch.labels)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return params


def adapt(
    name: str,
    model: ConvNet,
    params: Pytree,
    rules: list,
    lr: float,
    halves: dict[str, dict[str, Split]],
    options: argparse.Namespace,
) -> Run:
    """Trains what the rules say on the new digits; `params` stay as they are."""
    new, old = halves["new"], halves["old"]
    axes = lora.infer_axes(model.apply, params, new["train"].images)
    factors = lora.init(jax.random.key(options.seed), params, rules, axes=axes)
    apply = lora.wrap(model.apply)
    tx = lora.freeze(optimiser(lr, options.steps))
    step = train_step(lambda params, factors, images: apply(params, factors, images)["new"], tx)
    state = tx.init(factors)

    def scores(split: str) -> tuple[float, float]:
        merged = lora.merge(params, factors)
        return score(model, merged, new[split], "new"), score(model, merged, old[split], "old")

    curve = {0: scores("validation")}
    interval = -(-options.steps // EVALUATIONS)
    drawn = data.batches(new["train"], options.steps, options.batch, options.seed)
    with tqdm(drawn, total=options.steps, desc=name, unit="step") as bar:
        for i, batch in enumerate(bar, 1):
            factors, state, loss = step(params, factors, state, batch.images, batch.labels)
            if i % interval == 0 or i == options.steps:
                curve[i] = scores("validation")
                bar.set_postfix(loss=f"{loss:.3f}", new=f"{curve[i][0]:.1%}")
    answers = logits(model, lora.merge(params, factors), new["test"].images)["new"].argmax(-1)
    trained = sum(leaf.size for leaf in jax.tree.leaves(factors))
    return Run(name, trained, *scores("test"), curve, np.asarray(answers))


def train_step(forward: Callable[..., jax.Array], tx: Any) -> Callable[..., tuple]:
    """A compiled step: (frozen, trained, state, images, labels) -> (trained, state, loss)."""

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(frozen: Pytree, trained: Pytree, state: Pytree, images: Any, labels: Any) -> tuple:
        def loss_of(trained: Pytree) -> jax.Array:
            return cross_entropy(forward(frozen, trained, images), labels)

        loss, grads = jax.value_and_grad(loss_of)(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    return step


@functools.partial(jax.jit, static_argnums=0)
def logits(model: ConvNet, params: Pytree, images: Any) -> dict[str, jax.Array]:
    """The plain model's answers through both heads."""
    return model.apply(params, images)


def score(model: ConvNet, params: Pytree, split: Split, half: str) -> float:
    """Accuracy of the plain model with these params."""
    return accuracy(np.asarray(logits(model, params, split.images)[half]), split.labels)


def print_report(model: ConvNet, params: Pytree, rules: list, images: Any) -> None:
    """What LoRA adapts, and what that costs."""
    axes = lora.infer_axes(model.apply, params, images)
    factors = lora.init(jax.random.key(0), params, rules, axes=axes)
    print(lora.inspect(model.apply, params, factors, images), "\n")


def table(runs: Sequence[Run], kept: float) -> str:
    """The runs, aligned."""
    rows = [("accuracy on the test splits", "new digits", "old digits", "forgotten", "trained")]
    for run in runs:
        forgotten = f"{100 * (kept - run.old):.1f} points"
        rows.append((run.name, f"{run.new:.1%}", f"{run.old:.1%}", forgotten, f"{run.trained:,}"))
    rows.append(("any of them, taken off again", "", f"{kept:.1%}", "0.0 points", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        row[0].ljust(widths[0])
        + "".join(cell.rjust(width + 3) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


if __name__ == "__main__":
    main()
