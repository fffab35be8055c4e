"""The rival: a linear head on the features of the encoder left frozen."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from minilm.data import Split
from minilm.encoder import Config, SentenceEncoder
from minilm.training import Run, accuracy, cross_entropy, nbytes, predict

Head = dict[str, jax.Array]  # kernel (width, classes), bias (classes,)

L2_PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2)  # the validation split chooses
STEPS = 300  # of the whole training split; by then the loss moves in its fifth digit
LEARNING_RATE = 0.1


def logits_of(head: Head, features: Any) -> jax.Array:
    """(examples, width) to (examples, classes)."""
    return features @ head["kernel"] + head["bias"]


def head_on_encoder(published: Any, splits: dict[str, Split], classes: int, batch: int) -> Run:
    """The encoder as published; only a linear head on its embeddings is trained."""
    encode = functools.partial(jax.jit(SentenceEncoder().apply), {"params": published})

    def featurise(split: Split) -> np.ndarray:
        return predict(encode, split, batch) * Config().feature_scale

    return fit_head(featurise, splits, classes)


def fit_head(
    featurise: Callable[[Split], np.ndarray], splits: dict[str, Split], classes: int
) -> Run:
    """Multinomial logistic regression on the features of `featurise`, (examples, width).

    Adam on the whole training split, once for each of `L2_PENALTIES` and all of them at a time;
    the head that does best on the validation split is kept.
    """
    started = time.perf_counter()
    features = {name: featurise(split) for name, split in splits.items()}
    inputs, labels = jnp.asarray(features["train"]), jnp.asarray(splits["train"].labels)
    start = {"kernel": jnp.zeros((inputs.shape[1], classes)), "bias": jnp.zeros(classes)}
    tx = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, STEPS))

    def train(penalty: jax.Array) -> tuple[Head, jax.Array]:
        def loss_of(head: Head) -> jax.Array:
            l2 = penalty * jnp.square(head["kernel"]).sum()
            return cross_entropy(logits_of(head, inputs), labels) + l2

        def step(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
            head, state = carry
            loss, grads = jax.value_and_grad(loss_of)(head)
            updates, state = tx.update(grads, state, head)
            return (optax.apply_updates(head, updates), state), loss

        (head, _), losses = jax.lax.scan(step, (start, tx.init(start)), length=STEPS)
        return head, losses

    heads, losses = jax.jit(jax.vmap(train))(jnp.array(L2_PENALTIES))

    def answers(split: str) -> np.ndarray:  # (penalties, examples, classes)
        return np.asarray(jax.vmap(logits_of, (0, None))(heads, features[split]))

    validation = [accuracy(x, splits["validation"].labels) for x in answers("validation")]
    best = int(np.argmax(validation))
    seconds = time.perf_counter() - started
    test_logits = answers("test")[best]
    return Run(
        name="frozen encoder, linear head",
        trained=jax.tree.map(lambda stacked: stacked[best], heads),
        seconds=seconds,
        optimiser_bytes=nbytes(tx.init(start)),
        losses=losses[best].tolist(),
        validation={STEPS: validation[best]},
        test_logits=test_logits,
        test=accuracy(test_logits, splits["test"].labels),
    )
