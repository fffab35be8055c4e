"""The tasks of `benchmarks/quality.py`: a frozen model, what adapts it, examples, answers.

digits   `examples/finetune_vision.py`: a residual network pretrained on the digits 0 to 4 learns
5 to 9 from 20 images of each; what it still knows of 0 to 4 is measured too
minilm   `examples/finetune_minilm.py`: the whole encoder, or its last layers alone; what goes
before them is frozen then, so its output is computed once
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import lorax_fn as lora
from benchmarks.minilm_task import (
    BATCH,
    Task as MiniLM,
    batches,
    encoder,
    finetune_vision,
    load,
    predict,
)

digits = finetune_vision.data
CONFIG = encoder.Config()
Pytree = Any


@dataclasses.dataclass(frozen=True)
class Examples:
    """Inputs, each (examples, …), and labels (examples,)."""

    inputs: tuple[np.ndarray, ...]
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Small:
    """The best that was found within two per cent of the parameters, by validation accuracy."""

    rules: tuple[lora.LoRA | lora.Full, ...]
    name: str
    lr: float
    b_ratio: float = 1.0  # LoRA+: how much faster B learns than A


@dataclasses.dataclass(frozen=True)
class Task:
    """One task, as `benchmarks/quality.py` sweeps over it."""

    apply: Callable[..., jax.Array]  # (params, *inputs) -> logits
    params: Pytree
    train: Callable[[int, int], Iterator[Examples]]  # (steps, seed) -> batches
    test: Examples
    kernels: str  # all weights that can be adapted: a regex
    few: tuple[str, str]  # the regex of some of them, and what they are
    head: lora.Full  # trained in every setting
    frozen: str  # what full fine-tuning leaves alone: a regex
    lr: float
    full_lr: float
    ranks: tuple[int, ...]
    at_once: int  # adapters that are trained in one step
    small: Small | None = None
    kept: Callable[[Pytree], float] | None = None  # accuracy of merged params on what was known

    @functools.cached_property
    def axes(self) -> Pytree:
        """How the model uses its weights."""
        return lora.infer_axes(self.apply, self.params, *(x[:2] for x in self.test.inputs))

    def accuracy(self, merged: Pytree) -> float:
        """Of the plain model on the test split."""
        logits = np.asarray(_answers(self.apply, merged, *self.test.inputs))
        return float((logits.argmax(-1) == self.test.labels).mean())


@functools.partial(jax.jit, static_argnums=0)
def _answers(apply: Callable[..., jax.Array], params: Pytree, *inputs: Any) -> jax.Array:
    return apply(params, *inputs)


def digits_task(_: argparse.Namespace) -> Task:
    """Pretrains, in a minute."""
    options = finetune_vision.parse_options([])
    model, halves = finetune_vision.ConvNet(), digits.load(options.shots)
    new, old = halves["new"], halves["old"]["test"]

    def train(steps: int, seed: int) -> Iterator[Examples]:
        for batch in digits.batches(new["train"], steps, BATCH, seed):
            yield Examples((batch.images,), batch.labels)

    return Task(
        apply=lambda params, images: model.apply(params, images)["new"],
        params=finetune_vision.pretrain(model, halves["old"]["train"], options),
        train=train,
        test=Examples((new["test"].images,), new["test"].labels),
        kernels=r".*/block_\d/.*/kernel",
        few=(r".*/block_2/.*/kernel", "the last block"),
        head=lora.Full(r".*/head_new/.*"),
        frozen=r".*/head_old/.*",
        lr=options.lr,
        full_lr=options.full_lr,
        ranks=(1, 2, 4, 8, 16, 32),  # the smallest kernel has 32 outputs
        at_once=1,  # many convolutions with kernels of their own are slow on a CPU
        small=Small(
            rules=(
                lora.LoRA(r".*/(block_\d/.*|stem)/kernel", rank=1, alpha=8.0),
                lora.Full(r".*/norm[^/]*/.*"),
            ),
            name="rank 1, alpha 8, kernels and stem; norms",
            lr=5e-3,
        ),
        kept=lambda params: finetune_vision.score(model, params, old, "old"),
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
        unit = pooled / jax.numpy.linalg.norm(pooled, axis=-1, keepdims=True)
        return nn.Dense(self.classes, name="classifier")(unit * CONFIG.feature_scale)


def minilm_task(options: argparse.Namespace) -> Task:
    """Its head is the one trained on the frozen encoder."""
    whole = load(options.limit)
    if options.layers == CONFIG.layers:
        return _whole_minilm(whole)
    return _end_of_minilm(whole, options.layers)


def _whole_minilm(whole: MiniLM) -> Task:
    kernels, test = r".*/encoder/.*/kernel", whole.splits["test"]

    def train(steps: int, seed: int) -> Iterator[Examples]:
        for batch in batches(whole.splits["train"], steps, BATCH, seed):
            yield Examples((batch.ids, batch.mask), batch.labels)

    return Task(
        apply=whole.model.apply,
        params=whole.variables,
        train=train,
        test=Examples((test.ids, test.mask), test.labels),
        kernels=kernels,
        few=(r".*/(query|value)/kernel", "q, v"),
        full_lr=2e-4,
        at_once=6,  # more do not go faster: the products are large enough
        small=Small(
            rules=(
                lora.LoRA(kernels, rank=4, alpha=8.0),
                lora.LoRA(r".*/word_embeddings/embedding", rank=8, alpha=16.0),
            ),
            name="rank 4, every kernel; rank 8, words",
            lr=1e-3,
            b_ratio=4.0,
        ),
        **_MINILM,
    )


def _end_of_minilm(whole: MiniLM, layers: int) -> Task:
    bert, head = whole.variables["params"]["bert"], whole.variables["params"]["classifier"]
    names = [str(i) for i in range(CONFIG.layers)]
    parts = bert["encoder"]["layer"]
    last = {name: parts[name] for name in names[CONFIG.layers - layers :]}
    first = {name: parts[name] for name in names if name not in last}
    begin = {"params": {"embeddings": bert["embeddings"], **first}}
    encode = functools.partial(jax.jit(Beginning(layers).apply), begin)
    splits = {
        name: dataclasses.replace(
            whole.splits[name], ids=predict(encode, whole.splits[name], BATCH)
        )
        for name in ("train", "test")
    }

    def train(steps: int, seed: int) -> Iterator[Examples]:
        for batch in batches(splits["train"], steps, BATCH, seed):
            yield Examples((batch.ids, batch.mask), batch.labels)

    test = splits["test"]
    return Task(
        apply=Ending(layers, head["bias"].shape[0]).apply,
        params={"params": {**last, "classifier": head}},
        train=train,
        test=Examples((test.ids, test.mask), test.labels),
        kernels=r"params/\d/.*/kernel",
        few=(r"params/\d/.*/(query|value)/kernel", "q, v"),
        full_lr=3e-4,
        at_once=24,
        **_MINILM,
    )


_MINILM: dict[str, Any] = {
    "head": lora.Full(r".*/classifier/.*"),
    "frozen": r".*/no_such_leaf",
    "lr": 2e-3,
    "ranks": (1, 2, 4, 8, 16, 32, 64),
}
TASKS = {"digits": digits_task, "minilm": minilm_task}
