"""LoRA under FSDP: layers scanned and rematerialised, their kernels gathered one layer at a time.

The kernels lie cut over all devices, and so does each batch. A layer's kernels are gathered when
the layer runs, forward and again backward, and forgotten after it; of gradients only the factors'
travel. The task and the model are those of `finetune_minilm.py`, its layers stacked.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/fsdp_scan.py --check
"""

from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from minilm.data import PACKAGES
from minilm.parallel import Job, Pytree, parse_options, prepare, report
from minilm.scanned import ScannedClassifier, stack_layers
from minilm.training import train_step

import lorax_fn as lora


def main(arguments: Sequence[str] | None = None) -> dict:
    """Returns the losses, the accuracy, and of a check the largest difference of a loss."""
    job, mesh = make_job(arguments)
    return report(job, *train(job, mesh))


def make_job(arguments: Sequence[str] | None) -> tuple[Job, Mesh]:
    """The model with its layers stacked and cut over all devices."""
    options = parse_options(__doc__, arguments)
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, P())

    def place(variables: Pytree) -> Pytree:
        stacked = stack_layers(variables)
        return jax.device_put(stacked, jax.tree.map(lambda leaf: cut(leaf, mesh), stacked))

    def gather(params: Pytree) -> Pytree:
        return jax.lax.with_sharding_constraint(params, whole)

    alone = ScannedClassifier(len(PACKAGES))
    sharded = ScannedClassifier(len(PACKAGES), gather=gather)
    return prepare(options, place, sharded, alone), mesh


def cut(leaf: jax.Array, mesh: Mesh) -> NamedSharding:
    """Stacked kernels (layers, in, out) along their inputs, all else whole on each device."""
    return NamedSharding(mesh, P(None, "fsdp") if leaf.ndim == 3 else P())


def make_step(job: Job) -> Callable[..., tuple]:
    """A compiled step: (variables, factors, state, batch) -> (factors, state, loss)."""
    placed = lora.shardings(job.variables, job.factors)
    step = train_step(job.apply, job.tx, donate=False)
    return jax.jit(step, out_shardings=(placed, None, None))  # factors stay cut as they are


def train(job: Job, mesh: Mesh) -> tuple[Pytree, list[float]]:
    """The factors after the last step, and each step's loss."""
    step = make_step(job)
    along = NamedSharding(mesh, P("fsdp"))
    factors, state, losses = job.factors, jax.jit(job.tx.init)(job.factors), []
    for batch in job.batches():
        factors, state, loss = step(job.variables, factors, state, jax.device_put(batch, along))
        losses.append(float(loss))
    return factors, losses


if __name__ == "__main__":
    main()
