"""Equinox modules: attention, convolutions and recurrence in torch's weight layouts."""

import equinox as eqx
import jax
import jax.numpy as jnp

from .harness import Model, ModelCase, random_params

WIDTH, LENGTH, BATCH = 8, 5, 2
X = jax.random.normal(jax.random.key(13), (BATCH, LENGTH, WIDTH))


def equinox_model(make, *args):
    """The array part of a module comes first; of `make(key)` only the shapes are needed."""
    module = eqx.filter_eval_shape(make, jax.random.key(0))
    shapes, static = eqx.partition(module, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    params = random_params(shapes)
    return Model(lambda params, *args: eqx.combine(params, static)(*args), params, args)


class EquinoxConvNet(eqx.Module):
    """Convolutions in torch's layout, a depthwise one among them, and a transposed one."""

    layers: list

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.layers = [
            eqx.nn.Conv2d(3, 8, 3, stride=2, padding=1, key=keys[0]),
            jax.nn.relu,
            eqx.nn.Conv2d(8, 16, 3, groups=8, key=keys[1]),
            jax.nn.relu,
            eqx.nn.ConvTranspose2d(16, 4, 2, stride=2, key=keys[2]),
            jnp.ravel,
            eqx.nn.Linear(4 * 4 * 4, 5, key=keys[3]),
        ]

    def __call__(self, image):
        for layer in self.layers:
            image = layer(image)
        return image


class EquinoxRecurrent(eqx.Module):
    """GRU and LSTM cells scanned over time, on embedded tokens."""

    embed: eqx.nn.Embedding
    gru: eqx.nn.GRUCell
    lstm: eqx.nn.LSTMCell

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(11, WIDTH, key=keys[0])
        self.gru = eqx.nn.GRUCell(WIDTH, 6, key=keys[1])
        self.lstm = eqx.nn.LSTMCell(6, 4, key=keys[2])

    def __call__(self, tokens):
        def step(carry, token):
            hidden = self.gru(self.embed(token), carry[0])
            state = self.lstm(hidden, carry[1])
            return (hidden, state), state[0]

        start = jnp.zeros(6), (jnp.zeros(4), jnp.zeros(4))
        return jax.lax.scan(step, start, tokens)[1]


def equinox_attention():
    def make(key):
        return eqx.nn.MultiheadAttention(2, WIDTH, use_query_bias=True, key=key)

    return equinox_model(make, X[0], X[0], X[0])


def batched_mlp():
    """The module itself comes first: its activation function is a leaf of the params."""
    module = eqx.nn.MLP(WIDTH, 3, 12, 2, key=jax.random.key(0))
    return Model(lambda module, x: jax.vmap(module)(x), module, [X[0]])


IMAGE = jax.random.normal(jax.random.key(4), (3, 8, 8))
CASES = [
    ModelCase("equinox MLP, vmapped", batched_mlp, ".*/weight", 3),
    ModelCase("equinox attention", equinox_attention, ".*/weight", 4),
    ModelCase("equinox conv net", lambda: equinox_model(EquinoxConvNet, IMAGE), ".*/weight", 4),
    ModelCase(
        "equinox recurrent",
        lambda: equinox_model(EquinoxRecurrent, jnp.arange(5)),
        ".*/weight(_ih|_hh)?",
        5,
    ),
]
