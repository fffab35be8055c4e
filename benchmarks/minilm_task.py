"""The task of `examples/finetune_minilm.py`, for comparisons: the same model, data and loop."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import finetune_vision
from minilm import data, encoder, weights
from minilm.data import Split
from minilm.encoder import Classifier
from minilm.linear_head import head_on_encoder
from minilm.training import Run, batches, fit, optimiser, predict, train_step

import lorax_fn as lora

__all__ = [
    "BATCH",
    "KERNELS",
    "Run",
    "Split",
    "Task",
    "batches",
    "encoder",
    "finetune_vision",
    "fit",
    "load",
    "optimiser",
    "predict",
    "train_step",
]

KERNELS = r".*/encoder/.*/kernel"
HEAD = lora.Full(r".*/classifier/.*")
BATCH = 32
LENGTH = 32


@dataclasses.dataclass(frozen=True)
class Task:
    """A pretrained encoder with a linear head that was trained on it, and three splits."""

    model: Classifier
    variables: dict[str, Any]
    splits: dict[str, Split]

    @functools.cached_property
    def axes(self) -> Any:
        """How the model uses its weights."""
        example = self.example
        return lora.infer_axes(self.model.apply, self.variables, example.ids, example.mask)

    @property
    def example(self) -> Split:
        """A batch."""
        return self.splits["train"].take(slice(BATCH))

    def factors(self, rules: list[Any], seed: int, *, head: bool = True) -> Any:
        """What the rules make, the head trained too. Rules that look at data see three batches."""
        options: dict[str, Any] = {}
        if any(getattr(rule, "init", None) in LOOKING_AT_DATA for rule in rules):
            rows = np.random.default_rng(seed).permutation(len(self.splits["train"]))
            options["batches"] = [
                (self.splits["train"].take(rows[i * BATCH : (i + 1) * BATCH]),) for i in range(3)
            ]
            options["apply_fn"] = self.loss
        rules = [*rules, HEAD] if head else rules
        key = jax.random.key(seed)
        return lora.init(key, self.variables, rules, axes=self.axes, **options)

    def loss(self, variables: Any, batch: Split) -> jax.Array:
        """Cross-entropy of the plain model."""
        logits = self.model.apply(variables, batch.ids, batch.mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


LOOKING_AT_DATA = ("eva", "corda", "corda_kpm", "lora_ga")


def load(limit: int | None = None) -> Task:
    """Reads the weights and the data, and trains the head on the frozen encoder."""
    published = jax.device_put(weights.load_params())
    splits = data.load(data.collect(), weights.load_tokenizer(LENGTH), limit)
    classes = len(data.PACKAGES)
    frozen = head_on_encoder(published, splits, classes, BATCH)
    variables = {"params": {"bert": published, "classifier": frozen.trained}}
    return Task(Classifier(classes), variables, splits)
