"""`compare`: two adapters of one base side by side, as a table and a picture."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from os import PathLike
from typing import Any

import jax
import numpy as np

from lorax_fn.adapters import FullDelta, LoRAFactors
from lorax_fn.adapters.matrices import product_svd
from lorax_fn.errors import LoraError
from lorax_fn.node_arithmetic import check_alike, check_sums, matrices
from lorax_fn.pairing import align
from lorax_fn.report import aligned

Pytree = Any


@dataclasses.dataclass(frozen=True)
class ComparisonRow:
    """One weight's changes ΔW by f and by g; a layer or an expert of a stack has a row of its own.

    Attributes:
        path: of the leaf, with the index of a layer or expert, as "layers/kernel[3]".
        norms: ‖ΔW‖ (Frobenius) of f and of g; 0 where the leaf is not adapted.
        effective_ranks: exp of the entropy of ΔW's singular values as shares of their sum (Roy and
            Vetterli 2007): k for k equal ones. NaN for Full.
        inner: ⟨ΔW_f, ΔW_g⟩, the sum of the products of the entries.
        overlap_in: of the spaces that the changes read, ‖U_fᵀ·U_g‖²/min(r_f, r_g) for orthonormal
            bases U: 1 where one space holds the other, 0 where they are orthogonal (Hu et al. 2021,
            section 7.2). NaN for Full, or where a change is zero.
        overlap_out: the same of the spaces that they write.
    """

    path: str
    norms: tuple[float, float]
    effective_ranks: tuple[float, float]
    inner: float
    overlap_in: float
    overlap_out: float

    @property
    def cosine(self) -> float:
        """Of the angle between the changes; NaN where one is zero."""
        return _cosine(self.inner, self.norms)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` returns; `str()` is an aligned table, its last line the adapters as wholes."""

    rows: tuple[ComparisonRow, ...]

    @property
    def norms(self) -> tuple[float, float]:
        """‖ΔW‖ over all weights."""
        f, g = (math.hypot(*(row.norms[i] for row in self.rows)) for i in (0, 1))
        return f, g

    @property
    def cosine(self) -> float:
        """Of the angle between the adapters as task vectors."""
        return _cosine(sum(row.inner for row in self.rows), self.norms)

    def __str__(self) -> str:
        """An aligned table, then the totals."""
        header = ["path", "norm f", "norm g", "rank f", "rank g", "cosine", "in", "out"]
        whole = ["all", *map(_figures, self.norms), "", "", _figures(self.cosine), "", ""]
        cells = [
            [row.path, *map(_figures, (*row.norms, *row.effective_ranks, row.cosine,
                                       row.overlap_in, row.overlap_out))]
            for row in self.rows
        ]  # fmt: skip
        notes = "rank: effective rank; in, out: overlap of the spaces read and written."
        return f"{aligned(header, [*cells, whole])}\n{notes}"

    def plot(self, path: str | PathLike[str]) -> None:
        """Draws norms, effective ranks and overlaps, a line for each weight, into a file.

        The suffix says which format. Needs matplotlib: `pip install 'lorax-fn[plot]'`.
        """
        from matplotlib.figure import Figure

        height = 1.5 + 0.22 * len(self.rows)
        figure = Figure(figsize=(12, height), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        by_panel = {
            "norm of the change": {
                "f": [row.norms[0] for row in self.rows],
                "g": [row.norms[1] for row in self.rows],
            },
            "effective rank": {
                "f": [row.effective_ranks[0] for row in self.rows],
                "g": [row.effective_ranks[1] for row in self.rows],
            },
            "f against g": {
                "cosine": [row.cosine for row in self.rows],
                "overlap in": [row.overlap_in for row in self.rows],
                "overlap out": [row.overlap_out for row in self.rows],
            },
        }
        places = range(len(self.rows))
        for panel, (title, series) in zip(panels, by_panel.items(), strict=True):
            for (label, values), marker in zip(series.items(), "ox+", strict=False):
                panel.plot(values, places, marker, label=label)
            panel.set_title(title)
            panel.grid(alpha=0.3)
            panel.legend()
        panels[0].set_yticks(places, [row.path for row in self.rows])
        panels[0].invert_yaxis()
        figure.savefig(path, dpi=120)


def compare(f: Pytree, g: Pytree) -> Comparison:
    """Compares two adapters of one base: how much they change, along how many directions, which.

    Computed from the factors at O((contract + out)·r²) a weight; no ΔW is formed.

    Args:
        f: factors of LoRA and Full nodes.
        g: factors of the same params.

    Raises:
        StructureError: if they belong to different params, or hold nodes of other kinds.
        LoraError: if they are traced.

    >>> import jax, jax.numpy as jnp, lorax_fn as lora
    >>> f = lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, [lora.LoRA("w", rank=1)])
    >>> f = jax.tree.map(jnp.ones_like, f)
    >>> comparison = lora.compare(f, lora.scale(f, -2.0))
    >>> round(comparison.rows[0].cosine, 4), round(comparison.rows[0].overlap_out, 4)
    (-1.0, 1.0)
    """
    if any(isinstance(array, jax.core.Tracer) for array in jax.tree.leaves((f, g))):
        raise LoraError("compare looks at values, which traced factors have not; call it outside.")
    _, places = align([f, g])
    rows = []
    for path, nodes in places:
        present = [check_sums(path, node) for node in nodes if node is not None]
        if present:
            check_alike(path, present)
            of = _rows_of_deltas if isinstance(present[0], FullDelta) else _rows_of_factors
            rows += of(path, nodes)
    return Comparison(tuple(rows))


def _rows_of_deltas(path: str, nodes: Sequence[FullDelta | None]) -> list[ComparisonRow]:
    f, g = (0.0 if node is None else np.asarray(node.delta) for node in nodes)
    norms = float(np.linalg.norm(f)), float(np.linalg.norm(g))
    nan = math.nan
    return [ComparisonRow(path, norms, (nan, nan), float(np.sum(f * g)), nan, nan)]


def _rows_of_factors(path: str, nodes: Sequence[LoRAFactors | None]) -> list[ComparisonRow]:
    like = next(node for node in nodes if node is not None)
    batch = like.a.shape[: len(like.axes.batch)]
    f, g = (_decompositions(node, like) for node in nodes)
    return [
        _row(path + (f"[{','.join(map(str, index))}]" if batch else ""), *pair)
        for index, *pair in zip(itertools.product(*map(range, batch)), f, g, strict=True)
    ]


def _decompositions(node: LoRAFactors | None, like: LoRAFactors) -> list[Any]:
    """(u, s, vt) without the triplets that are zero, of each matrix of the weight."""
    if node is None:
        a, b = matrices(like.plain(), 0.0)
    else:
        a, b = matrices(node.plain(), node.scale)
    tiny = np.finfo(np.float32).eps * max(a.shape[1], b.shape[2])
    kept = []
    for u, s, vt in zip(*map(np.asarray, product_svd(a, b)), strict=True):
        rank = int((s > tiny * s[0]).sum())
        kept.append((u[:, :rank], s[:rank], vt[:rank]))
    return kept


def _row(path: str, f: Any, g: Any) -> ComparisonRow:
    (u, s, vt), (p, t, qt) = f, g
    read, written = u.T @ p, vt @ qt.T  # (r_f, r_g)
    norms = float(np.linalg.norm(s)), float(np.linalg.norm(t))
    ranks = _effective_rank(s), _effective_rank(t)
    inner = float(s @ (read * written) @ t)
    smaller = min(len(s), len(t))
    overlaps = [float(np.square(x).sum() / smaller) if smaller else math.nan
                for x in (read, written)]  # fmt: skip
    return ComparisonRow(path, norms, ranks, inner, *overlaps)


def _effective_rank(s: np.ndarray) -> float:
    shares = s / s.sum()
    return float(np.exp(-np.sum(shares * np.log(shares)))) if len(s) else 0.0


def _cosine(inner: float, norms: tuple[float, float]) -> float:
    return inner / (norms[0] * norms[1]) if all(norms) else math.nan


def _figures(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"
