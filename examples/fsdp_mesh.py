"""LoRA under `jit` on a (data, fsdp, tensor) mesh: a base that is cut over the devices.

The frozen kernels are cut along `fsdp` and `tensor`, the batch along `data` and `fsdp`; the
factors are cut as their weights are, by `lora.init`. There are no collectives to write: XLA's
partitioner puts them in. The task and the model are those of `finetune_minilm.py`.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/fsdp_mesh.py --check

With `--checkpoints FOLDER` it saves as it goes, and a run that was killed goes on where it was, on
other devices too.
"""

from collections.abc import Callable, Sequence

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from minilm.data import Split
from minilm.parallel import Job, Pytree, parse_options, prepare, report
from minilm.training import cross_entropy

import lorax_fn as lora

SAVING = 10  # steps from one checkpoint to the next


def main(arguments: Sequence[str] | None = None) -> dict:
    """Returns the losses, the accuracy, and of a check the largest difference of a loss."""
    mesh = make_mesh()
    options = parse_options(__doc__, arguments, resumable=True)
    job = prepare(options, lambda params: jax.device_put(params, shardings(mesh, params)))
    return report(job, *train(job, mesh))


def make_mesh() -> Mesh:
    """All devices, in twos along `tensor` and `fsdp` as far as they go, the rest along `data`."""
    devices = jax.device_count()
    tensor = 2 if devices % 2 == 0 else 1
    fsdp = 2 if devices % (2 * tensor) == 0 else 1
    shape = (devices // (fsdp * tensor), fsdp, tensor)
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def shardings(mesh: Mesh, params: Pytree) -> Pytree:
    """Matrices are cut along both axes of the model, everything else is whole on each device."""

    def of(key_path: tuple, leaf: jax.Array) -> NamedSharding:
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        if leaf.ndim != 2 or "encoder" not in path:
            return NamedSharding(mesh, P())
        inward = path.endswith("output/dense/kernel")  # column-parallel before, row-parallel here
        return NamedSharding(mesh, P("tensor", "fsdp") if inward else P("fsdp", "tensor"))

    return jax.tree_util.tree_map_with_path(of, params)


def train(
    job: Job, mesh: Mesh, place: Callable[[Split], Split] | None = None
) -> tuple[Pytree, list[float]]:
    """The factors after the last step, and each step's loss; `place` puts a batch on the mesh."""
    apply, tx = job.apply, job.tx

    @jax.jit
    def step(variables: Pytree, factors: Pytree, state: Pytree, batch: Split) -> tuple:
        def loss_of(factors: Pytree) -> jax.Array:
            return cross_entropy(apply(variables, factors, batch.ids, batch.mask), batch.labels)

        loss, grads = jax.value_and_grad(loss_of)(factors)
        updates, state = tx.update(grads, state, factors)
        return optax.apply_updates(factors, updates), state, loss

    along = NamedSharding(mesh, P(("data", "fsdp")))
    place = place or (lambda batch: jax.device_put(batch, along))
    folder, done, losses = job.options.checkpoints, 0, []
    factors, state = job.factors, jax.jit(tx.init)(job.factors)
    if folder:
        factors, state, done = lora.restore_checkpoint(folder, factors, state)
    for i, batch in enumerate(job.batches(done), done + 1):
        factors, state, loss = step(job.variables, factors, state, place(batch))
        losses.append(float(loss))
        if folder and (i % SAVING == 0 or i == job.options.steps):
            lora.save_checkpoint(folder, i, factors, state)
    return factors, losses


if __name__ == "__main__":
    main()
