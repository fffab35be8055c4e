"""The one problem that all solve: sizes, weights, initial factors and tokens, in a folder.

Needs numpy alone, so that the library that is not written for JAX can read it too.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

TARGETS = ("query", "key", "value", "out", "up", "down", "head")  # every kernel
HEAD_DIM = 64
STEPS = 3  # whose losses are compared
LEARNING_RATE = 3e-3  # of AdamW: three steps shall move the loss
WEIGHT_DECAY = 1e-4  # optax's default, and given to the others


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the model (as `benchmarks.model.Config`), the factors and a batch."""

    layers: int
    width: int
    batch: int
    length: int
    rank: int = 8
    alpha: float = 16.0
    vocabulary: int = 256

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Problem:
    """`weights` by path ("layer_0/up/kernel"); `a` and `b` by the path of their kernel."""

    sizes: Sizes
    weights: dict[str, np.ndarray]
    a: dict[str, np.ndarray]
    b: dict[str, np.ndarray]
    tokens: np.ndarray


def make(sizes: Sizes, weights: dict[str, np.ndarray]) -> Problem:
    """Factors for every targeted kernel, as in the middle of training: both random."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: (0.03 * rng.standard_normal(shape)).astype(np.float32)
    kernels = {p: w for p, w in weights.items() if p.endswith("/kernel")}
    a = {path: draw(kernel.shape[0], sizes.rank) for path, kernel in kernels.items()}
    b = {path: draw(sizes.rank, kernel.shape[1]) for path, kernel in kernels.items()}
    tokens = rng.integers(0, sizes.vocabulary, (sizes.batch, sizes.length)).astype(np.int32)
    return Problem(sizes, weights, a, b, tokens)


def write(folder: Path, problem: Problem) -> None:
    """`sizes.json` and `arrays.npz`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sizes.json").write_text(json.dumps(dataclasses.asdict(problem.sizes)))
    arrays = {"tokens": problem.tokens}
    for kind in ("weights", "a", "b"):
        arrays |= {f"{kind}:{path}": array for path, array in getattr(problem, kind).items()}
    np.savez(folder / "arrays.npz", **arrays)


def read(folder: Path) -> Problem:
    """What `write` wrote."""
    sizes = Sizes(**json.loads((folder / "sizes.json").read_text()))
    with np.load(folder / "arrays.npz", allow_pickle=False) as file:
        arrays = dict(file)
    parts: dict[str, dict[str, np.ndarray]] = {"weights": {}, "a": {}, "b": {}}
    for name, array in arrays.items():
        kind, _, path = name.partition(":")
        if path:
            parts[kind][path] = array
    return Problem(sizes, tokens=arrays["tokens"], **parts)


def nested(flat: dict[str, np.ndarray]) -> dict:
    """{"a/b": x} to {"a": {"b": x}}."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
