"""The same fine-tuning in lorax_fn and in the libraries beside it: cost, agreement, coverage.

    python -m benchmarks.peers                       # makes an environment for each library
    python -m benchmarks.peers --smoke --peers lorax_fn handwritten nnx
    python -m benchmarks.peers --picture docs/figures/peers.png --json peers.json

Each library runs in a process of its own, in an environment that this script makes in a temporary
folder (`--environments` keeps it): the same transformer, weights, first factors, tokens and AdamW.
Steps are timed in turn, a few of one library and then of the next, by the clock and by the
processor time of the process: on a shared machine, with `--cores 1`, the latter is what counts. The
libraries are used as their own documentation says, each in `benchmarks/rivals/`. PyTorch is
measured with its own counters: matrix products alone count as its FLOPs, and memory is the most
that was allocated in a step.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from benchmarks.cost import align
from benchmarks.rivals import problem, structures
from benchmarks.rivals.jax_step import plain

ROOT = Path(__file__).parents[1]
OURS = "lorax_fn"
HERE = (OURS, "handwritten", "nnx")  # run by this interpreter: they need nothing more
JAX = tuple(f"{name}=={version(name)}" for name in ("jax", "flax", "optax"))
# What an environment of its own needs. PyTorch by its number: newer ones may bring CUDA along.
NEEDS = {
    "qwix": ("qwix", *JAX),
    "quax": ("quax", *JAX),
    "peft": ("torch==2.13.0", "peft", "numpy"),
}
PEERS = (*HERE, *NEEDS)
NAMES = {
    "handwritten": "by hand, in Linen",
    "nnx": "nnx.LoRA",
    "peft": "PEFT (PyTorch)",
}
WITHOUT_ALPHA = ("quax", "nnx")  # their B holds alpha/rank · B, which AdamW trains otherwise
SIZES = {
    "small": problem.Sizes(layers=2, width=128, batch=4, length=64),
    "medium": problem.Sizes(layers=4, width=256, batch=8, length=128),
}
SMOKE = {"smoke": problem.Sizes(layers=1, width=32, batch=2, length=8, rank=2, alpha=4)}
TOLERANCE = 1e-4  # of a loss
ABSENT = "n/a"  # how an answer begins where a library's framework has no such structure
MARKS = {"yes": ("✓", "#76c368"), ABSENT: ("n/a", "#dddddd"), "no": ("–", "#f47b4b")}


class Worker:
    """A library in its process."""

    def __init__(self, name: str, python: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        command = [str(python), "-m", "benchmarks.rivals.worker", name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.name = name
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    def ask(self, *command: Any) -> Any:
        """The worker's answer.

        Raises:
            RuntimeError: if it ended instead; its traceback is on stderr.
        """
        print(*command, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}")
        return json.loads(answer)

    def end(self) -> None:
        """Lets the process go."""
        with self.process:  # closes its pipes, and waits
            self.process.stdin.close()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    if options.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    with tempfile.TemporaryDirectory() as folder:
        places = environments(options.peers, options.environments or Path(folder))
        report: dict[str, Any] = {"versions": versions(places)}
        print("  ".join(f"{name} {number}" for name, number in report["versions"].items()))
        workers = {name: Worker(name, python) for name, python in places.items()}
        try:
            report["costs"] = {}
            for name, sizes in (SMOKE if options.smoke else SIZES).items():
                problem.write(Path(folder) / name, make(sizes))
                rows = measure(workers, Path(folder) / name, options.rounds)
                print(f"\n{name}: {sizes}\n{render(rows)}", flush=True)
                check(rows)
                report["costs"][name] = rows
            answers = {name: worker.ask("structures") for name, worker in workers.items()}
            report["structures"] = {name: each for name, each in answers.items() if each}
        finally:
            for worker in workers.values():
                worker.end()
    print(f"\n{coverage(report['structures'])}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.picture:
        draw(options.picture, report)
    return report


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="what is compared")
    add("--rounds", type=int, default=9, help="times each step is timed")
    add("--cores", type=int, help="how many every library may use: 1 where a machine is shared")
    add("--environments", type=Path, help="folder of the environments; made where missing, kept")
    add("--json", type=Path, help="file to write the figures to")
    add("--picture", type=Path, help="PNG to draw")
    add("--smoke", action="store_true", help="one tiny model")
    return parser.parse_args(arguments)


def environments(names: Sequence[str], folder: Path) -> dict[str, Path]:
    """The interpreter of each library, its packages installed."""
    places = {}
    for name in names:
        if name in HERE:
            places[name] = Path(sys.executable)
            continue
        place = folder / name
        places[name] = place / "bin" / "python"
        if not places[name].exists():
            print(f"making an environment: {' '.join(NEEDS[name])}", flush=True)
            venv.create(place, with_pip=True)
            install = [places[name], "-m", "pip", "install", "-q", *NEEDS[name]]
            subprocess.run(install, check=True)
    return places


def versions(places: dict[str, Path]) -> dict[str, str]:
    """The date, this interpreter's, and each library's."""
    known = {"date": dt.date.today().isoformat(), "python": sys.version.split()[0]}
    known |= {name: version(name) for name in ("jax", "flax", "optax")}
    code = "from importlib.metadata import version; import sys; print(version(sys.argv[1]))"
    for name, python in places.items():
        for package in {"peft": ("torch", "peft")}.get(name, (name,) if name in NEEDS else ()):
            command = [python, "-c", code, package]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            known[package] = done.stdout.strip()
    return known


def make(sizes: problem.Sizes) -> problem.Problem:
    """Weights as the plain model draws them, and the rest."""
    tokens = np.zeros((1, sizes.length), np.int32)
    params = jax.jit(plain(sizes).init)(jax.random.key(0), tokens)["params"]
    return problem.make(sizes, jax.tree.map(np.asarray, flatten_dict(params, sep="/")))


def measure(workers: dict[str, Worker], folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Of each library its costs and its step's seconds; ratios are medians over the rounds."""
    rows = {name: worker.ask("prepare", folder) for name, worker in workers.items()}
    calls = {name: math.ceil(0.1 / worker.ask("time", 1)[1]) for name, worker in workers.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    names = list(workers)
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(workers[name].ask("time", calls[name]))
    first = np.array(times[names[0]])  # (rounds, 2)
    for name, row in rows.items():
        row["clock"], row["processor"] = np.median(times[name], axis=0).tolist()
        ratios = np.median(np.array(times[name]) / first, axis=0).tolist()
        row["clock_ratio"], row["processor_ratio"] = ratios
    return rows


def check(rows: dict[str, dict[str, Any]]) -> None:
    """All start from one loss, and those with an alpha go the same way.

    Raises:
        ValueError: if a library does not.
    """
    reference = next(iter(rows.values()))["losses"]
    for name, row in rows.items():
        compared = row["losses"][:1] if name in WITHOUT_ALPHA else row["losses"]
        for step, (got, wanted) in enumerate(zip(compared, reference, strict=False)):
            if not abs(got - wanted) <= TOLERANCE:
                raise ValueError(
                    f"{name} has loss {got:.6f} after {step} steps, wanted {wanted:.6f} to "
                    f"{TOLERANCE}: it does not compute the same, and cannot be compared."
                )


def render(rows: dict[str, dict[str, Any]]) -> str:
    """One line for each library."""
    losses = [f"loss {step}" for step in range(problem.STEPS)]
    header = (
        "",
        "clock ms",
        "",
        "processor ms",
        "",
        "GFLOP",
        "temp MiB",
        "trace+lower s",
        "compile s",
        *losses,
    )
    lines = [
        (
            NAMES.get(name, name),
            f"{1e3 * row['clock']:.1f}",
            f"{row['clock_ratio']:.2f}×",
            f"{1e3 * row['processor']:.1f}",
            f"{row['processor_ratio']:.2f}×",
            f"{row['flops'] / 1e9:.3f}",
            f"{row['temp_bytes'] / 2**20:.1f}",
            f"{row['trace_and_lower']:.2f}" if row["compile"] else "-",
            f"{row['compile']:.2f}" if row["compile"] else "-",
            *(f"{loss:.5f}" for loss in row["losses"]),
        )
        for name, row in rows.items()
    ]
    return align([header, *lines])


def coverage(answers: dict[str, dict[str, str]]) -> str:
    """A table of "yes" and numbers, and below it why not."""
    notes: dict[str, int] = {}
    rows = [("", *(NAMES.get(name, name) for name in answers))]
    for structure in structures.MODELS:
        cells = []
        for each in answers.values():
            answer = each[structure]
            if answer == "yes" or answer.startswith(ABSENT):
                cells.append(answer[:3])
            else:
                cells.append(f"no ({notes.setdefault(short(answer), len(notes) + 1)})")
        rows.append((structure, *cells))
    return "\n".join([align(rows), "", *(f"({number}) {note}" for note, number in notes.items())])


def short(text: str, longest: int = 150) -> str:
    """The beginning of an error."""
    return text if len(text) <= longest else f"{text[:longest].rstrip()}…"


def draw(file: Path, report: dict[str, Any]) -> None:
    """The steps' times above, what can be adapted below."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(report["structures"])
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4), layout="constrained", width_ratios=(1, 1.15)
    )
    for i, (size, rows) in enumerate(report["costs"].items()):
        places = np.arange(len(rows)) + 0.4 * i - 0.2
        ratios = [row["processor_ratio"] for row in rows.values()]
        bars = left.barh(places, ratios, 0.38, label=f"{size} model")
        left.bar_label(bars, fmt="%.2f", padding=2, fontsize="small")
    left.margins(x=0.12)
    labels = [NAMES.get(name, name) for name in rows]
    left.set_yticks(range(len(labels)), labels)
    left.invert_yaxis()
    left.axvline(1, color="gray", lw=0.8)
    left.set(title="processor time of a training step, lorax_fn's = 1")
    left.legend(fontsize="small")
    kinds = list(structures.MODELS)
    for place in np.ndindex(len(kinds), len(names)):
        answer = report["structures"][names[place[1]]][kinds[place[0]]]
        mark, color = MARKS.get(answer[:3], MARKS["no"])
        right.add_patch(plt.Rectangle((place[1] - 0.5, place[0] - 0.5), 1, 1, color=color))
        right.text(place[1], place[0], mark, ha="center", va="center")
    right.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(kinds) - 0.5, -0.5))
    right.set_xticks(range(len(names)), [NAMES.get(name, name) for name in names])
    right.set_yticks(range(len(kinds)), kinds)
    right.set(title="what each can adapt with low-rank factors")
    figure.savefig(file, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
