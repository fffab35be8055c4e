"""LoRA on several processes with `jax.distributed`, as on a cluster: each has devices and data.

One process for each host is the rule; here they are started on this machine, with four pretended
devices each, and talk over the loopback interface. The mesh spans all of them: the base is cut
within a process, the batch is divided between them, and only the factors' gradients go across.
Each process reads its own part of each batch. The loop is that of `fsdp_mesh.py`.

    python examples/multi_process.py --processes 2 --check
    python examples/multi_process.py --checkpoints run      # may be killed, and started again
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsdp_mesh
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from minilm.data import Split
from minilm.options import positive
from minilm.parallel import Pytree, parse_options, prepare, report
from minilm.processes import end_with_parent, free_address, run_together
from minilm.weights import load_tree, save_tree


def main(arguments: Sequence[str] | None = None) -> dict:
    """Starts the processes, then evaluates what they trained.

    Returns:
        The losses, the accuracy, and of a check the largest difference of a loss.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    if options.worker is not None:
        return work(options)
    with tempfile.TemporaryDirectory() as folder:
        address = free_address()
        command = [sys.executable, __file__, *arguments, "--out", folder, "--address", address]
        run_together(
            [[*command, "--worker", str(i)] for i in range(options.processes)],
            [environment(options, i) for i in range(options.processes)],
            options.timeout,
        )
        losses = json.loads((Path(folder) / "losses.json").read_text())
        job = prepare(options)
        factors = load_tree(Path(folder) / "factors.safetensors", job.factors)
    return report(job, factors, losses, devices=options.processes * options.devices)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    def more(add: Callable[..., Any]) -> None:
        add("--processes", type=positive, default=2, help="how many to start")
        add("--devices", type=positive, default=4, help="devices of each")
        add("--timeout", type=float, default=3600, help="seconds after which the run is ended")
        for name, kind in (("--worker", int), ("--address", str), ("--out", Path)):
            add(name, type=kind, help=argparse.SUPPRESS)  # between the processes

    def devices(options: argparse.Namespace) -> int:
        return options.processes * options.devices

    return parse_options(__doc__, arguments, more=more, devices=devices, resumable=True)


def environment(options: argparse.Namespace, process: int) -> dict[str, str]:
    """That of a process: how many devices it has, and that the first one alone shows progress."""
    flags = f"--xla_force_host_platform_device_count={options.devices}"
    quiet = {} if process == 0 else {"TQDM_DISABLE": "1"}
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | quiet


def work(options: argparse.Namespace) -> dict:
    """What each process does; the first one writes the results."""
    end_with_parent()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        options.address, options.processes, options.worker, initialization_timeout=120
    )
    mesh = fsdp_mesh.make_mesh()
    job = prepare(options, lambda params: jax.device_put(params, fsdp_mesh.shardings(mesh, params)))
    along = NamedSharding(mesh, P(("data", "fsdp")))

    def own_part(batch: Split) -> Split:
        """The global arrays of a batch, each process giving the rows that its devices hold."""
        return jax.tree.map(lambda rows: from_own_rows(along, rows), batch)

    factors, losses = fsdp_mesh.train(job, mesh, own_part)
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))(factors)
    if options.worker == 0:
        save_tree(options.out / "factors.safetensors", on_host(whole))
        (options.out / "losses.json").write_text(json.dumps(losses))
    return {"losses": losses}


def from_own_rows(along: NamedSharding, rows: np.ndarray) -> jax.Array:
    """A global array of which this process gives the rows that its devices hold."""
    places = along.addressable_devices_indices_map(rows.shape).values()
    starts = sorted({place[0].start or 0 for place in places})
    length = along.shard_shape(rows.shape)[0]
    own = np.concatenate([rows[start : start + length] for start in starts])
    return jax.make_array_from_process_local_data(along, own, rows.shape)


def on_host(tree: Pytree) -> Pytree:
    """Arrays that every device holds whole, as this process sees them."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), tree)


if __name__ == "__main__":
    main()
