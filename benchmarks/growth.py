"""How the cost of a training step's compilation, and its memory, grow with depth and with width.

    python -m benchmarks.growth                       # 4 to 96 layers, unrolled and scanned
    python -m benchmarks.growth --smoke               # a few seconds, for CI
    python -m benchmarks.growth --json growth.json

Compares the base model's own training step with that of the wrapped model (LoRA on every kernel):
tracing and lowering, XLA's compilation, and the temporary memory that XLA plans. Both times are
processor seconds, over all threads, so that other work on the machine does not count. Nothing runs,
and no parameters exist: every operand is a shape.

"temp" is XLA's own figure. The base model's step returns new parameters and moments, and XLA keeps
temporaries in their memory before it writes them: "temp + results" does not depend on that.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lorax_fn as lora
from benchmarks.cost import machine
from benchmarks.model import Config, Transformer
from benchmarks.variants import ALPHA_PER_RANK, TARGETS, cross_entropy

SMOKE = {"layers": [1, 2], "widths": [32], "width": 32, "batch": 2, "length": 8}
STRUCTURES = {"unrolled": "plain", "scanned": "scan"}
RANK = 8
COLUMNS = (  # key, unit, digits, the unit's name
    ("trace+lower", 1, 2, "s"),
    ("compile", 1, 1, "s"),
    ("temp", 2**20, 1, "MiB"),
    ("temp+results", 2**20, 1, "MiB"),
)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    report: dict[str, Any] = {"machine": machine(), "options": vars(options) | {"json": None}}
    print("  ".join(f"{key} {value}" for key, value in report["machine"].items()))
    for name in options.structures:
        depths = [Config(STRUCTURES[name], n, options.width) for n in options.layers]
        widths = [Config(STRUCTURES[name], options.layers[0], n) for n in options.widths]
        report[name] = {
            "layers": table(f"{name}, width {options.width}", "layers", depths, options),
            "width": table(f"{name}, {options.layers[0]} layers", "width", widths, options),
        }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return report


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--structures", nargs="+", choices=STRUCTURES, default=list(STRUCTURES), help="which")
    add("--layers", type=int, nargs="+", default=[4, 8, 16, 32, 64, 96], help="depths")
    add("--widths", type=int, nargs="*", default=[64, 128, 256, 512, 1024], help="widths")
    add("--width", type=int, default=128, help="of the models of growing depth")
    add("--batch", type=int, default=4, help="examples in a step")
    add("--seq", type=int, default=64, dest="length", help="tokens in an example")
    add("--json", type=pathlib.Path, help="file to write the figures to")
    add("--smoke", action="store_true", help="defaults that take seconds")
    if parser.parse_args(arguments).smoke:
        parser.set_defaults(**SMOKE)  # what is given explicitly still counts
    return parser.parse_args(arguments)


def table(
    title: str, name: str, configs: Sequence[Config], options: argparse.Namespace
) -> dict[int, dict[str, dict[str, float]]]:
    """Measures each and prints its line at once: the last ones take minutes."""
    header = [name.rjust(6), *(f"{key} {unit}".rjust(23) for key, _, _, unit in COLUMNS)]
    print(f"\n{title}\n{'  '.join(header)}", flush=True)
    rows = {}
    for config in configs:
        size = getattr(config, name)
        rows[size] = measure(options, config)
        print(f"{size:6d}  {line(rows[size])}", flush=True)
    return rows


def measure(options: argparse.Namespace, config: Config) -> dict[str, dict[str, float]]:
    """Figures of the base model's step and of the wrapped one's."""
    tokens = jax.ShapeDtypeStruct((options.batch, options.length), jnp.int32)
    return {name: costs(*made) for name, made in steps(config, tokens).items()}


def steps(
    config: Config, tokens: Any, targets: str = "every kernel", rank: int = RANK
) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """(step, operands) of both, the operands abstract: trained, its state, the base, tokens."""
    model = Transformer(config)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    apply = lambda params, tokens: model.apply({"params": params}, tokens)
    axes = lora.infer_axes(apply, params, tokens)
    rules = [lora.LoRA(list(TARGETS[targets]), rank=rank, alpha=ALPHA_PER_RANK * rank)]
    factors = jax.eval_shape(
        lambda key: lora.init(key, params, rules, axes=axes), jax.random.key(0)
    )
    wrapped = lora.wrap(apply, dense="error")
    adamw, frozen = optax.adamw(1e-4), lora.freeze(optax.adamw(1e-4))

    def step(forward: Callable[..., jax.Array], tx: Any) -> Callable[..., Any]:
        def train(trained: Any, state: Any, base: Any, tokens: jax.Array) -> Any:
            loss = lambda trained: cross_entropy(forward(base, trained, tokens), tokens)
            value, grads = jax.value_and_grad(loss)(trained)
            updates, state = tx.update(grads, state, trained)
            return optax.apply_updates(trained, updates), state, value

        return train

    return {
        "base": (
            step(lambda _, params, tokens: apply(params, tokens), adamw),
            (params, jax.eval_shape(adamw.init, params), None, tokens),
        ),
        "wrapped": (
            step(wrapped, frozen),
            (factors, jax.eval_shape(frozen.init, factors), params, tokens),
        ),
    }


def costs(step: Callable[..., Any], operands: tuple[Any, ...]) -> dict[str, float]:
    """Seconds to trace and lower, seconds to compile, bytes of temporaries."""
    jax.clear_caches()
    begin = time.process_time()
    lowered = jax.jit(step).lower(*operands)
    middle = time.process_time()
    program = lowered.compile()
    end = time.process_time()
    memory = program.memory_analysis()
    return {
        "trace+lower": middle - begin,
        "compile": end - middle,
        "temp": memory.temp_size_in_bytes,
        "temp+results": memory.temp_size_in_bytes + memory.output_size_in_bytes,
    }


def line(row: dict[str, dict[str, float]]) -> str:
    """Each figure of the base, of the wrapped model, and their ratio."""
    cells = []
    for key, unit, digits, _ in COLUMNS:
        base, wrapped = row["base"][key] / unit, row["wrapped"][key] / unit
        cells.append(f"{base:7.{digits}f} {wrapped:7.{digits}f} {wrapped / base:6.2f}×")
    return "  ".join(cells)


if __name__ == "__main__":
    main()
