"""The picture: learning, forgetting, and the images that each way gets wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter

from digits.data import CLASSES, Split

SHOWN = 12  # images a row


def draw(file: Path, runs: Sequence[Any], test: Split, old_at_start: float) -> None:
    """Validation accuracy on both halves above; below, new digits with each way's answers."""
    figure = plt.figure(figsize=(11, 7), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3, 2))
    left, right = above.subplots(1, 2, sharey=True)
    for run, color in zip(runs, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False):
        steps = list(run.curve)
        new, old = np.transpose(list(run.curve.values()))
        left.plot(steps, new, "o-", color=color, ms=3, label=f"{run.name} (test {run.new:.1%})")
        right.plot(steps, old, "o-", color=color, ms=3, label=f"{run.name} (test {run.old:.1%})")
    right.axhline(
        old_at_start, color="gray", ls="--", label=f"pretrained (test {old_at_start:.1%})"
    )
    left.set_title(f"what is learnt: digits {CLASSES} to {2 * CLASSES - 1}")
    right.set_title(f"what is kept: digits 0 to {CLASSES - 1}")
    for axes in (left, right):
        axes.set(xlabel="step of adaptation", ylabel="validation accuracy", ylim=(0, 1.03))
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        axes.legend(loc="lower right", fontsize="small")
        axes.grid(alpha=0.3)
    _answers(below, runs, test)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _answers(figure: Any, runs: Sequence[Any], test: Split) -> None:
    """Test images of new digits, those first that the ways answer differently."""
    right = np.stack([run.answers == test.labels for run in runs])  # (runs, images)
    rows = np.argsort(right.sum(0), kind="stable")[: 2 * SHOWN]
    names = ", ".join(run.name for run in runs)
    figure.suptitle(f"the hardest test images; the digit: the answers of {names}", fontsize=10)
    for axes, row in zip(figure.subplots(2, SHOWN).flat, rows, strict=False):
        axes.imshow(test.images[row, :, :, 0], cmap="gray_r")
        axes.set_axis_off()
        said = "  ".join(str(run.answers[row] + CLASSES) for run in runs)
        axes.set_title(f"{test.labels[row] + CLASSES}:  {said}", fontsize=8)
