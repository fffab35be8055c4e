"""Flax NNX modules, split into a graph definition and the state that comes first."""

import jax
import jax.numpy as jnp
from flax import nnx

from .harness import Model, ModelCase, random_params

WIDTH, HEADS, LENGTH, BATCH = 8, 2, 5, 2
X = jax.random.normal(jax.random.key(11), (BATCH, LENGTH, WIDTH))
TOKENS = jnp.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 11


def functional(make, *args, **kwargs):
    """`make(rngs)` as a function of its whole state, built without running an initialiser."""
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graphdef, state = nnx.split(model)

    def apply_fn(state, *args, **kwargs):
        return nnx.merge(graphdef, state)(*args, **kwargs)

    return Model(apply_fn, random_params(state), args, kwargs)


class Block(nnx.Module):
    """Pre-norm attention and a gated MLP, with the fused-kernel `LinearGeneral` for the gate."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.gate_up = nnx.LinearGeneral(WIDTH, (2, 12), rngs=rngs)
        self.down = nnx.Linear(12, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        gate, up = jnp.moveaxis(self.gate_up(x), -2, 0)
        return x + self.down(nnx.silu(gate) * up)


class Stack(nnx.Module):
    """Three blocks made by `nnx.vmap`, applied by `nnx.scan`, each under `nnx.remat` if asked."""

    def __init__(self, rngs: nnx.Rngs, remat: bool = False):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return Block(rngs)

        self.layers = make(rngs)
        self.remat = remat

    def __call__(self, x):
        def step(carry, layer):
            return layer(carry)

        body = nnx.remat(step) if self.remat else step
        return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


class LanguageModel(nnx.Module):
    """Tied embedding around a block."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(11, WIDTH, rngs=rngs)
        self.block = Block(rngs)

    def __call__(self, tokens):
        return self.embed.attend(self.block(self.embed(tokens)))


class ConvNet(nnx.Module):
    """Strided, grouped and transposed convolutions, BatchNorm and Dropout."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.grouped = nnx.Conv(8, 8, (3, 3), feature_group_count=4, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 4, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        x = self.dropout(nnx.relu(self.grouped(x)))
        return self.head(jnp.mean(nnx.relu(self.up(x)), axis=(1, 2)))


def conv_net():
    """Params first, then all other state; the new batch statistics are part of the result."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: ConvNet(nnx.Rngs(0))))
    params, stats, _ = nnx.split_state(state, nnx.Param, nnx.BatchStat, ...)

    def apply_fn(params, stats, images):
        streams = nnx.state(nnx.Dropout(0.2, rngs=nnx.Rngs(3)))
        model = nnx.merge(graphdef, params, stats, {"dropout": streams}, copy=True)
        logits = model(images)
        return logits, nnx.state(model, nnx.BatchStat)

    images = jax.random.normal(jax.random.key(2), (BATCH, 8, 8, 3))
    return Model(apply_fn, random_params(params), (random_params(stats, seed=1), images))


def recurrent(cell):
    return functional(lambda rngs: nnx.RNN(cell(WIDTH, 6, rngs=rngs)), X)


class MixtureOfExperts(nnx.Module):
    """Token-routed experts: tokens sorted by expert and multiplied by `jax.lax.ragged_dot`."""

    def __init__(self, rngs: nnx.Rngs, experts: int = 4):
        self.router = nnx.Linear(WIDTH, experts, use_bias=False, rngs=rngs)
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.w_in = nnx.Param(init(rngs.params(), (experts, WIDTH, 12)))
        self.w_out = nnx.Param(init(rngs.params(), (experts, 12, WIDTH)))

    def __call__(self, x):
        tokens = x.reshape(-1, WIDTH)
        gate = nnx.softmax(self.router(tokens))
        expert = jnp.argmax(gate, axis=-1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=gate.shape[-1])
        hidden = nnx.relu(jax.lax.ragged_dot(tokens[order], self.w_in[...], sizes))
        routed = jax.lax.ragged_dot(hidden, self.w_out[...], sizes)[jnp.argsort(order)]
        chosen = jnp.take_along_axis(gate, expert[:, None], axis=-1)
        return x + (routed * chosen).reshape(x.shape)


KERNEL = r".*/?kernel"
CASES = [
    ModelCase("nnx attention block", lambda: functional(Block, X), KERNEL, 6),
    ModelCase("nnx scanned stack", lambda: functional(Stack, X), KERNEL, 6),
    ModelCase(
        "nnx scanned stack, remat",
        lambda: functional(lambda rngs: Stack(rngs, remat=True), X),
        KERNEL,
        6,
    ),
    ModelCase(
        "nnx tied embedding",
        lambda: functional(LanguageModel, TOKENS),
        r".*/(kernel|embedding)",
        7,
    ),
    ModelCase("nnx conv net, batch norm", conv_net, KERNEL, 4),
    ModelCase("nnx LSTM", lambda: recurrent(nnx.LSTMCell), KERNEL, 8),
    ModelCase("nnx optimised LSTM", lambda: recurrent(nnx.OptimizedLSTMCell), KERNEL, 2),
    ModelCase("nnx GRU", lambda: recurrent(nnx.GRUCell), KERNEL, 2),
    ModelCase(
        "nnx ragged experts",
        lambda: functional(MixtureOfExperts, X),
        r".*/kernel|w_in|w_out",
        3,
    ),
]
