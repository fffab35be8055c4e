"""Functions on lists and dicts of arrays, Equinox modules and Haiku transforms."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp

from .harness import Model, ModelCase, random_params

WIDTH, LENGTH, BATCH = 8, 5, 2
X = jax.random.normal(jax.random.key(13), (BATCH, LENGTH, WIDTH))


def arrays(*shapes):
    return random_params([jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])


# Plain functions


def mlp(params, x):
    """A list of matrices, the last one applied from the left."""
    for weight in params[:-1]:
        x = jnp.tanh(x @ weight)
    return params[-1] @ jnp.swapaxes(x, -1, -2)


def rotated(params, x):
    """A fused q/k/v kernel: split, halves swapped (as for rotary embeddings), joined, applied."""
    query, key, value = jnp.split(params["qkv"], 3, axis=1)
    swapped = jnp.concatenate([query[:, WIDTH // 2 :], query[:, : WIDTH // 2]], axis=1)
    fused = jnp.concatenate([swapped, 0.5 * key, -value], axis=1)
    q, k, v = jnp.split(x @ fused, 3, axis=-1)
    return jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2)) @ v @ params["out"].T


def loop_over_stack(params, x):
    """`fori_loop` that indexes the layer stack."""
    return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ params["layers"][i]), x)


def switch_experts(params, x, experts):
    """Experts as branches of a `lax.switch` that close over their weights, example by example."""
    branches = [lambda x, w=w: jnp.tanh(x @ w) for w in params]
    return jax.lax.map(lambda pair: jax.lax.switch(pair[0], branches, pair[1]), (experts, x))


def routed_by_index(params, x, experts):
    """Each example fetches the matrix of its own expert."""
    return jnp.einsum("bld,bdf->blf", x, params["experts"][experts])


def mapped_experts(params, x):
    """All experts by `lax.map`, each under `jax.checkpoint`, mixed by a learned router."""
    expert = jax.checkpoint(lambda w: jax.nn.silu(x @ w[0]) @ w[1])
    outputs = jax.lax.map(expert, (params["up"], params["down"]))  # (E, B, L, D)
    return jnp.einsum("eblf,ble->blf", outputs, jax.nn.softmax(x @ params["router"]))


def state_space(params, x):
    """A diagonal linear recurrence by `associative_scan`, with input-dependent decay (as Mamba)."""
    u = x @ params["in_proj"]
    decay = jax.nn.sigmoid(x @ params["decay_proj"])
    _, states = jax.lax.associative_scan(
        lambda left, right: (left[0] * right[0], right[0] * left[1] + right[1]),
        (decay, (1 - decay) * u),
        axis=1,
    )
    return (states * jax.nn.silu(x @ params["gate_proj"])) @ params["out_proj"]


def with_inner_grad(params, x):
    """A force field: the output is a gradient with respect to the input, taken inside."""

    def energy(x):
        return jnp.sum(jnp.tanh(x @ params["first"]) @ params["second"])

    return jax.grad(energy)(x)


def stack_of(**shapes):
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return random_params(shapes)


SSM = dict.fromkeys(("in_proj", "decay_proj", "gate_proj"), (WIDTH, 12)) | {"out_proj": (12, WIDTH)}
PLAIN = [
    ModelCase(
        "list of matrices", lambda: Model(mlp, arrays((8, 12), (12, 12), (3, 12)), [X]), r"\d", 3
    ),
    ModelCase(
        "fused, split and rejoined kernel",
        lambda: Model(rotated, stack_of(qkv=(8, 24), out=(6, 8)), [X]),
        "qkv|out",
        2,
    ),
    ModelCase(
        "fori_loop over a stack",
        lambda: Model(loop_over_stack, stack_of(layers=(3, 8, 8)), [X]),
        "layers",
        1,
    ),
    ModelCase(
        "experts by switch",
        lambda: Model(switch_experts, arrays((8, 6), (8, 6)), [X, jnp.array([1, 0])]),
        r"\d",
        2,
    ),
    ModelCase(
        "experts by index",
        lambda: Model(routed_by_index, stack_of(experts=(4, 8, 6)), [X, jnp.array([3, 1])]),
        "experts",
        1,
    ),
    ModelCase(
        "experts by map and checkpoint",
        lambda: Model(
            mapped_experts, stack_of(up=(4, 8, 12), down=(4, 12, 8), router=(8, 4)), [X]
        ),
        "up|down|router",
        3,
    ),
    ModelCase("state-space layer", lambda: Model(state_space, stack_of(**SSM), [X]), ".*proj", 4),
    ModelCase(
        "gradient inside the model",
        lambda: Model(with_inner_grad, stack_of(first=(8, 12), second=(12, 3)), [X]),
        "first|second",
        2,
    ),
]


# Equinox


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
EQUINOX = [
    ModelCase("equinox MLP, vmapped", batched_mlp, ".*/weight", 3),
    ModelCase("equinox attention", equinox_attention, ".*/weight", 4),
    ModelCase(
        "equinox conv net", lambda: equinox_model(EquinoxConvNet, IMAGE), ".*/weight", 4
    ),
    ModelCase(
        "equinox recurrent",
        lambda: equinox_model(EquinoxRecurrent, jnp.arange(5)),
        ".*/weight(_ih|_hh)?",
        5,
    ),
]


# Haiku


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
HAIKU = [
    ModelCase("haiku transformer", lambda: haiku_model(haiku_transformer, TOKENS), MATRIX, 7),
    ModelCase(
        "haiku conv net, state", lambda: haiku_model(haiku_conv_net, IMAGES, state=True), MATRIX, 4
    ),
    ModelCase("haiku recurrent", lambda: haiku_model(haiku_recurrent, X), MATRIX, 3),
    ModelCase("haiku layer stack", lambda: haiku_model(haiku_layer_stack, X), MATRIX, 2),
]

CASES = [*PLAIN, *EQUINOX, *HAIKU]
