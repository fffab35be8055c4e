"""One training loop for every way to fine-tune."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

from minilm.data import Split

Pytree = Any
Apply = Callable[[Pytree, Pytree, jax.Array, jax.Array], jax.Array]
"""(frozen, trained, ids, mask) -> logits (batch, classes)."""

EVALUATIONS = 3  # of the validation split, over one training run


@dataclasses.dataclass
class Run:
    """What one way of training came to: what was trained, what it took, how it went."""

    name: str
    trained: Pytree
    seconds: float
    optimiser_bytes: int
    losses: list[float] = dataclasses.field(default_factory=list)  # one a step
    validation: dict[int, float] = dataclasses.field(default_factory=dict)  # step: accuracy
    test_logits: np.ndarray | None = None  # (examples, classes)
    test: float = float("nan")  # accuracy

    @property
    def parameters(self) -> int:
        """How many numbers were trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.trained))

    @property
    def last(self) -> float:
        """Validation accuracy at the end."""
        return self.validation[max(self.validation)]

    def figures(self) -> dict[str, Any]:
        """All but the arrays, for a JSON file."""
        skipped = ("name", "trained", "test_logits")
        figures = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        kept = {key: value for key, value in figures.items() if key not in skipped}
        return {"parameters": self.parameters} | kept


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over the batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The share of the examples whose largest logit is the label's."""
    return float((logits.argmax(-1) == labels).mean())


def nbytes(tree: Pytree) -> int:
    """The memory of a tree's arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def optimiser(peak: float, steps: int) -> optax.GradientTransformation:
    """AdamW, warmed up over a tenth of the steps, then down to zero along a cosine."""
    warmup = max(1, steps // 10)
    return optax.adamw(optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps))


def predict(apply: Callable[..., jax.Array], split: Split, batch: int) -> np.ndarray:
    """`apply(ids, mask)` over a whole split, in batches of one shape: (examples, …)."""
    outputs = []
    for start in range(0, len(split), batch):
        rows = np.arange(start, start + batch) % len(split)  # the last batch is filled from the top
        outputs.append(np.asarray(apply(split.ids[rows], split.mask[rows])))
    return np.concatenate(outputs)[: len(split)]


def train_step(
    apply: Apply, tx: optax.GradientTransformation, *, donate: bool = True
) -> Callable[..., tuple]:
    """A compiled step: (frozen, trained, state, data) -> (trained, state, loss)."""

    @functools.partial(jax.jit, donate_argnums=(1, 2) if donate else ())
    def step(frozen: Pytree, trained: Pytree, state: Pytree, data: Split) -> tuple:
        def loss_of(trained: Pytree) -> jax.Array:
            return cross_entropy(apply(frozen, trained, data.ids, data.mask), data.labels)

        loss, grads = jax.value_and_grad(loss_of)(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    return step


def fit(
    name: str,
    apply: Apply,
    frozen: Pytree,
    trained: Pytree,
    tx: optax.GradientTransformation,
    splits: dict[str, Split],
    *,
    steps: int,
    batch: int,
    seed: int,
) -> Run:
    """Train `trained` on cross-entropy, with a progress bar.

    `frozen` is an argument of the compiled step, not a constant in it, and `trained` is donated:
    the caller's arrays are gone afterwards.
    """
    step = train_step(apply, tx)
    logits_of = jax.jit(apply)

    def answers(split: Split) -> np.ndarray:
        return predict(functools.partial(logits_of, frozen, trained), split, batch)

    started = time.perf_counter()
    state = tx.init(trained)
    run = Run(name, trained, 0.0, nbytes(state))
    interval = math.ceil(steps / EVALUATIONS)
    with tqdm(total=steps, desc=name, unit="step") as bar:
        for i, data in enumerate(batches(splits["train"], steps, batch, seed), 1):
            trained, state, loss = step(frozen, trained, state, data)
            run.losses.append(float(loss))
            if i % interval == 0 or i == steps:
                run.validation[i] = accuracy(
                    answers(splits["validation"]), splits["validation"].labels
                )
                bar.set_postfix(
                    loss=f"{np.mean(run.losses[-interval:]):.3f}",
                    validation=f"{run.validation[i]:.1%}",
                )
            bar.update()
    run.trained = trained
    run.seconds = time.perf_counter() - started
    run.test_logits = answers(splits["test"])
    run.test = accuracy(run.test_logits, splits["test"].labels)
    return run


def batches(split: Split, steps: int, batch: int, seed: int) -> Iterator[Split]:
    """`steps` batches: each pass over the split in a new order, its last partial batch left out."""
    rng = np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = rng.permutation(len(split))
        rows, order = order[:batch], order[batch:]
        yield split.take(rows)
