"""Data-parallel LoRA with `jax.pmap`: each device has its part of the batch and all of the model.

The task and the model are those of `finetune_minilm.py`. The frozen weights cross no wire while
training: only the factors' gradients are averaged over the devices, a fiftieth of the model. On one
CPU, eight pretended devices show how it goes on a pod:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/pmap_data_parallel.py --check

With `--check` one device then does the same steps with the whole batch; the losses have to agree.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from minilm.data import Split
from minilm.parallel import Job, Pytree, parse_options, prepare, report
from minilm.training import cross_entropy


def main(arguments: Sequence[str] | None = None) -> dict:
    """Returns the losses, the accuracy, and of a check the largest difference of a loss."""
    job = prepare(parse_options(__doc__, arguments))
    return report(job, *train(job))


def train(job: Job) -> tuple[Pytree, list[float]]:
    """The factors after the last step, and each step's loss over the whole batch."""
    apply, tx = job.apply, job.tx

    def loss_of(factors: Pytree, variables: Pytree, part: Split) -> jax.Array:
        return cross_entropy(apply(variables, factors, part.ids, part.mask), part.labels)

    @functools.partial(jax.pmap, axis_name="data", donate_argnums=(1, 2))
    def step(variables: Pytree, factors: Pytree, state: Pytree, part: Split) -> tuple:
        loss, grads = jax.value_and_grad(loss_of)(factors, variables, part)
        loss, grads = jax.lax.pmean((loss, grads), "data")  # nothing of the model's size
        updates, state = tx.update(grads, state, factors)
        return optax.apply_updates(factors, updates), state, loss

    variables, factors, state = map(
        on_each_device, (job.variables, job.factors, tx.init(job.factors))
    )
    losses = []
    for batch in job.batches():
        factors, state, loss = step(variables, factors, state, jax.tree.map(divided, batch))
        losses.append(float(loss[0]))
    return jax.tree.map(lambda copies: copies[0], factors), losses


def on_each_device(tree: Pytree) -> Pytree:
    """A copy of each array on each device: (devices, …), placed as `step` returns its results."""
    devices = jax.local_device_count()
    copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (devices, *x.shape)), tree)
    return jax.pmap(lambda x: x, axis_name="data")(copies)


def divided(array: np.ndarray) -> np.ndarray:
    """(batch, …) to (devices, batch / devices, …)."""
    return array.reshape(jax.local_device_count(), -1, *array.shape[1:])


if __name__ == "__main__":
    main()
