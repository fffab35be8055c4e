"""The picture of a sweep: loss against steps, and accuracy against the learning rate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

from minilm.figure import smooth

MARKERS = "os^Dv*"


def draw(file: Path, trials: Sequence[Any], best: int, frozen: float) -> None:
    """One colour for each rank and alpha, one line style or marker for each learning rate."""
    groups = list(dict.fromkeys((t.rank, t.alpha) for t in trials))
    rates = sorted({t.rate for t in trials})
    colors = plt.get_cmap("viridis", len(groups) + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.5), layout="constrained")
    for i, group in enumerate(groups):
        members = sorted((t for t in trials if (t.rank, t.alpha) == group), key=lambda t: t.rate)
        label = f"rank {group[0]}, alpha {group[1]:g}"
        for t in members:
            style = ("-", "--", ":", "-.")[rates.index(t.rate) % 4]
            steps = range(1, len(t.losses) + 1)
            left.plot(steps, smooth(t.losses), style, color=colors(i),
                      label=f"{label}, rate {t.rate:g}")  # fmt: skip
        right.plot([t.rate for t in members], [t.validation for t in members],
                   f"{MARKERS[i % len(MARKERS)]}-", color=colors(i), label=label)  # fmt: skip
    chosen = trials[best]
    right.plot(chosen.rate, chosen.validation, "o", markersize=16, markerfacecolor="none",
               color="crimson", label=f"best (test {chosen.test:.1%})")  # fmt: skip
    right.axhline(frozen, color="gray", linestyle="--", label="frozen encoder, linear head")
    left.set(xlabel="step", ylabel="cross-entropy", title="training loss, mean of 10 steps")
    right.set(xlabel="peak learning rate", ylabel="accuracy", title="validation accuracy")
    right.set_xscale("log")
    right.set_xticks(rates, [f"{rate:g}" for rate in rates])
    right.minorticks_off()
    right.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    for axes in (left, right):  # legends below, where no curve is
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    plt.close(figure)
