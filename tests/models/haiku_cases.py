"""Functions transformed by Haiku, with and without state."""

import haiku as hk
import jax
import jax.numpy as jnp

from .harness import Model, ModelCase, random_params

WIDTH, LENGTH, BATCH = 8, 5, 2
X = jax.random.normal(jax.random.key(13), (BATCH, LENGTH, WIDTH))


def haiku_model(forward, *args, state=False):
    """A pure function transformed by Haiku; with `state`, the state is an input and an output."""
    if not state:
        transformed = hk.without_apply_rng(hk.transform(forward))
        shapes = jax.eval_shape(transformed.init, jax.random.key(0), *args)
        return Model(transformed.apply, random_params(shapes), args)
    transformed = hk.transform_with_state(forward)
    params, initial = jax.eval_shape(transformed.init, jax.random.key(0), *args)
    initial = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), initial)
    return Model(transformed.apply, random_params(params), (initial, jax.random.key(1), *args))


def haiku_transformer(tokens):
    embed = hk.Embed(11, WIDTH)
    x = embed(tokens)
    init = hk.initializers.VarianceScaling(1.0)
    x = x + hk.MultiHeadAttention(2, 4, w_init=init, model_size=WIDTH)(x, x, x)
    x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
    return hk.nets.MLP([12, WIDTH])(x) @ embed.embeddings.T


def haiku_conv_net(images):
    x = hk.Conv2D(8, 3, stride=2)(images)
    x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(x, is_training=True))
    x = jax.nn.relu(hk.DepthwiseConv2D(2, 3)(x))
    x = jax.nn.relu(hk.Conv2DTranspose(4, 3, stride=2)(x))
    x = hk.dropout(hk.next_rng_key(), 0.2, hk.Flatten()(x))
    return hk.Linear(5)(x)


def haiku_recurrent(x):
    hidden, _ = hk.dynamic_unroll(hk.LSTM(6), x, hk.LSTM(6).initial_state(BATCH), time_major=False)
    return hk.dynamic_unroll(hk.GRU(6), hidden, jnp.zeros((BATCH, 6)), time_major=False)


def haiku_layer_stack(x):
    def block(x):
        return x + hk.Linear(WIDTH)(jax.nn.gelu(hk.Linear(12)(x)))

    return hk.layer_stack(3)(block)(x)


TOKENS = jnp.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 11
IMAGES = jax.random.normal(jax.random.key(6), (BATCH, 8, 8, 3))
MATRIX = ".*/(w|w_i|w_h|embeddings)"
CASES = [
    ModelCase("haiku transformer", lambda: haiku_model(haiku_transformer, TOKENS), MATRIX, 7),
    ModelCase(
        "haiku conv net, state", lambda: haiku_model(haiku_conv_net, IMAGES, state=True), MATRIX, 4
    ),
    ModelCase("haiku recurrent", lambda: haiku_model(haiku_recurrent, X), MATRIX, 3),
    ModelCase("haiku layer stack", lambda: haiku_model(haiku_layer_stack, X), MATRIX, 2),
]
