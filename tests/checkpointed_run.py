"""A training run that may be killed at any moment: `python checkpointed_run.py FOLDER STEPS`.

Prints each step's loss, exactly, once the step is saved; resumes from what is in FOLDER.
"""

import sys

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lorax_fn as lora

RULES = [lora.LoRA("w", rank=2, alpha=3), lora.Full("v")]


def make_mesh(*shape):
    devices = jax.devices()[: shape[0] * shape[1]]
    return jax.make_mesh(
        shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def start(mesh):
    """(params, factors, state), placed on the mesh."""
    keys = jax.random.split(jax.random.key(0))
    params = {"w": jax.random.normal(keys[0], (64, 32)), "v": jax.random.normal(keys[1], (32, 8))}
    specs = {"w": P("fsdp", "tensor"), "v": P("tensor")}
    params = jax.device_put(params, {n: NamedSharding(mesh, s) for n, s in specs.items()})
    factors = lora.init(jax.random.key(1), params, RULES)
    return params, factors, (optimiser().init(factors), jax.random.key(2))


def optimiser():
    return lora.freeze(optax.adamw(1e-2))


@jax.jit
def step(params, factors, state):
    """One step on data that are drawn from a key in the state."""
    opt_state, key = state
    key, drawn = jax.random.split(key)
    x = jax.random.normal(drawn, (16, 64))
    apply = lora.wrap(lambda params, x: jnp.tanh(x @ params["w"]) @ params["v"], dense="error")
    loss = lambda factors: jnp.mean((apply(params, factors, x) - x[:, :8]) ** 2)
    value, grads = jax.value_and_grad(loss)(factors)
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimiser().update(grads, opt_state, factors)
    return optax.apply_updates(factors, updates), (opt_state, key), value


def losses(folder, steps, mesh):
    """Yields (step, loss) from where the checkpoints end."""
    params, factors, state = start(mesh)
    factors, state, done = lora.restore_checkpoint(folder, factors, state)
    for i in range(done, steps):
        factors, state, loss = step(params, factors, state)
        lora.save_checkpoint(folder, i + 1, factors, state)
        yield i, float(loss)


if __name__ == "__main__":
    for i, loss in losses(sys.argv[1], int(sys.argv[2]), make_mesh(4, 2)):
        print(i, loss.hex(), flush=True)
