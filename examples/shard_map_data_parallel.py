"""Data-parallel LoRA with `jax.shard_map`: collectives written out, under one `jit`.

As `pmap_data_parallel.py`, in the form that JAX recommends today: arrays keep their global shapes,
the mesh has a name, and what crosses the wire stands in the code.

    export XLA_FLAGS=--xla_force_host_platform_device_count=8
    python examples/shard_map_data_parallel.py --check
"""

from collections.abc import Sequence

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from minilm.data import Split
from minilm.parallel import Job, Pytree, parse_options, prepare, report
from minilm.training import cross_entropy


def main(arguments: Sequence[str] | None = None) -> dict:
    """Returns the losses, the accuracy, and of a check the largest difference of a loss."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, P())
    job = prepare(parse_options(__doc__, arguments), lambda params: jax.device_put(params, whole))
    return report(job, *train(job, mesh))


def train(job: Job, mesh: Mesh) -> tuple[Pytree, list[float]]:
    """The factors after the last step, and each step's loss over the whole batch."""
    apply, tx = job.apply, job.tx

    def local(factors: Pytree, variables: Pytree, part: Split) -> tuple[jax.Array, Pytree]:
        def loss_of(factors: Pytree) -> jax.Array:
            loss = cross_entropy(apply(variables, factors, part.ids, part.mask), part.labels)
            return jax.lax.pmean(loss, "data")

        # Gradients of what all devices hold: shard_map sums them over `data` by itself.
        return jax.value_and_grad(loss_of)(factors)

    gradients = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P(), P())
    )

    @jax.jit
    def step(variables: Pytree, factors: Pytree, state: Pytree, batch: Split) -> tuple:
        loss, grads = gradients(factors, variables, batch)
        updates, state = tx.update(grads, state, factors)
        return optax.apply_updates(factors, updates), state, loss

    factors, losses = job.factors, []
    state = jax.device_put(tx.init(factors), NamedSharding(mesh, P()))
    for batch in job.batches():
        batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
        factors, state, loss = step(job.variables, factors, state, batch)
        losses.append(float(loss))
    return factors, losses


if __name__ == "__main__":
    main()
