"""What LoRA costs: full fine-tuning, by hand, with `lorax_fn`, added up, and the floor.

    python -m benchmarks.cost                   # 4 layers of width 256, rank 8, float32
    python -m benchmarks.cost --smoke           # a few seconds, for CI
    python -m benchmarks.cost --dtype bfloat16 --width 1024 --batch 16 --json cost.json

Prints one table for each model structure and choice of adapted kernels, and one of the time to
trace and lower models of growing depth. Runs on any backend of JAX.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import flax
import jax
import optax

from benchmarks.measure import REFERENCE, Cost, costs, trace_and_lower_times
from benchmarks.model import STRUCTURES, Config
from benchmarks.variants import NAMES, TARGETS, build

SMOKE = {
    "layers": 2,
    "width": 32,
    "batch": 2,
    "length": 16,
    "rounds": 1,
    "structures": ["scan"],
    "targets": ["every kernel"],
    "depths": [1, 2],
}
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
COLUMNS = ("GFLOP", "", "temp MiB", "", "trace+lower s", "vs full", "compile s", "step ms", "ratio")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    report: dict[str, Any] = {"machine": machine(), "options": vars(options) | {"json": None}}
    print("  ".join(f"{key} {value}" for key, value in report["machine"].items()))
    report["costs"] = {}
    for structure in options.structures:
        for targets in options.targets:
            table = measure(options, structure, targets)
            title = f"{structure}, {targets}"
            print(f"\n{title}\n{render(table)}", flush=True)
            report["costs"][title] = {name: dataclasses.asdict(c) for name, c in table.items()}
    if options.depths:
        report["tracing"] = tracing_by_depth(options)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwrote {options.json}")
    return report


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128, dest="length", help="tokens in an example")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--structures", nargs="+", choices=STRUCTURES, default=STRUCTURES)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--rounds", type=int, default=15, help="times each step is timed")
    parser.add_argument(
        "--depths", nargs="*", type=int, default=[4, 8, 16, 32], help="layers to trace; none: skip"
    )
    parser.add_argument("--json", type=pathlib.Path, help="file to write the figures to")
    parser.add_argument("--smoke", action="store_true", help="defaults that take seconds")
    if parser.parse_args(arguments).smoke:
        parser.set_defaults(**SMOKE)  # what is given explicitly still counts
    return parser.parse_args(arguments)


def machine() -> dict[str, Any]:
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "python": platform.python_version(),
    }


def measure(options: argparse.Namespace, structure: str, targets: str) -> dict[str, Cost]:
    variants = build(
        config(options, structure=structure),
        targets,
        rank=options.rank,
        batch=options.batch,
        length=options.length,
    )
    return costs(variants, rounds=options.rounds, tolerance=TOLERANCE[options.dtype])


def config(options: argparse.Namespace, **changes: Any) -> Config:
    return Config(**{
        "layers": options.layers,
        "width": options.width,
        "dtype": jax.numpy.dtype(options.dtype),
    } | changes)  # fmt: skip


def render(table: dict[str, Cost]) -> str:
    """One line for each variant; FLOPs, bytes and step also as a ratio to hand-written."""
    hand, full = table[REFERENCE], table["full"]
    rows = [("", *COLUMNS)]
    for name in NAMES:
        cost = table[name]
        rows.append((
            name,
            f"{cost.flops / 1e9:.3f}",
            f"{cost.flops / hand.flops:.3f}×",
            f"{cost.temp_bytes / 2**20:.1f}",
            f"{cost.temp_bytes / hand.temp_bytes:.3f}×",
            f"{cost.trace_and_lower:.2f}",
            f"{cost.trace_and_lower / full.trace_and_lower:.2f}×",
            f"{cost.compile:.2f}",
            f"{cost.step * 1e3:.1f}",
            f"{cost.step_ratio:.3f}×",
        ))  # fmt: skip
    return align(rows)


def tracing_by_depth(options: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Seconds to trace and lower steps of unrolled models, by number of layers.

    Sizes of arrays do not matter to tracing: the smallest are used.
    """
    rows = [("layers", "full s", "handwritten s", "lorax_fn s", "per layer ms", "vs full")]
    result = {}
    for layers in options.depths:
        small = config(options, structure="plain", layers=layers, width=32)
        variants = build(small, "every kernel", rank=2, batch=1, length=8, abstract=True)
        compared = {name: variants[name] for name in ("full", REFERENCE, "lorax_fn")}
        times = trace_and_lower_times(compared, repeats=min(3, options.rounds))
        result[layers] = times
        lorax = times["lorax_fn"]
        seconds = (f"{times[name]:.2f}" for name in compared)
        ratio = f"{lorax / times['full']:.2f}×"
        rows.append((str(layers), *seconds, f"{1e3 * lorax / layers:.0f}", ratio))
    print(f"\ntrace and lower, unrolled, every kernel\n{align(rows)}")
    return result


def align(rows: Sequence[Sequence[str]]) -> str:
    """A first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )


if __name__ == "__main__":
    main()
