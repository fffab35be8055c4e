"""Many adapters in one step against as many runs: time, FLOPs and memory.

    python -m benchmarks.many_adapters                  # 8 adapters, 4 layers of width 256, float32
    python -m benchmarks.many_adapters --smoke          # a few seconds, for CI

together   one step that trains all adapters, stacked, by `jax.vmap`
runs       their steps one after another, each adapter with its own data: what N runs take
joint      one adapter on the data of all: the floor, since the base does the same work

Memory is what XLA plans for a step, arguments included: for `runs` that of a single one, as they
come one after another, and of as many processes, where they are started side by side.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorax_fn as lora
from benchmarks import flops
from benchmarks.cost import align, machine
from benchmarks.growth import steps
from benchmarks.measure import interleaved
from benchmarks.model import STRUCTURES, Config, Transformer
from benchmarks.variants import TARGETS

SMOKE = {"adapters": 2, "layers": 2, "width": 32, "batch": 2, "length": 16, "rounds": 1}
TOLERANCE = 1e-4  # largest difference between the losses of `together` and `runs`


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    report: dict[str, Any] = {"machine": machine(), "options": vars(options) | {"json": None}}
    print("  ".join(f"{key} {value}" for key, value in report["machine"].items()))
    report["rows"] = {}
    for targets in options.targets:
        title = f"{options.structure}, {targets}"
        report["rows"][title] = rows = measure(options, targets)
        print(f"\n{title}: {options.adapters} adapters\n{render(rows)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return report


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--adapters", type=int, default=8, help="how many to train")
    add("--structure", choices=STRUCTURES, default="plain", help="of the model")
    add("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="what is adapted")
    add("--layers", type=int, default=4, help="of the model")
    add("--width", type=int, default=256, help="of the model")
    add("--batch", type=int, default=2, help="examples of each adapter in a step")
    add("--seq", type=int, default=128, dest="length", help="tokens in an example")
    add("--rank", type=int, default=8, help="of every adapter")
    add("--rounds", type=int, default=9, help="times each variant is timed")
    add("--json", type=pathlib.Path, help="file to write the figures to")
    add("--smoke", action="store_true", help="defaults that take seconds")
    if parser.parse_args(arguments).smoke:
        parser.set_defaults(**SMOKE)  # what is given explicitly still counts
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, targets: str) -> dict[str, dict[str, float]]:
    """A row of figures for each variant.

    Raises:
        ValueError: if an adapter's loss in the joint step is not its loss alone.
    """
    n = options.adapters
    config = Config(structure=options.structure, layers=options.layers, width=options.width)
    keys = iter(jax.random.split(jax.random.key(0), 3 * n))
    shape = (n, options.batch, options.length)
    tokens = jax.random.randint(next(keys), shape, 0, config.vocabulary)
    step, operands = steps(config, tokens[0], targets, options.rank)["wrapped"]
    params = jax.jit(Transformer(config).init)(next(keys), tokens[0])["params"]
    each = [filled(next(keys), operands[0]) for _ in range(n)]
    states = [jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), operands[1]) for _ in range(n)]

    many = jax.vmap(step, in_axes=(0, 0, None, 0))
    stacked_states = jax.tree.map(lambda *x: jnp.stack(x), *states)
    operands = (lora.stack(each), stacked_states, params, tokens)
    runs = [(f, s, params, part) for f, s, part in zip(each, states, tokens, strict=True)]
    on_all = (*runs[0][:3], tokens.reshape(-1, options.length))
    together = jax.jit(many).lower(*operands).compile()
    alone = jax.jit(step).lower(*runs[0]).compile()
    joint = jax.jit(step).lower(*on_all).compile()
    losses, wanted = together(*operands)[2], [float(alone(*run)[2]) for run in runs]
    if not np.allclose(losses, wanted, atol=TOLERANCE):
        raise ValueError(f"the losses are {losses} together and {wanted} alone.")

    seconds = interleaved(
        {
            "together": lambda: together(*operands),
            "runs": lambda: [alone(*run) for run in runs],
            "joint": lambda: joint(*on_all),
        },
        options.rounds,
    )
    programs = {"together": (together, 1), "runs": (alone, n), "joint": (joint, 1)}
    return {
        name: {
            "ms": float(np.median(seconds[name])) * 1e3,
            "ratio": float(np.median(seconds[name] / seconds["runs"])),
            "flops": times * flops.count(program.as_text()),
            "memory": planned(program),
            "memory side by side": times * planned(program),
        }
        for name, (program, times) in programs.items()
    }


def filled(key: jax.Array, shapes: Any) -> Any:
    """Random factors, B too, as in the middle of training."""
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    draw = lambda key, x: 0.03 * jax.random.normal(key, x.shape, x.dtype)
    return treedef.unflatten(map(draw, keys, leaves))


def planned(program: Any) -> int:
    """Bytes of arguments, results and temporaries."""
    found = program.memory_analysis()
    parts = (found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes)
    return sum(parts) - found.alias_size_in_bytes


def render(rows: dict[str, dict[str, float]]) -> str:
    mib: Callable[[float], str] = lambda n: f"{n / 2**20:.1f}"
    header = ("", "step ms", "ratio", "GFLOP", "ratio", "MiB", "MiB side by side")
    lines = [header]
    for name, row in rows.items():
        lines.append((
            name,
            f"{row['ms']:.1f}",
            f"{row['ratio']:.2f}×",
            f"{row['flops'] / 1e9:.2f}",
            f"{row['flops'] / rows['runs']['flops']:.2f}×",
            mib(row["memory"]),
            mib(row["memory side by side"]),
        ))  # fmt: skip
    return align(lines)


if __name__ == "__main__":
    main()
