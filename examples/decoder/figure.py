"""The picture: the way down, what was learnt and forgotten, and what each model writes."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

SMOOTHING = 10  # steps
WIDTH, LINES = 52, 18  # of the samples


def draw(file: Path, models: Sequence[Any]) -> None:
    """Curves and bars above, samples of each model below; the first one is the pretrained."""
    figure = plt.figure(figsize=(12, 6.5), layout="constrained")
    grid = figure.add_gridspec(2, 6)  # two plots above, three texts below
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    curves, bars = figure.add_subplot(grid[0, :3]), figure.add_subplot(grid[0, 3:])
    for model, color in zip(models[1:], colors[1:], strict=False):
        curves.plot(_smooth(model.losses), color=color, label=model.name)
    curves.set(xlabel="step of adaptation", ylabel="nats a token", title="training loss on prose")
    curves.legend()
    curves.grid(alpha=0.3)
    places = np.arange(2)
    for i, (model, color) in enumerate(zip(models, colors, strict=False)):
        heights = [model.bits["prose"], model.bits["code"]]
        drawn = bars.bar(places + 0.27 * (i - 1), heights, 0.25, color=color, label=model.name)
        bars.bar_label(drawn, fmt="%.2f", fontsize="small")
    bars.set_xticks(places, ["prose (adapted to)", "code (pretrained on)"])
    bars.set(ylabel="bits a byte", title="modules not trained on: less is better")
    bars.margins(y=0.3)
    bars.legend(fontsize="small")
    for i, (model, color) in enumerate(zip(models, colors, strict=False)):
        axes = figure.add_subplot(grid[1, 2 * i : 2 * i + 2])
        written = "\n\n".join(model.samples)
        lines = [w for line in written.split("\n") for w in (wrap(line, WIDTH) or [""])]
        text = _plain("\n".join(lines[:LINES]))
        axes.text(0, 1, text, va="top", family="monospace", fontsize=7.5)
        axes.set_title(f"{model.name} writes", color=color)
        axes.set_axis_off()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _plain(text: str) -> str:
    """What every font has, and no mathematics: a model may write any byte."""
    shown = (c if c == "\n" or (c.isascii() and c.isprintable()) else "?" for c in text)
    return "".join(shown).replace("$", r"\$")


def _smooth(losses: Sequence[float]) -> np.ndarray:
    """The mean of the last `SMOOTHING` values, at each step."""
    return np.array([np.mean(losses[max(0, i - SMOOTHING) : i]) for i in range(1, len(losses) + 1)])
