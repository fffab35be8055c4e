"""The picture of a run: loss and accuracy against steps."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter

from minilm.training import Run

SMOOTHING = 10  # steps


def draw(file: Path, frozen: Run, runs: Sequence[Run]) -> None:
    """Training loss on the left, validation accuracy on the right; `frozen` is where all start."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for run, color in zip(runs, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False):
        steps = np.arange(1, len(run.losses) + 1)
        left.plot(steps, run.losses, color=color, alpha=0.25)
        left.plot(steps, smooth(run.losses), color=color, label=run.name)
        accuracies = {0: frozen.last, **run.validation}
        label = f"{run.name} (test {run.test:.1%})"
        right.plot(list(accuracies), list(accuracies.values()), "o-", color=color, label=label)
    label = f"{frozen.name} (test {frozen.test:.1%})"
    right.axhline(frozen.last, color="gray", linestyle="--", label=label)
    left.set(xlabel="step", ylabel="cross-entropy", title="training loss", ylim=(0, None))
    right.set(xlabel="step", ylabel="accuracy", title="validation accuracy")
    right.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    for axes, free_corner in ((left, "upper right"), (right, "lower right")):
        axes.legend(loc=free_corner)
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def smooth(losses: Sequence[float]) -> list[float]:
    """The mean of the last `SMOOTHING` values, at each step."""
    return [float(np.mean(losses[max(0, i - SMOOTHING) : i])) for i in range(1, len(losses) + 1)]
