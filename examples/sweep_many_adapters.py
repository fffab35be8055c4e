"""A sweep of LoRA's hyperparameters in one run: every combination is an adapter of its own.

The task and the model are those of `finetune_minilm.py`. All adapters are stacked, and `jax.vmap`
trains them side by side over one frozen encoder: rank, alpha and learning rate differ, the batches
are the same, and each adapter learns what it would learn alone (`--check` shows it for the best).

    python examples/sweep_many_adapters.py --ranks 2 8 32 --alphas 16 --rates 1e-3 2e-3 4e-3

Written to `--out`: a picture, the figures, and the factors of the best adapter.
"""

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from minilm import data, weights
from minilm.data import Split
from minilm.encoder import Classifier
from minilm.linear_head import head_on_encoder
from minilm.options import positive
from minilm.sweep_figure import draw
from minilm.training import accuracy, batches, cross_entropy, optimiser, predict
from tqdm import tqdm

import lorax_fn as lora

Pytree = Any
TOLERANCE = 1e-3  # largest difference of a loss: the same sums in another order, step after step


@dataclasses.dataclass
class Trial:
    """One combination of hyperparameters, and what came of it."""

    rank: int
    alpha: float
    rate: float
    parameters: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)  # one a step
    validation: float = float("nan")  # accuracy
    test: float = float("nan")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--ranks", type=positive, nargs="+", default=[2, 8, 32], help="ranks of the factors")
    add("--alphas", type=float, nargs="+", default=[16.0], help="scaled by alpha / rank")
    add("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3], help="peak learning rates")
    add("--steps", type=positive, default=100, help="training steps")
    add("--batch", type=positive, default=32, help="examples a step")
    add("--length", type=positive, default=32, help="tokens of a docstring that are read")
    add("--seed", type=int, default=0, help="draws the factors and the order of the examples")
    add("--limit", type=positive, help="cap the examples of each split, for a quick look")
    add("--check", action="store_true", help="train the best one alone as well, and compare")
    out = Path(__file__).parent / "out" / "sweep"
    add("--out", type=Path, default=out, help="folder for what is written")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns the figures that are also written to `results.json`."""
    options = parse_options(arguments)
    grid = itertools.product(options.ranks, options.alphas, options.rates)
    trials = [Trial(*combination) for combination in grid]
    splits = data.load(data.collect(), weights.load_tokenizer(options.length), options.limit)
    published = jax.device_put(weights.load_params())
    model = Classifier(len(data.PACKAGES))
    head = head_on_encoder(published, splits, len(data.PACKAGES), options.batch)
    variables = {"params": {"bert": published, "classifier": head.trained}}

    each = make_factors(model, variables, splits, trials, options.seed)
    stacked = train(model, variables, lora.stack(each), trials, splits["train"], options)
    evaluate(model, variables, stacked, trials, splits, options.batch)
    best = max(range(len(trials)), key=lambda i: trials[i].validation)
    print(f"\n{table(trials, best)}\nfrozen encoder, linear head: {head.last:.1%}, {head.test:.1%}")

    results: dict[str, Any] = {"best": best, "trials": list(map(dataclasses.asdict, trials))}
    if options.check:
        results["difference"] = difference_from_alone(
            model, variables, each[best], trials[best], splits["train"], options
        )
        print(f"the best one alone: max |loss difference| {results['difference']:.1e}")
    chosen = without_padding(lora.take(stacked, best), each[best])
    write(options.out, trials, best, chosen, head.last, results)
    return results


def make_factors(
    model: Classifier,
    variables: Pytree,
    splits: dict[str, Split],
    trials: Sequence[Trial],
    seed: int,
) -> list[Pytree]:
    """The factors of each trial, of scale 1: the trials' scales are arrays, see `scaled`."""
    example = splits["train"].take(slice(2))
    axes = lora.infer_axes(model.apply, variables, example.ids, example.mask)
    each = []
    for trial in trials:
        rules = [
            lora.LoRA(r".*/encoder/.*/kernel", rank=trial.rank),
            lora.Full(r".*/classifier/.*"),
        ]
        each.append(lora.init(jax.random.key(seed), variables, rules, axes=axes))
        trial.parameters = sum(leaf.size for leaf in jax.tree.leaves(each[-1]))
    return each


def scaled(factors: Pytree, scale: jax.Array) -> Pytree:
    """B times alpha/rank: within the loss, so that the optimiser moves B as it does in one run.

    A node's own scale is a Python number, and one for all that are stacked.
    """

    def has_b(node: Any) -> bool:
        return hasattr(node, "b")

    return jax.tree.map(
        lambda node: dataclasses.replace(node, b=node.b * scale) if has_b(node) else node,
        factors,
        is_leaf=has_b,
    )


def logits_of(model: Classifier) -> Callable[..., jax.Array]:
    """(variables, factors, scale, ids, mask) -> (batch, classes), of one adapter."""
    apply = lora.wrap(model.apply)
    return lambda variables, factors, scale, ids, mask: apply(
        variables, scaled(factors, scale), ids, mask
    )


def step_of(model: Classifier, steps: int) -> Callable[..., tuple[Pytree, Pytree, jax.Array]]:
    """One step of one adapter; scale and rate may be traced."""
    logits = logits_of(model)
    tx = lora.freeze(optimiser(1.0, steps))

    def step(
        factors: Pytree, state: Pytree, scale: Any, rate: Any, variables: Pytree, batch: Split
    ) -> tuple[Pytree, Pytree, jax.Array]:
        def loss_of(factors: Pytree) -> jax.Array:
            return cross_entropy(
                logits(variables, factors, scale, batch.ids, batch.mask), batch.labels
            )

        loss, grads = jax.value_and_grad(loss_of)(factors)
        updates, state = tx.update(grads, state, factors)
        updates = optax.tree_utils.tree_scale(rate, updates)  # AdamW moves in proportion to it
        return optax.apply_updates(factors, updates), state, loss

    return step


def train(
    model: Classifier,
    variables: Pytree,
    stacked: Pytree,
    trials: Sequence[Trial],
    split: Split,
    options: argparse.Namespace,
) -> Pytree:
    """All trials at once: the stacked factors after the last step, the losses in the trials."""
    in_axes = (0, 0, 0, 0, None, None)  # one encoder and one batch for all
    step = jax.jit(jax.vmap(step_of(model, options.steps), in_axes), donate_argnums=(0, 1))
    scales, rates = columns(trials)
    state = jax.vmap(lora.freeze(optimiser(1.0, options.steps)).init)(stacked)
    drawn = batches(split, options.steps, options.batch, options.seed)
    with tqdm(drawn, total=options.steps, desc=f"{len(trials)} adapters", unit="step") as bar:
        for batch in bar:
            stacked, state, losses = step(stacked, state, scales, rates, variables, batch)
            for trial, loss in zip(trials, np.asarray(losses), strict=True):
                trial.losses.append(float(loss))
            bar.set_postfix(best=f"{losses.min():.3f}", worst=f"{losses.max():.3f}")
    return stacked


def columns(trials: Sequence[Trial]) -> tuple[jax.Array, jax.Array]:
    """The scales and the learning rates, an entry for each trial."""
    return jnp.array([t.scale for t in trials]), jnp.array([t.rate for t in trials])


def evaluate(
    model: Classifier,
    variables: Pytree,
    stacked: Pytree,
    trials: Sequence[Trial],
    splits: dict[str, Split],
    batch: int,
) -> None:
    """Fills in the trials' accuracies."""
    many = jax.jit(jax.vmap(logits_of(model), (None, 0, 0, None, None), out_axes=1))
    answer = functools.partial(many, variables, stacked, columns(trials)[0])
    for name in ("validation", "test"):
        logits = predict(answer, splits[name], batch)  # (examples, trials, classes)
        for i, trial in enumerate(trials):
            setattr(trial, name, accuracy(logits[:, i], splits[name].labels))


def difference_from_alone(
    model: Classifier,
    variables: Pytree,
    factors: Pytree,
    trial: Trial,
    split: Split,
    options: argparse.Namespace,
) -> float:
    """The same steps of one trial alone. Raises if the losses do not agree."""
    step = jax.jit(step_of(model, options.steps))
    state = lora.freeze(optimiser(1.0, options.steps)).init(factors)
    losses = []
    for batch in batches(split, options.steps, options.batch, options.seed):
        factors, state, loss = step(factors, state, trial.scale, trial.rate, variables, batch)
        losses.append(float(loss))
    difference = float(np.abs(np.subtract(losses, trial.losses)).max())
    if not difference <= TOLERANCE:
        raise RuntimeError(f"a loss differs by {difference}, over {TOLERANCE}")
    return difference


def without_padding(factors: Pytree, like: Pytree) -> Pytree:
    """The factors cut to the shapes of those that were stacked: padded columns are still zero."""
    return jax.tree.map(lambda x, own: x[tuple(map(slice, own.shape))], factors, like)


def table(trials: Sequence[Trial], best: int) -> str:
    """A line for each trial, the best on validation marked."""
    lines = ["rank   alpha      rate    trained    last loss   validation     test"]
    for i, t in enumerate(trials):
        last = np.mean(t.losses[-10:])
        lines.append(
            f"{t.rank:4d}  {t.alpha:6g}  {t.rate:8.1e}  {t.parameters:9,}  {last:11.3f}"
            f"  {t.validation:11.1%}  {t.test:7.1%}{'  best' if i == best else ''}"
        )
    return "\n".join(lines)


def write(
    out: Path,
    trials: Sequence[Trial],
    best: int,
    factors: Pytree,
    frozen: float,
    results: dict[str, Any],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    draw(out / "sweep.png", trials, best, frozen)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    scale = {"rank": str(trials[best].rank), "alpha": str(trials[best].alpha)}
    weights.save_tree(out / "best.safetensors", factors, scale)
    print(f"written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


if __name__ == "__main__":
    main()
