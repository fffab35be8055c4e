"""Flax Linen modules: attention, layer stacks, normalisation, convolutions, recurrence, experts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from .harness import Model, ModelCase, random_params

WIDTH, HEADS, LENGTH, BATCH = 8, 2, 5, 2
X = jax.random.normal(jax.random.key(7), (BATCH, LENGTH, WIDTH))
TOKENS = jnp.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 11


def linen(module, *args, collections=(), rngs=None, **kwargs):
    """A Linen module, initialised; `collections` are made mutable and `rngs` given on each call."""
    names = ("params", *(rngs or ()))
    keys = dict(zip(names, jax.random.split(jax.random.key(0), len(names)), strict=True))
    shapes = jax.eval_shape(lambda: module.init(keys, *args, **kwargs))
    kwargs = dict(kwargs)
    if collections:
        kwargs["mutable"] = list(collections)
    if rngs:
        kwargs["rngs"] = {name: jax.random.key(seed) for name, seed in rngs.items()}
    return Model(module.apply, random_params(shapes), args, kwargs)


class Block(nn.Module):
    """A pre-norm transformer block: DenseGeneral attention, Dense MLP, dropout in both branches."""

    dropout: float = 0.0
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x, deterministic=True):
        y = nn.LayerNorm(dtype=self.dtype)(x)
        attention = nn.MultiHeadDotProductAttention(
            HEADS, dropout_rate=self.dropout, dtype=self.dtype
        )
        x = x + attention(y, mask=nn.make_causal_mask(y[..., 0]), deterministic=deterministic)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.gelu(nn.Dense(4 * WIDTH, dtype=self.dtype)(y))
        y = nn.Dropout(self.dropout, deterministic=deterministic)(y)
        return x + nn.Dense(WIDTH, dtype=self.dtype)(y)


class Scanned(nn.Module):
    """Three blocks as one scan, their params stacked along `axis`, or shared if that is None."""

    axis: int | None = 0
    remat: bool = False
    unroll: int = 1

    @nn.compact
    def __call__(self, x):
        block = Block
        if self.remat:
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            block = nn.remat(Block, prevent_cse=False, policy=policy)
        stack = nn.scan(
            lambda module, carry: (module(carry), None),
            variable_axes={} if self.axis is None else {"params": self.axis},
            variable_broadcast="params" if self.axis is None else False,
            split_rngs={"params": self.axis is not None},
            length=3,
            unroll=self.unroll,
        )
        x, _ = stack(block(name="layers"), x)
        return nn.Dense(3)(x)


class ConvNet(nn.Module):
    """Strided, grouped, depthwise, dilated and transposed convolutions with BatchNorm between."""

    @nn.compact
    def __call__(self, x, train=True):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm()(nn.Conv(8, (3, 3), strides=2)(x)))
        x = nn.relu(norm()(nn.Conv(8, (3, 3), feature_group_count=2, use_bias=False)(x)))
        x = nn.relu(nn.Conv(16, (3, 3), feature_group_count=8, padding="CIRCULAR")(x))
        x = nn.relu(nn.Conv(8, (3, 3), kernel_dilation=2)(x))
        x = nn.relu(norm()(nn.ConvTranspose(6, (3, 3), strides=(2, 2))(x)))
        x = nn.ConvTranspose(4, (2, 2), strides=(2, 2), transpose_kernel=True)(x)
        return nn.Dense(3)(nn.avg_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1))


class OddConvs(nn.Module):
    """Causal 1-D, 3-D and unshared (ConvLocal) convolutions."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, 3, padding="CAUSAL")(x))  # (B, L, 8)
        x = nn.relu(nn.ConvLocal(8, 3)(x))  # (B, L - 2, 8)
        x = x[..., :8].reshape(x.shape[0], x.shape[1], 2, 2, 2)
        x = nn.relu(nn.Conv(6, (3, 2, 2), strides=(1, 2, 1))(x))
        return nn.Conv(4, (1, 1, 2), padding=((0, 0), (1, 0), (0, 1)), input_dilation=(1, 1, 2))(x)


class TiedLanguageModel(nn.Module):
    """Embedding, learned positions, a block, and the embedding again as output head."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, WIDTH)
        x = embed(tokens) + nn.Embed(LENGTH, WIDTH, name="positions")(jnp.arange(LENGTH))
        return embed.attend(nn.LayerNorm()(Block()(x)))


class MixtureOfExperts(nn.Module):
    """Token-choice experts as einsums over a dense dispatch mask (GShard, Switch)."""

    experts: int = 4

    @nn.compact
    def __call__(self, x):
        w_in = self.param("w_in", nn.initializers.lecun_normal(), (self.experts, WIDTH, 16))
        w_out = self.param("w_out", nn.initializers.lecun_normal(), (self.experts, 16, WIDTH))
        gate = nn.softmax(nn.Dense(self.experts, use_bias=False, name="router")(x))
        weight, chosen = jax.lax.top_k(gate, 2)
        mask = jnp.einsum("blke,blk->ble", jax.nn.one_hot(chosen, self.experts), weight)
        dispatched = jnp.einsum("bld,ble->ebld", x, mask)
        hidden = nn.silu(jnp.einsum("ebld,edf->ebf" + "l", dispatched, w_in))
        return x + jnp.einsum("ebfl,efd->bld", hidden, w_out)


class Ensemble(nn.Module):
    """Four heads by `nn.vmap`: their kernels are stacked and meet a batched dot."""

    @nn.compact
    def __call__(self, x):
        heads = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=2,
            axis_size=4,
        )
        return nn.DenseGeneral((2, 3), axis=(-2, -1))(nn.gelu(heads(WIDTH)(x)))


class Assorted(nn.Module):
    """The remaining layers with kernels: batched DenseGeneral, Einsum, and mixed precision."""

    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral(6, axis=-1, batch_dims=(0, 1))(x)
        x = nn.Einsum((3, 6, 4), "blf,hfk->blhk")(x)
        return nn.Dense(5)(x) + nn.Dense(5, dtype=jnp.bfloat16)(x).astype(jnp.float32)


class Recurrent(nn.Module):
    """One recurrent cell over time (`nn.RNN` is a scan that closes over the kernels)."""

    cell: type[nn.RNNCellBase]
    bidirectional: bool = False

    @nn.compact
    def __call__(self, x, lengths):
        if self.bidirectional:
            return nn.Bidirectional(nn.RNN(self.cell(6)), nn.RNN(self.cell(6)))(
                x, seq_lengths=lengths
            )
        return nn.RNN(self.cell(6), return_carry=True)(x, seq_lengths=lengths)


def recurrent(cell, **kwargs):
    return linen(Recurrent(cell, **kwargs), X, jnp.array([LENGTH, 3]))


def conv_lstm():
    cell = nn.RNN(nn.ConvLSTMCell(4, (3, 3)))
    return linen(cell, jax.random.normal(jax.random.key(3), (BATCH, 3, 6, 6, 2)))


def conv_net():
    images = jax.random.normal(jax.random.key(5), (BATCH, 8, 8, 3))
    return linen(ConvNet(), images, collections=["batch_stats"])


def dropout_block():
    return linen(Block(dropout=0.3), X, deterministic=False, rngs={"dropout": 5})


KERNEL = r".*/kernel"
CASES = [
    ModelCase("linen attention block", lambda: linen(Block(), X), KERNEL, 6),
    ModelCase("linen dropout with rngs", dropout_block, KERNEL, 6),
    ModelCase("linen scan over layers", lambda: linen(Scanned(), X), KERNEL, 7),
    ModelCase("linen scan with remat", lambda: linen(Scanned(remat=True), X), KERNEL, 7),
    ModelCase("linen scan, stacked last", lambda: linen(Scanned(axis=-1), X), KERNEL, 7),
    ModelCase("linen scan, shared params", lambda: linen(Scanned(axis=None), X), KERNEL, 7),
    ModelCase("linen scan, unrolled", lambda: linen(Scanned(unroll=2), X), KERNEL, 7),
    ModelCase("linen conv net, batch norm", conv_net, KERNEL, 7),
    ModelCase("linen odd convolutions", lambda: linen(OddConvs(), X), KERNEL, 4),
    ModelCase(
        "linen tied embedding",
        lambda: linen(TiedLanguageModel(), TOKENS),
        r".*/(kernel|embedding)",
        8,
    ),
    ModelCase(
        "linen mixture of experts",
        lambda: linen(MixtureOfExperts(), X),
        r".*/(kernel|w_in|w_out)",
        3,
    ),
    ModelCase("linen vmapped ensemble", lambda: linen(Ensemble(), X), KERNEL, 2),
    ModelCase("linen assorted layers", lambda: linen(Assorted(), X), KERNEL, 4, tolerance=2e-2),
    ModelCase("linen LSTM", lambda: recurrent(nn.LSTMCell), KERNEL, 8),
    ModelCase("linen optimised LSTM", lambda: recurrent(nn.OptimizedLSTMCell), KERNEL, 8),
    ModelCase("linen GRU", lambda: recurrent(nn.GRUCell), KERNEL, 6),
    ModelCase("linen MGU", lambda: recurrent(nn.MGUCell), KERNEL, 4),
    ModelCase(
        "linen bidirectional RNN",
        lambda: recurrent(nn.SimpleCell, bidirectional=True),
        KERNEL,
        4,
    ),
    ModelCase("linen conv LSTM", conv_lstm, KERNEL, 2),
]
