"""Many adapters in one batch: `wrap_batched` against a merged model and a pass for each adapter.

    python -m benchmarks.serving                     # 4 layers of width 256, rank 8, float32
    python -m benchmarks.serving --width 1024 --batch 32 --length 32 --adapters 8 64
    python -m benchmarks.serving --smoke             # seconds, for CI

`merged` is one adapter for the whole batch, the floor. `batched` answers each example with its own
adapter, of those that are loaded; `by hand` does the same with LoRA written into the layers.
`a pass each` runs the adapted model once for every adapter that the batch asks for, on its examples
alone. All are timed side by side, by the clock and by the processor time of all threads, which
other work on the machine disturbs less. Memory is what XLA plans: temporaries of a call, and the
stacked factors.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorax_fn as lora
from benchmarks.cost import align, machine
from benchmarks.handwritten import LoRALayers
from benchmarks.model import Config, Transformer
from benchmarks.variants import ALPHA_PER_RANK, TARGETS

Pytree = Any
REFERENCE = "merged"
SMOKE = {"layers": 1, "width": 32, "batch": 4, "length": 8, "rounds": 1, "adapters": [1, 8]}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns the figures: for each row, milliseconds, the ratio to `merged`, and bytes."""
    options = parse(arguments)
    print("  ".join(f"{key} {value}" for key, value in machine().items()))
    calls, memory = build(options)
    clock, processor = timed(calls, options.rounds)
    figures = {
        name: {
            "ms": float(np.median(clock[name]) * 1e3),
            "ratio": float(np.median(clock[name] / clock[REFERENCE])),
            "processor_ms": float(np.median(processor[name]) * 1e3),
            "processor_ratio": float(np.median(processor[name] / processor[REFERENCE])),
            **memory[name],
        }
        for name in calls
    }
    print(render(figures))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": figures}, indent=1))
    return figures


def timed(
    calls: dict[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Seconds of a call by the clock, and of all threads, (rounds,) each; neighbours in time."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter(), time.process_time()
            jax.block_until_ready(calls[name]())
            times[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    of = {name: np.array(pairs[1:]) for name, pairs in times.items()}  # the first round warms up
    return {n: t[:, 0] for n, t in of.items()}, {n: t[:, 1] for n, t in of.items()}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--layers", type=int, default=4)
    add("--width", type=int, default=256)
    add("--batch", type=int, default=8)
    add("--length", type=int, default=128, help="tokens in an example")
    add("--rank", type=int, default=8)
    add("--targets", choices=TARGETS, default="every kernel", help="what is adapted")
    add("--adapters", type=int, nargs="+", default=[1, 8, 64, 512], help="how many are loaded")
    add("--rounds", type=int, default=25, help="times each call is timed")
    add("--json", type=pathlib.Path, help="file to write the figures to")
    add("--smoke", action="store_true", help="defaults that take seconds")
    if parser.parse_args(arguments).smoke:
        parser.set_defaults(**SMOKE)
    return parser.parse_args(arguments)


def build(
    options: argparse.Namespace,
) -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, int]]]:
    """The compiled calls by name, and what memory each takes."""
    model = Transformer(Config(layers=options.layers, width=options.width))
    shape = (options.batch, options.length)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, model.config.vocabulary)
    params = jax.jit(model.init)(jax.random.key(1), tokens)
    axes = lora.infer_axes(model.apply, params, tokens)
    alpha = ALPHA_PER_RANK * options.rank
    rules = [lora.LoRA(TARGETS[options.targets], rank=options.rank, alpha=alpha)]
    factors = lora.init(jax.random.key(2), params, rules, axes=axes)
    merged = lora.merge(params, factors)

    calls, memory = {}, {}

    def compiled(name: str, fn: Callable[..., Any], *operands: Any) -> Callable[..., Any]:
        call = jax.jit(fn).lower(*operands).compile()
        memory[name] = {"temp": call.memory_analysis().temp_size_in_bytes, "stacked": 0}
        return call

    calls[REFERENCE] = functools.partial(
        compiled(REFERENCE, model.apply, merged, tokens), merged, tokens
    )
    for n in options.adapters:
        stacked = many(factors, n)
        ids = np.arange(options.batch, dtype=np.int32) * n // max(n, options.batch)
        operands = (params, stacked, jnp.asarray(ids), tokens)
        name, by_hand, passes = f"batched, {n}", f"by hand, {n}", f"a pass each, {n}"
        calls[name] = functools.partial(
            compiled(name, lora.wrap_batched(model.apply), *operands), *operands
        )
        written = params, collection(stacked["params"]), *operands[2:]
        calls[by_hand] = functools.partial(
            compiled(by_hand, written_by_hand(model.config, options), *written), *written
        )
        groups = [(jnp.int32(i), tokens[ids == i]) for i in np.unique(ids)]
        one = compiled(passes, one_adapter(model), params, stacked, *groups[0])
        calls[passes] = functools.partial(each_group, one, params, stacked, groups)
        check(calls[name](), calls[passes]())
        check(calls[by_hand](), calls[passes]())
        size = sum(array.nbytes for array in jax.tree.leaves(stacked))
        for row in (name, by_hand, passes):
            memory[row]["stacked"] = size
    return calls, memory


def many(factors: Pytree, n: int) -> Pytree:
    """Stacked factors that all differ."""
    keys = iter(jax.random.split(jax.random.key(3), len(jax.tree.leaves(factors))))
    return jax.tree.map(
        lambda array: 0.02 * jax.random.normal(next(keys), (n, *array.shape)), factors
    )


def collection(factors: Pytree) -> Pytree:
    """Factors as the variables of the hand-written layers: a and b in the place of a module."""
    node = factors.get("kernel")
    if node is not None:
        return {"a": node.a, "b": node.b}
    return {name: collection(sub) for name, sub in factors.items() if isinstance(sub, dict)}


def written_by_hand(config: Config, options: argparse.Namespace) -> Callable[..., jax.Array]:
    """Every example's factors gathered, and one call of the layers that have LoRA in them."""
    layers = LoRALayers(TARGETS[options.targets], options.rank, ALPHA_PER_RANK)
    model = Transformer(config, layers)

    def call(params: Pytree, stacked: Pytree, ids: jax.Array, tokens: jax.Array) -> jax.Array:
        def one(factors: Pytree, example: jax.Array) -> jax.Array:
            return model.apply(params | {"lora": factors}, example[None])[0]

        return jax.vmap(one)(jax.tree.map(lambda array: array[ids], stacked), tokens)

    return call


def one_adapter(model: Transformer) -> Callable[..., jax.Array]:
    apply = lora.wrap(model.apply)
    return lambda params, stacked, i, tokens: apply(params, lora.take(stacked, i), tokens)


def each_group(
    one: Callable[..., jax.Array], params: Pytree, stacked: Pytree, groups: Sequence[tuple]
) -> list[jax.Array]:
    return [one(params, stacked, i, tokens) for i, tokens in groups]


def check(batched: jax.Array, groups: Sequence[jax.Array]) -> None:
    """Both ways to answer give the same.

    Raises:
        ValueError: if they do not.
    """
    difference = float(jnp.abs(batched - jnp.concatenate(groups)).max())
    if not difference <= 1e-3:
        raise ValueError(f"the logits differ by {difference}; their times cannot be compared.")


def render(figures: dict[str, dict[str, Any]]) -> str:
    rows = [("loaded adapters", "ms", "", "processor ms", "", "temp MiB", "stacked MiB")]
    rows += [
        (
            name,
            f"{row['ms']:.1f}",
            f"{row['ratio']:.2f}×",
            f"{row['processor_ms']:.1f}",
            f"{row['processor_ratio']:.2f}×",
            f"{row['temp'] / 2**20:.1f}",
            f"{row['stacked'] / 2**20:.1f}",
        )
        for name, row in figures.items()
    ]
    return align(rows)


if __name__ == "__main__":
    main()
