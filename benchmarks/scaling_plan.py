"""A paper plan for real models on 64 devices: bytes of a device, bytes between devices, adapters.

    python -m benchmarks.scaling_plan                  # prints the tables
    python -m benchmarks.scaling_plan --write          # and puts them into benchmarks/SCALING.md
    python -m benchmarks.scaling_plan --models tiny --devices 8 --batch 8 --length 16

Nothing is allocated: parameters are counted on abstract arrays, bytes of a device follow from their
shardings, and the training step is lowered and partitioned by XLA for as many pretended CPU
devices, in a process of its own; what it sends is read from the partitioned program.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P

import lorax_fn as lora
from benchmarks.collectives import Collective, collectives
from benchmarks.cost import machine
from benchmarks.decoder import Config, apply

MODELS = {
    "Llama-3-8B": Config(32, 4096, 32, 8, 14336, 128256),
    "Llama-3-70B": Config(80, 8192, 64, 8, 28672, 128256),
    "Mixtral-8x7B": Config(32, 4096, 32, 8, 14336, 32000, experts=8, theta=1e6),
    "tiny": Config(3, 32, 4, 2, 64, 80, head_dim=8),
    "tiny experts": Config(3, 32, 4, 2, 64, 80, experts=4, head_dim=8),
}
PUBLISHED = {
    "Llama-3-8B": 8_030_261_248,
    "Llama-3-70B": 70_553_706_496,
    "Mixtral-8x7B": 46_702_792_704,
}
RANK, ALPHA = 16, 32
TARGETS = ["query", "key", "value", "out", "gate", "up", "down"]
PLAN = pathlib.Path(__file__).parent / "SCALING.md"
MARK = "<!-- what follows is written by `python -m benchmarks.scaling_plan --write` -->\n"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    if options.worker:
        return traffic(options)
    report: dict[str, Any] = {}
    for name in options.models:
        report[name] = {"parameters": parameters(name)}
        for mesh in meshes(options.devices):
            print(f"{name} on {mesh[0]} × {mesh[1]} devices", file=sys.stderr, flush=True)
            figures = {"memory": memory(name, mesh, options), "traffic": {}}
            for method in ("LoRA", "full"):
                figures["traffic"][method] = partitioned(name, mesh, method, options)
            report[name][f"{mesh[0]} × {mesh[1]}"] = figures
    text = render(report, options)
    print(text)
    if options.write:
        PLAN.write_text(PLAN.read_text().partition(MARK)[0] + MARK + "\n" + text)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return report


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(PUBLISHED), help="which to plan for")
    add("--devices", type=int, default=64, help="how many; all on fsdp, then 8 (or 2) on tensor")
    add("--batch", type=int, default=64, help="sequences in a step, over all devices")
    add("--length", type=int, default=4096, help="tokens of a sequence")
    add("--write", action="store_true", help=f"put the tables into {PLAN.name}")
    add("--json", type=pathlib.Path, help="file to write the figures to")
    add("--worker", nargs=3, metavar=("FSDP", "TENSOR", "METHOD"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def meshes(devices: int) -> list[tuple[int, int]]:
    """(fsdp, tensor): everything on fsdp, and a row of devices on tensor."""
    tensor = 8 if devices % 64 == 0 else 2
    return [(devices, 1), (devices // tensor, tensor)]


# What there is: counted on abstract arrays.


def abstract(name: str, mesh: Any, dtype: Any = jnp.bfloat16) -> tuple[Any, Any, Any]:
    """(params, factors, optimiser state) as abstract arrays with their shardings on the mesh."""
    config = MODELS[name]
    params = config.params(mesh, dtype)
    tokens = jax.ShapeDtypeStruct((mesh.shape["fsdp"], 8), jnp.int32)
    axes = lora.infer_axes(functools.partial(apply, config, mesh), params, tokens)
    rules = [lora.LoRA(TARGETS, rank=RANK, alpha=ALPHA)]
    make = functools.partial(lora.init, params=params, rules=rules, axes=axes)
    factors = placed(jax.eval_shape(make, jax.random.key(0)), params)
    return params, factors, moments(lora.freeze(optax.adamw(1e-4)), factors)


def placed(factors: Any, params: Any) -> Any:
    """Abstract factors with the shardings that follow from those of params."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        factors,
        lora.shardings(params, factors),
    )


def moments(tx: optax.GradientTransformation, trained: Any) -> Any:
    """The optimiser's abstract state; a moment lies where what it belongs to lies."""
    state = jax.eval_shape(tx.init, trained)
    return optax.tree_utils.tree_map_params(
        tx,
        lambda x, like: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.sharding),
        state,
        trained,
    )


def per_device(tree: Any) -> int:
    """Bytes that a device holds of a tree of abstract arrays."""

    def of(x: Any) -> int:
        sharding = getattr(x, "sharding", None)
        shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
        return int(np.prod(shape, dtype=np.int64)) * x.dtype.itemsize

    return sum(map(of, jax.tree.leaves(tree)))


def count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def parameters(name: str) -> dict[str, int]:
    """Of the model, against the published number, and of its adapter.

    Raises:
        ValueError: if the model is not the published one.
    """
    mesh = AbstractMesh((1, 1), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    params, factors, _ = abstract(name, mesh)
    total = count(params)
    if total != PUBLISHED.get(name, total):
        raise ValueError(f"{name} has {total:,} parameters here, published are {PUBLISHED[name]:,}")
    return {"model": total, "adapter": count(factors), "adapter bytes": per_device(factors)}


def memory(name: str, shape: tuple[int, int], options: argparse.Namespace) -> dict[str, int]:
    """Bytes of a device, by what they are for."""
    config = MODELS[name]
    mesh = AbstractMesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    params, factors, state = abstract(name, mesh)
    full_state = moments(optax.adamw(1e-4), params)
    tokens = options.batch // shape[0] * options.length  # of a device
    return {
        "base": per_device(params),
        "factors": per_device(factors),
        "gradients": per_device(factors),
        "moments": per_device(state),
        "kept activations": tokens * config.width * config.layers * 2,
        "full gradients": per_device(params),
        "full moments": per_device(full_state),
    }


# What is sent: read from the partitioned program.


def partitioned(
    name: str, shape: tuple[int, int], method: str, options: argparse.Namespace
) -> dict[str, float]:
    """`traffic` in a process that has the devices.

    Raises:
        RuntimeError: if that process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "traffic.json"
        flags = [
            f"--xla_force_host_platform_device_count={shape[0] * shape[1]}",
            "--xla_llvm_disable_expensive_passes=true",
            f"--xla_dump_to={folder}",
            "--xla_dump_hlo_as_text",
            "--xla_dump_hlo_pass_re=spmd-partitioning",
        ]
        env = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "benchmarks.scaling_plan", "--models", name]
        command += ["--batch", str(options.batch), "--length", str(options.length)]
        command += ["--worker", *map(str, shape), method, "--json", str(out)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}, {shape}, {method} failed:\n{done.stderr[-4000:]}")
        return json.loads(out.read_text())


def traffic(options: argparse.Namespace) -> dict[str, float]:
    """Compiles one training step and sums up what it sends; runs in the process of `partitioned`.

    Returns:
        Bytes that a device sends in a step, by what they are; what it receives is as much.
    """
    fsdp, tensor, method = options.worker
    (name,) = options.models
    config = MODELS[name]
    mesh = jax.make_mesh(
        (int(fsdp), int(tensor)), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2
    )
    lower_step(config, name, mesh, method, (options.batch, options.length)).compile()
    folder = options.json.parent
    (dump,) = folder.glob("*jit_train_step*after_spmd-partitioning*")
    result = by_purpose(collectives(dump.read_text()), int(tensor))
    options.json.write_text(json.dumps(result))
    return result


def lower_step(config: Config, name: str, mesh: Any, method: str, shape: tuple[int, int]) -> Any:
    """A training step with AdamW, lowered for abstract arrays that lie on the mesh."""
    params, factors, state = abstract(name, mesh)
    tx: Any = lora.freeze(optax.adamw(1e-4))
    forward = functools.partial(apply, config, mesh)
    wrapped = lora.wrap(forward, dense="error")
    if method == "full":
        tx, factors, state = optax.adamw(1e-4), params, moments(optax.adamw(1e-4), params)
        wrapped = lambda _, trained, tokens: forward(trained, tokens)

    def train_step(params: Any, trained: Any, state: Any, tokens: jax.Array) -> Any:
        def loss(trained: Any) -> jax.Array:
            logits = wrapped(params, trained, tokens)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    places = jax.tree.map(lambda x: x.sharding, (factors, state))
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, P("fsdp")))
    step = jax.jit(train_step, out_shardings=(*places, None))
    return step.lower(params, factors, state, tokens)


def by_purpose(moved: list[Collective], tensor: int) -> dict[str, float]:
    """Bytes sent by a device in a step: along `tensor`, and along `fsdp` by what they are.

    The rank tells the factors from the base, since nothing else is as long.
    """
    result = dict.fromkeys(PURPOSES, 0.0)
    for c in moved:
        if len(c.devices) == tensor and c.devices[1] - c.devices[0] == 1:
            result["activations"] += c.sent
        elif c.kind == "all-gather":
            result["factors gathered" if RANK in c.shape else "base gathered"] += c.sent
        else:
            result["gradients"] += c.sent
            result["largest gradient"] = max(result["largest gradient"], c.size)
    return result


PURPOSES = ("base gathered", "factors gathered", "activations", "gradients", "largest gradient")


# What is printed.


def render(report: dict[str, Any], options: argparse.Namespace) -> str:
    """Three tables in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in machine().items())
    tokens = options.batch * options.length
    parts = [
        (
            f"Counted with {versions}. A step: {options.batch} sequences of {options.length:,} "
            f"tokens ({tokens:,}), {options.devices} devices, bfloat16 base, float32 factors of "
            f"rank {RANK} on {', '.join(TARGETS)}; AdamW.\n"
        ),
        "### Parameters\n",
        markdown(
            ("", "base", "published", "base, bytes", "adapter", "of the base", "adapter, bytes"),
            [parameter_row(name, report[name]["parameters"]) for name in report],
        ),
        "### Bytes of a device\n",
        markdown(
            ("fsdp × tensor", "base", "factors", "their gradients", "AdamW", "kept activations",
             "LoRA in all", "full fine-tuning", "LoRA / full"),
            [memory_row(f"{name}, {mesh}", found["memory"]) for name, mesh, found in each(report)],
        ),
        "### Bytes that a device sends in a step\n",
        markdown(
            ("fsdp × tensor", "", "base gathered", "factors gathered", "activations", "gradients",
             "in all", "largest array reduced, numbers"),
            [
                traffic_row(f"{name}, {mesh}", method, figures["traffic"][method])
                for name, mesh, figures in each(report)
                for method in figures["traffic"]
            ],
        ),
    ]  # fmt: skip
    return "\n".join(parts)


def each(report: dict[str, Any]) -> list[tuple[str, str, Any]]:
    return [
        (name, mesh, figures)
        for name, of_model in report.items()
        for mesh, figures in of_model.items()
        if mesh != "parameters"
    ]


def parameter_row(name: str, found: dict[str, int]) -> Sequence[str]:
    published = f"{PUBLISHED[name]:,}" if name in PUBLISHED else "none"
    share = f"{found['adapter'] / found['model']:.2%}"
    return (
        name,
        f"{found['model']:,}",
        published,
        size(2 * found["model"]),
        f"{found['adapter']:,}",
        share,
        size(found["adapter bytes"]),
    )


def memory_row(title: str, found: dict[str, int]) -> Sequence[str]:
    ours = ("base", "factors", "gradients", "moments", "kept activations")
    full = ("base", "full gradients", "full moments", "kept activations")
    lora_bytes, full_bytes = (sum(found[name] for name in names) for names in (ours, full))
    totals = (size(lora_bytes), size(full_bytes), f"{lora_bytes / full_bytes:.2f}")
    return (title, *(size(found[name]) for name in ours), *totals)


def traffic_row(title: str, method: str, found: dict[str, float]) -> Sequence[str]:
    columns = PURPOSES[:-1]
    total = size(sum(found[name] for name in columns))
    bytes_sent = (size(found[name]) for name in columns)
    return (title, method, *bytes_sent, total, f"{found['largest gradient']:,.0f}")


def size(n: float) -> str:
    """Bytes in GB or MB, three figures."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if n >= unit:
            return f"{n / unit:.3g} {name}" if n < 1000 * unit else f"{n / unit:.0f} {name}"
    return f"{n:.0f} B"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
