"""`inspect`: what is adapted, how the function uses it, and what that costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lorax_fn.adapters import Adapter
from lorax_fn.axes import Axes
from lorax_fn.evaluate import evaluate
from lorax_fn.flops import count_flops
from lorax_fn.interpreter import Event
from lorax_fn.leaves import is_quantized, type_name
from lorax_fn.pairing import pair
from lorax_fn.tracing import check_function, is_array, trace

Pytree = Any


@dataclasses.dataclass(frozen=True)
class Row:
    """One adapted leaf.

    Attributes:
        path: the leaf's path.
        shape: its shape.
        quantized: the type of a quantised leaf ("nf4"), or None.
        kind: the name of the rule that made the adapter.
        rank: r, or None for a kind that has none.
        axes: the roles of its dims, or None.
        ops: the primitives that consume it, in order of first use.
        dense: "primitive at file:line" where it had to be added up.
        params: the number of trainable parameters.
    """

    path: str
    shape: tuple[int, ...]
    quantized: str | None
    kind: str
    rank: int | None
    axes: Axes | None
    ops: tuple[str, ...]
    dense: tuple[str, ...]
    params: int


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over the whole model.

    Attributes:
        trainable: parameters in adapters.
        frozen: parameters of the base.
        ratio: trainable / frozen.
        base_flops: operations of one forward call of the base, in its contractions.
        adapted_flops: the same with adapters.
    """

    trainable: int
    frozen: int
    ratio: float
    base_flops: int
    adapted_flops: int


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What `inspect` returns: printed, an aligned table; `to_markdown()` gives one in Markdown."""

    rows: tuple[Row, ...]
    totals: Totals

    @property
    def dense(self) -> list[str]:
        """The paths of the leaves that were added up."""
        return [row.path for row in self.rows if row.dense]

    def __repr__(self) -> str:
        return f"{aligned(_HEADER, self._cells())}\n{self._summary()}"

    def to_markdown(self) -> str:
        """The rows as a Markdown table, the totals below it."""
        lines = [_HEADER, ["---"] * len(_HEADER), *self._cells()]
        escaped = [[cell.replace("|", "\\|") for cell in cells] for cells in lines]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)
        return f"{table}\n\n{self._summary()}"

    def _cells(self) -> list[list[str]]:
        return [_cells(row) for row in self.rows]

    def _summary(self) -> str:
        totals = self.totals
        extra = totals.adapted_flops / totals.base_flops - 1 if totals.base_flops else 0.0
        return (
            f"{totals.trainable:,} trainable parameters beside {totals.frozen:,} frozen ones "
            f"({totals.ratio:.2%}); forward FLOPs {totals.base_flops:,} → {totals.adapted_flops:,} "
            f"({extra:+.2%}); {len(self.dense)} of {len(self.rows)} leaves added up"
            f"{self._unused()}."
        )

    def _unused(self) -> str:
        unused = sum(row.axes is not None and not row.ops for row in self.rows)
        return f", {unused} not used by this call" if unused else ""


def inspect(
    apply_fn: Callable[..., Any],
    params: Pytree,
    factors: Pytree,
    /,
    *args: Any,
    lora_key: Any = None,
    **kwargs: Any,
) -> Report:
    """Reports, for each adapted leaf, how `apply_fn` uses it and whether it stays factored.

    Traces the function and computes nothing, so arrays may be `jax.ShapeDtypeStruct`s.

    Args:
        apply_fn: the function that `wrap` takes.
        params: the frozen base.
        factors: what `init` made for it.
        args: the function's further arguments.
        lora_key: as `wrap` takes it; what is reported does not depend on it.
        kwargs: its keyword arguments.

    Returns:
        A `Report` with `.rows`, `.totals`, `.dense` and `.to_markdown()`.

    Raises:
        StructureError: if factors do not belong to params.

    >>> import jax, jax.numpy as jnp, lorax_fn as lora
    >>> params = {"w": jnp.ones((64, 32))}
    >>> factors = lora.init(jax.random.key(0), params, [lora.LoRA("w", rank=2, alpha=4)])
    >>> report = lora.inspect(lambda params, x: x @ params["w"], params, factors, jnp.ones((8, 64)))
    >>> report.rows[0].ops, report.dense, report.totals.trainable
    (('dot_general',), [], 192)
    """
    del lora_key
    check_function(apply_fn)
    pairs = pair(params, factors)
    events: dict[Event, None] = {}
    base = trace(apply_fn, params, args, kwargs)
    # As arguments: as params the quantised leaves would be floating ones.
    adapted = trace(_evaluated(apply_fn, events), (), (params, factors, *args), kwargs)
    rows = tuple(
        _row(path, leaf, adapter, [event for event in events if event.path == path])
        for path, leaf, adapter in pairs
        if adapter is not None
    )
    trainable = sum(row.params for row in rows)
    frozen = sum(math.prod(leaf.shape) for _, leaf, _ in pairs if is_array(leaf))
    totals = Totals(
        trainable=trainable,
        frozen=frozen,
        ratio=trainable / frozen if frozen else 0.0,
        base_flops=count_flops(base.jaxpr),
        adapted_flops=count_flops(adapted.jaxpr),
    )
    return Report(rows, totals)


def _evaluated(apply_fn: Callable[..., Any], events: dict[Event, None]) -> Callable[..., Any]:
    """The adapted function of (params, factors), which notes every event."""

    def run(_: Any, params: Pytree, factors: Pytree, /, *args: Any, **kwargs: Any) -> Any:
        def note(event: Event) -> None:
            events[event] = None

        return evaluate(apply_fn, params, factors, args, kwargs, key=None, on_event=note)

    return run


def _row(path: str, leaf: Any, adapter: Adapter, events: Sequence[Event]) -> Row:
    trained = zip(jax.tree.leaves(adapter), jax.tree.leaves(adapter.trainable()), strict=True)
    return Row(
        path=path,
        shape=tuple(leaf.shape),
        quantized=type_name(leaf.qtype) if is_quantized(leaf) else None,
        kind=adapter.kind,
        rank=getattr(adapter, "rank", None),
        axes=getattr(adapter, "axes", None),
        ops=tuple(dict.fromkeys(event.primitive for event in events)),
        dense=tuple(f"{event.primitive} at {event.source}" for event in events if event.dense),
        params=sum(math.prod(array.shape) for array, is_trained in trained if is_trained),
    )


_HEADER = ["path", "shape", "kind", "rank", "batch|contract|out", "consumed by", "form", "params"]


def _cells(row: Row) -> list[str]:
    axes = row.axes
    roles = "" if axes is None else "|".join(map(_dims, (axes.batch, axes.contract, axes.out)))
    form = "added up: " + "; ".join(row.dense) if row.dense else "factored"
    if not row.ops:
        form = "unused"
    return [
        row.path,
        " ".join(["×".join(map(str, row.shape)), *([row.quantized] if row.quantized else [])]),
        row.kind,
        "" if row.rank is None else str(row.rank),
        roles,
        ", ".join(row.ops),
        form if axes is not None else "whole",
        f"{row.params:,}",
    ]


def _dims(dims: Sequence[int]) -> str:
    return ",".join(map(str, dims)) or "-"


def aligned(header: list[str], rows: list[list[str]]) -> str:
    """The rows under their header, columns aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["─" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
