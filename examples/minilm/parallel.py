"""What the examples for several devices share: all but the training loop itself."""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

import lorax_fn as lora
from minilm import data, weights
from minilm.data import Split
from minilm.encoder import Classifier
from minilm.linear_head import head_on_encoder
from minilm.options import positive
from minilm.scanned import ScannedClassifier
from minilm.training import accuracy, batches, nbytes, optimiser, predict, train_step

Pytree = Any
Model = Classifier | ScannedClassifier

RULES = [
    lora.LoRA(r".*/encoder/.*/kernel", rank=8, alpha=16.0),
    lora.Full(r".*/classifier/.*"),
]
CLASSIFIER = Classifier(len(data.PACKAGES))
TOLERANCE = 1e-3  # largest difference of a loss: the same sums in another order, step after step


@dataclasses.dataclass
class Job:
    """What a training loop gets: the frozen model, the factors to train, the data.

    `alone` is the model as one device runs it, to compare with.
    """

    options: argparse.Namespace
    model: Model
    alone: Model
    splits: dict[str, Split]
    variables: Pytree
    factors: Pytree
    tx: optax.GradientTransformation

    @property
    def apply(self) -> Callable[..., jax.Array]:
        """(variables, factors, ids, mask) -> logits (batch, classes)."""
        return lora.wrap(self.model.apply)

    def batches(self, done: int = 0) -> Iterator[Split]:
        """The training batches after the first `done`, with a progress bar."""
        options = self.options
        drawn = batches(self.splits["train"], options.steps, options.batch, options.seed)
        name = f"{jax.device_count()} devices"
        left = itertools.islice(drawn, done, None)
        return iter(tqdm(left, initial=done, total=options.steps, desc=name, unit="step"))


def parse_options(
    description: str,
    arguments: Sequence[str] | None,
    *,
    more: Callable[[Callable[..., Any]], None] | None = None,
    devices: Callable[[argparse.Namespace], int] | None = None,
    resumable: bool = False,
) -> argparse.Namespace:
    """The options that all of these examples have, and `more`."""
    parser = argparse.ArgumentParser(
        description=description.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--lr", type=float, default=2e-3, help="peak learning rate")
    add("--steps", type=positive, default=100, help="training steps")
    add("--batch", type=positive, default=32, help="examples a step, over all devices")
    add("--length", type=positive, default=32, help="tokens of a docstring that are read")
    add("--seed", type=int, default=0, help="draws the factors and the order of the examples")
    add("--limit", type=positive, help="cap the examples of each split, for a quick look")
    add("--check", action="store_true", help="do the same on one device, and compare")
    if resumable:
        add("--checkpoints", type=Path, help="folder to save to as it goes, and to resume from")
    if more:
        more(add)
    options = parser.parse_args(arguments)
    count = devices(options) if devices else jax.device_count()
    if options.batch % count:
        parser.error(f"--batch {options.batch} does not divide among {count} devices")
    return options


def prepare(
    options: argparse.Namespace,
    place: Callable[[Pytree], Pytree] = lambda variables: variables,
    model: Model = CLASSIFIER,
    alone: Model | None = None,
) -> Job:
    """The published encoder with a head trained on its embeddings, `place`d; factors beside it.

    Args:
        options: of `parse_options`.
        place: makes of `Classifier`'s variables what `model` takes, and puts them on devices.
        model: what is trained.
        alone: what computes the same on one device, if that is not `model`.
    """
    splits = data.load(data.collect(), weights.load_tokenizer(options.length), options.limit)
    classes = len(data.PACKAGES)
    published = jax.device_put(weights.load_params())
    head = head_on_encoder(published, splits, classes, options.batch).trained
    variables = place({"params": {"bert": published, "classifier": head}})
    example = splits["train"].take(slice(options.batch))
    axes = lora.infer_axes(model.apply, variables, example.ids, example.mask)
    factors = lora.init(jax.random.key(options.seed), variables, RULES, axes=axes)
    tx = lora.freeze(optimiser(options.lr, options.steps))
    return Job(options, model, alone or model, splits, variables, factors, tx)


def report(
    job: Job, trained: Pytree, losses: list[float], devices: int | None = None
) -> dict[str, Any]:
    """Prints the test accuracy of the merged model; with `--check`, compares with one device.

    Args:
        job: what was to do.
        trained: the factors after the last step.
        losses: of the steps that were done now, the last ones of the job.
        devices: how many it ran on; this process's by default.

    Returns:
        The losses, the accuracy, and the largest difference of a loss from one device's.
    """
    merged = jax.device_put(lora.merge(job.variables, trained), jax.local_devices()[0])
    answer = functools.partial(jax.jit(job.alone.apply), merged)
    test = job.splits["test"]
    results: dict[str, Any] = {"losses": losses}
    results["test"] = accuracy(predict(answer, test, job.options.batch), test.labels)
    print(
        f"{devices or jax.device_count()} devices; {nbytes(job.variables):,} bytes are frozen, "
        f"{nbytes(job.factors):,} trained; test accuracy {results['test']:.1%}"
    )
    if job.options.check:
        results["difference"] = difference_from_one_device(job, losses)
        print(f"against one device: max |loss difference| {results['difference']:.1e}")
    return results


def difference_from_one_device(job: Job, losses: list[float]) -> float:
    """The same steps with the whole batch on one device. Raises if the losses do not agree."""
    variables, factors = jax.device_put((job.variables, job.factors), jax.local_devices()[0])
    step = train_step(lora.wrap(job.alone.apply), job.tx, donate=False)
    options, state, alone = job.options, job.tx.init(factors), []
    for batch in batches(job.splits["train"], options.steps, options.batch, options.seed):
        factors, state, loss = step(variables, factors, state, batch)
        alone.append(float(loss))
    same_steps = alone[len(alone) - len(losses) :]
    difference = float(np.abs(np.subtract(losses, same_steps)).max(initial=0.0))
    if not difference <= TOLERANCE:
        raise RuntimeError(f"a loss differs by {difference}, over {TOLERANCE}")
    return difference
