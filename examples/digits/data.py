"""Handwritten digits (1,797 images of 8 × 8, in scikit-learn's package), in two halves.

The model is pretrained on the digits 0 to 4 and adapted to 5 to 9. Each half has its own labels 0
to 4, so that each can have a head of its own.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from sklearn.datasets import load_digits

CLASSES = 5  # in each half
SHARES = (0.6, 0.15)  # of each half: to train and to validate; the rest to test


@dataclasses.dataclass(frozen=True)
class Split:
    """Images (examples, 8, 8, 1) from -1 to 1, float32, and labels (examples,), int32."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray | slice) -> "Split":
        """The examples of these indices."""
        return Split(self.images[rows], self.labels[rows])


def load(shots: int | None = None) -> dict[str, dict[str, Split]]:
    """{"old" and "new": {"train", "validation" and "test"}}, the same on every call.

    `shots` caps the training images of each new digit: adaptation has few examples.
    """
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images[order, :, :, None] / 8.0 - 1.0).astype(np.float32)
    labels = digits.target[order].astype(np.int32)
    halves = {}
    for half, first in (("old", 0), ("new", CLASSES)):
        rows = np.flatnonzero((labels >= first) & (labels < first + CLASSES))
        train, validation, test = np.split(
            rows, np.cumsum(np.multiply(SHARES, len(rows)), dtype=int)
        )
        if half == "new" and shots is not None:
            train = np.concatenate(
                [train[labels[train] == first + i][:shots] for i in range(CLASSES)]
            )
        splits = {"train": train, "validation": validation, "test": test}
        halves[half] = {name: Split(images[i], labels[i] - first) for name, i in splits.items()}
    return halves


def batches(split: Split, steps: int, batch: int, seed: int) -> Iterator[Split]:
    """`steps` batches of one size, each image moved by a pixel at most; each pass in new order."""
    rng = np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    for _ in range(steps):
        while len(order) < batch:
            order = np.concatenate([order, rng.permutation(len(split))])
        rows, order = order[:batch], order[batch:]
        taken = split.take(rows)
        shifts = rng.integers(-1, 2, (batch, 2))
        moved = [_shifted(image, *shift) for image, shift in zip(taken.images, shifts, strict=True)]
        yield Split(np.stack(moved), taken.labels)


def _shifted(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """The image moved by so many pixels, what comes in white."""
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=-1.0)
    return padded[1 - down : 9 - down, 1 - right : 9 - right]
