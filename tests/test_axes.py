"""`infer_axes`: which dims of each weight are batch, contract and out."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx
from hypothesis import given, settings, strategies as st
from jax import lax
from jax.sharding import PartitionSpec

from lorax_fn.axes import Axes, infer_axes
from lorax_fn.axes_rules import _regroup
from lorax_fn.errors import AxesError
from lorax_fn.paths import leaves_with_paths


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def i32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def axes(batch, contract, out):
    return Axes(batch=batch, contract=contract, out=out)


DENSE = axes((), (0,), (1,))
STACK = axes((0,), (1,), (2,))
HWIO = ("NHWC", "HWIO", "NHWC")


def conv(x, w, **options):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=HWIO, **options)


def scan_layers(w, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def fake_quantise(w):
    scale = jnp.max(jnp.abs(w), axis=0, keepdims=True)
    return w + lax.stop_gradient(jnp.round(w / scale) * scale - w)


@jax.custom_jvp
def doubled(w):
    return w * 2


doubled.defjvp(lambda primals, tangents: (doubled(*primals), tangents[0] * 2))


@jax.custom_vjp
def tripled(w):
    return w * 3


tripled.defvjp(lambda w: (w * 3, None), lambda _, g: (g * 3,))


# name: (function of (weight, *args), weight, args, its axes)
CASES = {
    "matmul": (lambda w, x: x @ w, f32(8, 6), [f32(2, 8)], DENSE),
    "weight on the left": (lambda w, x: w @ x, f32(8, 6), [f32(6)], axes((), (1,), (0,))),
    "query": (
        lambda w, x: jnp.einsum("bd,dhk->bhk", x, w), f32(8, 2, 3), [f32(2, 8)],
        axes((), (0,), (1, 2)),
    ),
    "out projection": (
        lambda w, x: jnp.einsum("bhk,hkd->bd", x, w), f32(2, 3, 8), [f32(5, 2, 3)],
        axes((), (0, 1), (2,)),
    ),
    "experts": (
        lambda w, x: jnp.einsum("ebd,edf->ebf", x, w), f32(4, 8, 6), [f32(4, 2, 8)], STACK,
    ),
    "experts, scattered dims": (
        lambda w, x: jnp.einsum("bed,dfe->bef", x, w), f32(8, 6, 4), [f32(2, 4, 8)],
        axes((2,), (0,), (1,)),
    ),
    "ragged experts": (
        lambda w, x, sizes: lax.ragged_dot(x, w, sizes), f32(4, 8, 6), [f32(10, 8), i32(4)], STACK,
    ),
    "conv": (
        lambda w, x: conv(x, w), f32(3, 1, 8, 6), [f32(2, 9, 9, 8)], axes((), (0, 1, 2), (3,)),
    ),
    "depthwise conv": (
        lambda w, x: conv(x, w, feature_group_count=8), f32(3, 3, 1, 8), [f32(2, 9, 9, 8)],
        axes((), (0, 1, 2), (3,)),
    ),
    "conv OIW": (
        lambda w, x: lax.conv_general_dilated(x, w, (1,), "SAME"), f32(6, 8, 3), [f32(2, 8, 9)],
        axes((), (1, 2), (0,)),
    ),
    "transposed conv": (
        lambda w, x: lax.conv_transpose(
            x, w, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        f32(3, 8, 6), [f32(2, 9, 8)], axes((), (0, 1), (2,)),
    ),
    "vmap": (jax.vmap(lambda w, x: x @ w), f32(4, 8, 6), [f32(4, 2, 8)], STACK),
    "vmap over another dim": (
        lambda w, x: jax.vmap(jnp.matmul, in_axes=(0, 1))(x, w), f32(8, 4, 6), [f32(4, 2, 8)],
        axes((1,), (0,), (2,)),
    ),
    "vmap of conv": (
        lambda w, x: jax.vmap(conv)(x, w), f32(4, 3, 3, 8, 6), [f32(4, 2, 9, 9, 8)],
        axes((0,), (1, 2, 3), (4,)),
    ),
    "scan over layers": (scan_layers, f32(4, 8, 8), [f32(2, 8)], STACK),
    "scan under remat": (
        jax.checkpoint(scan_layers), f32(4, 8, 8), [f32(2, 8)], STACK,
    ),
    "scan constant": (
        lambda w, x: lax.scan(lambda c, _: (c @ w, None), x, length=3)[0], f32(8, 8), [f32(2, 8)],
        DENSE,
    ),
    "scan carry": (
        lambda w, x: lax.scan(lambda w, x: (w, x @ w), w, x)[1], f32(8, 6), [f32(3, 2, 8)], DENSE,
    ),
    "scan carry, one iteration late": (
        lambda w, x: lax.scan(
            lambda c, x: ((c[1], c[1]), x @ c[0]), (jnp.zeros((8, 6)), w), x
        )[1],
        f32(8, 6), [f32(3, 2, 8)], DENSE,
    ),
    "scan output": (
        lambda w, x: scan_layers(lax.scan(lambda _, w: (None, w.T), None, w)[1], x),
        f32(4, 8, 8), [f32(2, 8)], axes((0,), (2,), (1,)),
    ),
    "while loop": (
        lambda w, x: lax.while_loop(lambda s: s.sum() < 9, lambda s: s @ w, x), f32(8, 8),
        [f32(2, 8)], DENSE,
    ),
    "layers picked in a loop": (
        lambda w, x: lax.fori_loop(0, 4, lambda i, x: x @ w[i], x),
        f32(4, 8, 8), [f32(2, 8)], STACK,
    ),
    "cond": (
        lambda w, x, i: lax.switch(i, [lambda x: x @ w, lambda x: x @ w + 1], x), f32(8, 6),
        [f32(2, 8), i32()], DENSE,
    ),
    "a cond between weights": (
        lambda w, x, i: x @ lax.cond(i > 0, lambda w: w, lambda w: w * 2, w), f32(8, 6),
        [f32(2, 8), i32()], DENSE,
    ),
    "jit": (lambda w, x: jax.jit(jnp.matmul)(x, w), f32(8, 6), [f32(2, 8)], DENSE),
    "custom_jvp": (lambda w, x: x @ doubled(w), f32(8, 6), [f32(2, 8)], DENSE),
    "custom_vjp": (lambda w, x: x @ tripled(w), f32(8, 6), [f32(2, 8)], DENSE),
    "grad": (
        lambda w, x: jax.grad(lambda x: jnp.tanh(x @ w).sum())(x), f32(8, 6), [f32(2, 8)], DENSE,
    ),
    "static pick": (lambda w, x: x @ w[1], f32(4, 8, 6), [f32(2, 8)], STACK),
    "negative static pick": (
        lambda w, x: x @ w[..., -1],
        f32(8, 6, 4), [f32(2, 8)], axes((2,), (0,), (1,)),
    ),
    "traced pick": (lambda w, x, i: x @ w[i], f32(4, 8, 6), [f32(2, 8), i32()], STACK),
    "traced pick, one output": (lambda w, x, i: x @ w[i], f32(4, 8, 1), [f32(2, 8), i32()], STACK),
    "dynamic_index_in_dim": (
        lambda w, x, i: x @ lax.dynamic_index_in_dim(w, i, 1, keepdims=False), f32(8, 4, 6),
        [f32(2, 8), i32()], axes((1,), (0,), (2,)),
    ),
    "an expert for each token": (
        lambda w, x, i: jnp.einsum("bd,bdf->bf", x, w[i]), f32(4, 8, 6), [f32(2, 8), i32(2)], STACK,
    ),
    "vmapped pick": (
        lambda w, x, i: jax.vmap(lambda x, i: x @ w[i])(x, i), f32(4, 8, 6), [f32(2, 8), i32(2)],
        STACK,
    ),
    "unstack": (lambda w, x: x @ jnp.unstack(w)[1], f32(4, 8, 6), [f32(2, 8)], STACK),
    "pick by reshape": (
        lambda w, x: x @ lax.slice_in_dim(w, 1, 2).reshape(8, 6), f32(4, 8, 6), [f32(2, 8)], STACK,
    ),
    "lookup": (lambda w, ids: w[ids], f32(9, 4), [i32(2, 3)], DENSE),
    "lookup by take": (lambda w, ids: jnp.take(w, ids, axis=0), f32(9, 4), [i32(2, 3)], DENSE),
    "lookup of columns": (lambda w, ids: w[:, ids], f32(4, 9), [i32(2)], axes((), (1,), (0,))),
    "lookup of one": (lambda w, i: w[i], f32(9, 4), [i32()], DENSE),
    "vmapped lookup": (lambda w, ids: jax.vmap(lambda i: w[i])(ids), f32(9, 4), [i32(3)], DENSE),
    "stacked lookup": (
        jax.vmap(lambda w, ids: w[ids]), f32(5, 9, 4), [i32(5, 2)], STACK,
    ),
    "one-hot lookup": (
        lambda w, ids: jax.nn.one_hot(ids, 9) @ w, f32(9, 4), [i32(2, 3)], DENSE,
    ),
    "tied head": (lambda w, ids: jnp.tanh(w[ids]) @ w.T, f32(9, 4), [i32(2)], DENSE),
    "head first, lookup later": (
        lambda w, x, ids: (x @ w.T, w[ids]), f32(9, 4), [f32(2, 4), i32(2)], DENSE,
    ),
    "exchanged later": (lambda w, x: (x @ w) @ w.T, f32(9, 4), [f32(2, 9)], DENSE),
    "spectral norm": (
        lambda w, x: x @ (w / jnp.linalg.norm(w.T @ (w @ w[0]))), f32(8, 6), [f32(2, 8)],
        DENSE,
    ),
    "flattened output": (
        lambda w, x: x @ w.reshape(8, 6), f32(8, 2, 3), [f32(2, 8)], axes((), (0,), (1, 2)),
    ),
    "flattened input": (
        lambda w, x: x @ w.reshape(6, 8), f32(2, 3, 8), [f32(5, 6)], axes((), (0, 1), (2,)),
    ),
    "split output": (
        lambda w, x: jnp.einsum("bd,dhk->bhk", x, w.reshape(8, 2, 3)),
        f32(8, 6), [f32(5, 8)], DENSE,
    ),
    "absorbed heads": (  # a dim that is half batch, half contracted has to be contracted
        lambda w, x: jnp.einsum("bhk,rhk->bhr", x, w.reshape(8, 2, 3)), f32(8, 6), [f32(5, 2, 3)],
        axes((), (1,), (0,)),
    ),
    "blocks": (  # half batch, half output has to be an output
        lambda w, x: jnp.einsum("bhd,dhk->bhk", x, w.reshape(8, 2, 3)), f32(8, 6), [f32(5, 2, 8)],
        DENSE,
    ),
    "merged and taken apart": (
        lambda w, x: jnp.einsum("edf,ebd->ebf", w.reshape(32, 6).reshape(4, 8, 6), x),
        f32(4, 8, 6), [f32(4, 2, 8)], STACK,
    ),
    "squeezed output": (
        lambda w, x: x @ w[:, :, 0],
        f32(8, 6, 1), [f32(2, 8)], axes((), (0,), (1, 2)),
    ),
    "squeezed front": (lambda w, x: x @ w[0], f32(1, 8, 6), [f32(2, 8)], STACK),
    "fused qkv": (
        lambda w, x: jnp.split(x @ jnp.concatenate([w, w * 2, w], axis=1), 3, axis=1), f32(8, 6),
        [f32(2, 8)], DENSE,
    ),
    "split weight": (
        lambda w, x: [x @ part for part in jnp.split(w, 3, axis=1)],
        f32(8, 6), [f32(2, 8)], DENSE,
    ),
    "masked": (
        lambda w, x: x @ jnp.where(jnp.tri(8, 6) > 0, w, 0), f32(8, 6), [f32(2, 8)], DENSE,
    ),
    "mask given": (lambda w, x, mask: x @ (w * mask), f32(8, 6), [f32(2, 8), f32(8, 6)], DENSE),
    "dropped at random": (
        lambda w, x, key: x @ jnp.where(jax.random.bernoulli(key, 0.5, w.shape), w, 0), f32(8, 6),
        [f32(2, 8), jax.eval_shape(lambda: jax.random.key(0))], DENSE,
    ),
    "fake-quantised": (lambda w, x: x @ fake_quantise(w), f32(8, 6), [f32(2, 8)], DENSE),
    "cast": (
        lambda w, x: x @ w.astype(jnp.bfloat16), f32(8, 6),
        [jax.ShapeDtypeStruct((2, 8), jnp.bfloat16)], DENSE,
    ),
    "barrier": (
        lambda w, x: x @ lax.optimization_barrier((w, x))[0],
        f32(8, 6), [f32(2, 8)], DENSE,
    ),
    "padded, reversed": (
        lambda w, x: x @ jnp.pad(w, ((0, 0), (1, 1)))[:, ::-1],
        f32(8, 6), [f32(2, 8)], DENSE,
    ),
    "modulated": (  # a kernel of its own for each example
        lambda w, x, style: jnp.einsum("bd,bdf->bf", x, w[None] * style[:, :, None]), f32(8, 6),
        [f32(2, 8), f32(2, 8)], DENSE,
    ),
    "bias": (lambda w, x: x + w[None, None], f32(8), [f32(2, 3, 8)], None),
    "norm scale": (lambda w, x: (x * w[None]) @ jnp.ones((8, 3)), f32(8), [f32(2, 8)], None),
    "bias of heads": (
        lambda w, x: jnp.einsum("bhk,chk->hbc", x + w[None], x), f32(2, 3), [f32(5, 2, 3)], None,
    ),
    "scale of heads": (
        lambda w, x: jnp.einsum("bhk,chk->hbc", x * w[None], x), f32(2, 3), [f32(5, 2, 3)], None,
    ),
    "stacked bias": (
        lambda w, x: lax.scan(lambda x, b: (x + b[None], None), x, w)[0],
        f32(4, 8), [f32(2, 8)], None,
    ),
    "stacked norm scale": (
        lambda w, x: lax.scan(lambda x, s: ((x * s[None]) @ jnp.ones((8, 8)), None), x, w)[0],
        f32(4, 8), [f32(2, 8)], None,
    ),
    "position embedding": (
        lambda w, x: (x + w) @ jnp.ones((8, 3)), f32(1, 5, 8), [f32(1, 5, 8)], None,
    ),
    "class token": (
        lambda w, x: jnp.concatenate([w, x], axis=1) @ jnp.ones((8, 3)),
        f32(1, 1, 8), [f32(1, 5, 8)],
        None,
    ),
    "unused": (lambda w, x: x, f32(8, 6), [f32(2)], None),
    "only summed": (lambda w, x: x + w.sum(), f32(8, 6), [f32()], None),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_axes_of_a_weight(name):
    apply, weight, args, expected = CASES[name]
    assert infer_axes(apply, weight, *args) == expected


def test_arrays_and_shapes_give_the_same():
    apply, weight, args, expected = CASES["query"]
    assert (
        infer_axes(apply, jnp.ones(weight.shape), *(np.ones(a.shape, "f") for a in args))
        == expected
    )


def test_no_flops_and_no_memory_are_spent():
    def apply(params, ids):
        x = params["embed"][ids]
        x = lax.scan(lambda x, w: ((x @ w["up"]) @ w["down"], None), x, params["layers"])[0]
        return x @ params["embed"].T

    # 80 layers, 70e9 parameters: 280 GB as arrays, and 1e18 FLOPs for these tokens
    params = {
        "embed": f32(128_256, 8192),
        "layers": {"up": f32(80, 8192, 53_248), "down": f32(80, 53_248, 8192)},
    }
    found = infer_axes(apply, params, i32(1024, 8192))
    assert found == {"embed": DENSE, "layers": {"up": STACK, "down": STACK}}


def test_scanned_time_steps_leave_a_recurrent_kernel_alone():
    def apply(w, xs):
        return lax.scan(lambda h, x: (jnp.tanh(x @ w["x"] + h @ w["h"]), h), jnp.zeros((2, 6)), xs)

    found = infer_axes(apply, {"x": f32(8, 6), "h": f32(6, 6)}, f32(5, 2, 8))
    assert found == {"x": DENSE, "h": DENSE}


def gelu_experts(params, x):
    x = jnp.einsum("bd,edf->bef", x, params["up"]) + params["bias"][None]
    return jnp.einsum("bef,efd->bed", jax.nn.gelu(x), params["down"])


def ensemble(params, x):
    def member(p):
        return jnp.tanh(x @ p["up"] + p["bias"][None]) @ p["down"]

    return jax.vmap(member)(params)


@pytest.mark.parametrize("apply", [gelu_experts, ensemble])
def test_experts_that_share_their_input_are_a_batch(apply):
    params = {"up": f32(4, 8, 6), "bias": f32(4, 6), "down": f32(4, 6, 8)}
    expected = {"up": STACK, "bias": None, "down": STACK}
    assert infer_axes(apply, params, f32(2, 8)) == expected


def test_conv_ensemble_with_a_shared_input_is_a_batch():
    def apply(params, x):
        return jax.vmap(lambda p: conv(jnp.tanh(conv(x, p["a"])), p["b"]))(params)

    params = {"a": f32(4, 3, 3, 8, 6), "b": f32(4, 3, 3, 6, 2)}
    expected = axes((0,), (1, 2, 3), (4,))
    assert infer_axes(apply, params, f32(2, 9, 9, 8)) == {"a": expected, "b": expected}


def test_heads_in_front_are_outputs_since_no_weight_follows_them():
    def apply(params, x):
        q = jnp.einsum("td,ndh->tnh", x, params["q"])
        k, v = jnp.einsum("td,cndh->ctnh", x, params["kv"])
        mixed = jnp.einsum("nts,snh->tnh", jax.nn.softmax(jnp.einsum("tnh,snh->nts", q, k)), v)
        return jnp.einsum("tnh,nhd->td", mixed, params["out"])

    params = {"q": f32(2, 8, 3), "kv": f32(2, 2, 8, 3), "out": f32(2, 3, 8)}
    assert infer_axes(apply, params, f32(5, 8)) == {
        "q": axes((), (1,), (0, 2)),
        "kv": axes((), (2,), (0, 1, 3)),
        "out": axes((), (0, 1), (2,)),
    }


def test_a_weight_that_is_itself_a_low_rank_sum():
    def apply(params, x):
        return x @ (params["w"] + params["a"] @ params["b"])

    found = infer_axes(apply, {"w": f32(8, 6), "a": f32(8, 2), "b": f32(2, 6)}, f32(3, 8))
    assert found == {"w": DENSE, "a": axes((), (1,), (0,)), "b": DENSE}


def test_constant_data_are_data():
    x, ids = jnp.ones((2, 3, 8)), jnp.zeros((2, 3), jnp.int32)

    def apply(params):
        y = x @ params["dense"] + params["embed"][ids] + params["position"]
        return y @ params["head"]

    params = {
        "dense": f32(8, 4), "embed": f32(9, 4), "position": f32(1, 3, 4), "head": f32(4, 2),
    }  # fmt: skip
    with jax.numpy_rank_promotion("allow"):
        found = infer_axes(apply, params)
    assert found == {"dense": DENSE, "embed": DENSE, "position": None, "head": DENSE}


@pytest.mark.parametrize("spec", [("x", None), (None, "x")])
def test_shard_map(spec):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def apply(w, x):
        def local(w, x):
            axis = spec.index("x")
            return x @ lax.all_gather(w, "x", axis=axis, tiled=True)

        return jax.shard_map(
            local, mesh=mesh, in_specs=(PartitionSpec(*spec), PartitionSpec()),
            out_specs=PartitionSpec(), check_vma=False,
        )(w, x)  # fmt: skip

    assert infer_axes(apply, f32(16, 32), f32(2, 16)) == DENSE


def test_one_expert_on_each_device():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("x")

    def apply(w, x):
        local = jax.shard_map(
            lambda w, x: (x[0] @ w[0])[None], mesh=mesh, in_specs=(spec, spec), out_specs=spec
        )
        return local(w, x)

    assert infer_axes(apply, f32(8, 16, 32), f32(8, 2, 16)) == STACK


def test_pmap():
    apply = jax.pmap(lambda w, x: x @ w, axis_name="i")
    assert infer_axes(apply, f32(8, 4, 6), f32(8, 2, 4)) == STACK


# --- Modules --------------------------------------------------------------------------------------


def by_path(tree):
    return dict(leaves_with_paths(tree, is_leaf=lambda x: x is None))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        y = nn.LayerNorm(name="norm")(x)
        x = x + nn.MultiHeadDotProductAttention(2, dropout_rate=0.1, name="attn")(
            y, deterministic=not train
        )
        y = nn.BatchNorm(use_running_average=not train, name="batch_norm")(x)
        y = nn.Dense(12, name="up")(y)
        return x + nn.Dense(8, name="down")(nn.Dropout(0.1, deterministic=not train)(nn.gelu(y)))


class Encoder(nn.Module):
    axis: int | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, ids, train=False):
        embed = nn.Embed(20, 8, name="embed")
        x = embed(ids) + self.param("position", nn.initializers.normal(), (1, 5, 8))
        if self.axis is None:
            x = Block(name="block")(x, train)
        else:
            block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
            x, _ = nn.scan(
                lambda block, x, _: (block(x, train), None),
                variable_axes={"params": self.axis, "batch_stats": 0},
                split_rngs={"params": True, "dropout": True},
                length=3,
            )(block(name="block"), x, None)
        return embed.attend(x)


def stacked(axis, expected):
    """The axes of a kernel with a dim for the layers at `axis`."""
    if axis is None:
        return expected
    moved = (tuple(d + (d >= axis) for d in dims) for dims in dataclasses.astuple(expected))
    batch, contract, out = moved
    return Axes(batch=(axis, *batch), contract=contract, out=out)


@pytest.mark.parametrize("abstract_inputs", [False, True], ids=["arrays", "shapes"])
@pytest.mark.parametrize(
    ("axis", "remat"), [(None, False), (0, False), (1, False), (0, True)],
    ids=["plain", "scan 0", "scan 1", "scan of remat"],
)  # fmt: skip
def test_linen_encoder(axis, remat, abstract_inputs, getkey):
    model = Encoder(axis=axis, remat=remat)
    ids = jnp.zeros((2, 5), jnp.int32)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        variables = jax.eval_shape(model.init, getkey(), ids)
        if abstract_inputs:
            ids = i32(*ids.shape)
        else:
            variables = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), variables)
        found = infer_axes(
            model.apply, variables, ids, train=True, mutable=["batch_stats"],
            rngs={"dropout": getkey()},
        )  # fmt: skip
    query = stacked(axis, axes((), (0,), (1, 2)))
    dense = stacked(axis, DENSE)
    expected = dict.fromkeys(path for path, _ in leaves_with_paths(variables))
    expected |= {
        "params/embed/embedding": DENSE,
        "params/block/attn/query/kernel": query,
        "params/block/attn/key/kernel": query,
        "params/block/attn/value/kernel": query,
        "params/block/attn/out/kernel": stacked(axis, axes((), (0, 1), (2,))),
        "params/block/up/kernel": dense,
        "params/block/down/kernel": dense,
    }
    assert by_path(found) == expected


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.SimpleCell, nn.OptimizedLSTMCell])
def test_linen_recurrent_cells(cell, getkey):
    model = nn.RNN(cell(6))
    with jax.numpy_rank_promotion("allow"):
        variables = jax.eval_shape(model.init, getkey(), f32(2, 5, 8))
        found = by_path(infer_axes(model.apply, variables, f32(2, 5, 8)))
    kernels = [path for path in found if path.endswith("kernel")]
    assert len(kernels) >= 2
    assert found == dict.fromkeys(found) | dict.fromkeys(kernels, DENSE)


def test_linen_conv_net(getkey):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.GroupNorm(2)(nn.Conv(8, (3, 3), name="conv")(x)))
            x = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
            x = nn.ConvTranspose(4, (2, 2), strides=(2, 2), name="up")(x)
            return nn.ConvLocal(3, (2, 2), name="local")(x)

    with jax.numpy_rank_promotion("allow"):
        variables = jax.eval_shape(Net().init, getkey(), f32(1, 6, 6, 3))
        found = by_path(infer_axes(Net().apply, variables, f32(1, 6, 6, 3)))
    hwio = axes((), (0, 1, 2), (3,))
    assert {path: a for path, a in found.items() if a is not None} == {
        "params/conv/kernel": hwio,
        "params/depthwise/kernel": hwio,
        "params/up/kernel": hwio,
        "params/local/kernel": axes((0, 1), (2,), (3,)),  # a kernel of its own for each pixel
    }


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.mlp = nnx.Linear(8, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.dropout(jax.nn.relu(self.mlp(x)))


class NnxStack(nnx.Module):
    def __init__(self):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(rngs):
            return NnxBlock(rngs)

        self.blocks = create(nnx.Rngs(0))

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(block, x):
            return block(x)

        return forward(self.blocks, x)


@pytest.mark.parametrize("layers", [None, 0], ids=["plain", "scan"])
def test_nnx_blocks(layers):
    with jax.numpy_rank_promotion("allow"):
        graphdef, state = nnx.split(NnxBlock(nnx.Rngs(0)) if layers is None else NnxStack())

        def apply(state, graphdef, x):
            model = nnx.merge(graphdef, state)
            return model(x), nnx.split(model)

        found = infer_axes(apply, state, graphdef, f32(2, 5, 8))
    assert jax.tree.structure(found) != jax.tree.structure(state)  # None holds no leaf
    prefix = "" if layers is None else "blocks/"
    query = stacked(layers, axes((), (0,), (1, 2)))
    kernels = {path: a for path, a in by_path(found).items() if a is not None}
    assert kernels == {
        f"{prefix}attn/query/kernel": query,
        f"{prefix}attn/key/kernel": query,
        f"{prefix}attn/value/kernel": query,
        f"{prefix}attn/out/kernel": stacked(layers, axes((), (0, 1), (2,))),
        f"{prefix}mlp/kernel": stacked(layers, DENSE),
    }


def test_equinox_model_with_static_leaves(getkey):
    model = eqx.nn.MLP(8, 3, 6, 1, key=getkey())
    found = infer_axes(lambda model, xs: jax.vmap(model)(xs), model, f32(4, 8))
    assert [layer.weight for layer in found.layers] == [axes((), (1,), (0,))] * 2
    assert [layer.bias for layer in found.layers] == [None, None]
    assert found.activation is None


# --- Axes -----------------------------------------------------------------------------------------


def test_axes_are_static_leaves():
    a = Axes(batch=[np.int64(0)], contract=(1,), out=(2,))
    assert a == STACK
    assert hash(a) == hash(STACK)
    assert a.ndim == 3
    assert jax.tree.leaves({"w": a, "b": None}) == [a]
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.batch = ()


@pytest.mark.parametrize(
    "dims",
    [
        {"contract": (0,), "out": (0,)},
        {"contract": (0,), "out": (2,)},
        {"contract": (0,), "out": (-1,)},
        {"contract": (0, 0), "out": (1,)},
        {"contract": 0, "out": (1,)},
        {"contract": (0.0,), "out": (1,)},
        {"contract": ("0",), "out": (1,)},
        {"contract": (0,), "out": None},
    ],
)
def test_impossible_axes_are_refused(dims):
    with pytest.raises(AxesError, match=r"^got .*; wanted"):
        Axes(**dims)


# --- Reshapes -------------------------------------------------------------------------------------


@st.composite
def two_shapes(draw):
    """Two shapes of the same size, from a list of small factors grouped in two ways."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3, 2]), min_size=1, max_size=6))

    def grouped():
        cuts = sorted(draw(st.lists(st.integers(0, len(factors)), max_size=4)))
        bounds = zip([0, *cuts], [*cuts, len(factors)], strict=True)
        return tuple(int(np.prod(factors[i:j], dtype=int)) for i, j in bounds)

    return grouped(), grouped(), grouped()


@settings(max_examples=300, deadline=None)
@given(two_shapes())
def test_a_reshape_loses_no_origin(shapes):
    """Stepping along a new dim never moves along a dim of the leaf that is none of its origins."""
    leaf, middle, new = shapes
    dims = [(size, (d,)) for d, size in enumerate(leaf)]
    dims = list(zip(middle, _regroup(dims, middle, leaf), strict=True))
    found = _regroup(dims, new, leaf)
    coordinates = np.indices(leaf).reshape(len(leaf), *new)
    for d in range(len(new)):
        moved = np.diff(coordinates, axis=d + 1).reshape(len(leaf), -1).any(axis=1)
        assert set(np.flatnonzero(moved)) <= set(found[d])


@settings(max_examples=100, deadline=None)
@given(two_shapes())
def test_a_reshape_there_and_back_changes_no_origin(shapes):
    leaf = shapes[0]
    dims = [(size, (d,)) for d, size in enumerate(leaf)]
    merged = tuple(int(np.prod(leaf[i : i + 2], dtype=int)) for i in range(0, len(leaf), 2))
    back = _regroup(list(zip(merged, _regroup(dims, merged, leaf), strict=True)), leaf, leaf)
    assert back == tuple((d,) if size > 1 else () for d, size in enumerate(leaf))
