"""Factors lie on a mesh as their weights do."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lorax_fn as lora
from lorax_fn.adapters import is_adapter

KINDS = [
    lora.LoRA("w", rank=2, alpha=3),
    lora.LoRA("w", rank=2, alpha=3, init="pissa"),
    lora.DoRA("w", rank=2, alpha=3),
    lora.VeRA("w", rank=3),
    lora.LoHa("w", rank=2, alpha=3),
    lora.LoKr("w", rank=2, alpha=3),
    lora.IA3("w"),
    lora.IA3("w", on="in"),
    lora.AdaLoRA("w", rank=2, alpha=3),
    lora.Full("w"),
]
AXES = {"w": lora.Axes(batch=(0,), contract=(1,), out=(2, 3))}


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.fixture
def stack(mesh, getkey):
    """(layers, contract, out, out), cut along contract and the first of the out dims."""
    sharding = NamedSharding(mesh, P(None, "fsdp", ("tensor", "data")))
    return {"w": jax.device_put(jax.random.normal(getkey(), (3, 8, 4, 6)), sharding)}


def specs(node):
    return jax.tree.map(lambda sharding: tuple(sharding.spec), node)


def test_each_factor_is_cut_as_its_dims_of_the_weight(stack):
    factors = lora.init(jax.random.key(0), stack, [KINDS[0]], axes=AXES)
    found = specs(lora.shardings(stack, factors)["w"])
    assert found.a == (None, "fsdp", None)
    assert found.b == (None, None, ("tensor", "data"), None)


@pytest.mark.parametrize("rule", KINDS, ids=lambda rule: type(rule).__name__)
def test_init_places_the_factors_of_every_kind(stack, rule):
    factors = lora.init(jax.random.key(0), stack, [rule], axes=AXES)
    wanted = lora.shardings(stack, factors)
    assert jax.tree.map(lambda x: x.sharding, factors) == wanted
    whole = {"w": np.asarray(stack["w"])}
    alone = lora.init(jax.random.key(0), whole, [rule], axes=AXES)
    for ours, theirs in zip(jax.tree.leaves(factors), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_abstract_params_in_sharded_factors_out(mesh):
    """Under jit, of a base that exists nowhere; each device makes no more than its part."""
    sharding = NamedSharding(mesh, P("fsdp", "tensor"))
    params = {"w": jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.bfloat16, sharding=sharding)}
    make = jax.jit(lambda key: lora.init(key, params, [lora.LoRA("w", rank=2, alpha=3)]))
    node = make(jax.random.key(0))["w"]
    assert tuple(node.a.sharding.spec)[:1] == ("fsdp",)
    assert tuple(node.b.sharding.spec)[1:] == ("tensor",)
    assert {shard.data.shape for shard in node.a.addressable_shards} == {(1 << 19, 2)}


class Sharded(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("fsdp", "tensor"))
        return nn.Dense(6, kernel_init=init, name="dense")(x)


def test_linen_metadata_place_abstract_params(mesh):
    model, x = Sharded(), jnp.ones((4, 8))
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    rules = [lora.LoRA(r".*dense/kernel", rank=2, alpha=3)]
    make = jax.jit(lambda key: lora.init(key, params, rules))
    with jax.set_mesh(mesh):
        node = make(jax.random.key(0))["params"]["dense"]["kernel"].value
        abstract = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, rules))
        found = lora.shardings(params, abstract)["params"]["dense"]["kernel"].value
    assert tuple(node.a.sharding.spec)[:1] == ("fsdp",)
    assert (found.a.spec, found.b.spec) == (P("fsdp", None), P(None, "tensor"))
    assert found.a.mesh.shape == mesh.shape


def test_nnx_metadata_place_abstract_params(mesh):
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", "tensor"))
    with jax.set_mesh(mesh):
        model = nnx.eval_shape(lambda: nnx.Linear(8, 6, kernel_init=init, rngs=nnx.Rngs(0)))
        _, params = nnx.split(model)
        factors = jax.eval_shape(
            lambda: lora.init(jax.random.key(0), params, [lora.LoRA(["kernel"], rank=2)])
        )
        found = lora.shardings(params, factors)
    (node,) = jax.tree.leaves(found, is_leaf=is_adapter)
    assert (node.a.spec, node.b.spec) == (P("fsdp", None), P(None, "tensor"))


def test_without_a_mesh_nothing_is_placed(getkey):
    params = {"w": jax.random.normal(getkey(), (8, 6)), "v": np.ones((4, 3), np.float32)}
    factors = lora.init(getkey(), params, [lora.LoRA(".*", rank=2, alpha=3)])
    assert lora.shardings(params, factors) == {"w": None, "v": None}
    assert not factors["w"].a.committed


def test_a_step_on_the_mesh_agrees_with_one_device(stack):
    rule = lora.LoRA("w", rank=2, alpha=3, axes=AXES["w"])
    factors = lora.init(jax.random.key(0), stack, [rule])
    factors = jax.tree.map(lambda x: x + 0.1, factors)
    x = jnp.ones((5, 8))

    def loss(factors, params, x):
        apply = lambda params, x: jnp.einsum("nd,ldhk->lnhk", x, params["w"])
        return jnp.sum(jnp.tanh(lora.wrap(apply, dense="error")(params, factors, x)))

    here = jax.tree.map(np.asarray, (factors, stack))
    wanted = jax.jit(jax.grad(loss))(*here, x)
    got = jax.jit(jax.grad(loss))(factors, stack, x)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_unknown_axes_of_the_mesh_are_named(mesh):
    params = jax.eval_shape(Sharded().init, jax.random.key(0), jnp.ones((4, 8)))
    other = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    with (
        jax.set_mesh(other),
        pytest.raises(lora.LoraError, match=r"'params/dense/kernel' name .*'fsdp'.*\('x',\)"),
    ):
        jax.eval_shape(lambda k: lora.init(k, params, [lora.LoRA(["dense"])]), jax.random.key(0))


def test_axes_that_do_not_divide_are_named(mesh):
    params = {"w": jax.ShapeDtypeStruct((7, 6), jnp.float32)}
    boxed = {"w": nn.Partitioned(params["w"], ("fsdp", None), mesh=mesh)}
    rules = [lora.LoRA("w", rank=2)]
    with pytest.raises(lora.LoraError, match=r"'w' is cut by .*'fsdp'.*\[7, 2\]"):
        jax.eval_shape(lambda k: lora.init(k, boxed, rules), jax.random.key(0))


def collectives(compiled):
    """The (name, array sizes) of each collective in a compiled program, scalars left out."""
    found = re.findall(
        r"= (.*?) (all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)(?:-start)?\(",
        compiled.as_text(),
    )
    shapes = [(name, re.findall(r"\w+\[([\d,]+)\]", result)) for result, name in found]
    return [(name, [math.prod(map(int, s.split(","))) for s in ss]) for name, ss in shapes if ss]


@pytest.mark.parametrize("rule", KINDS, ids=lambda rule: type(rule).__name__)
def test_merge_keeps_the_place_of_a_weight_and_moves_none(stack, rule, getkey):
    """Each device adds its part of the product up. DoRA sums norms, which are of an output's size."""
    factors = lora.init(jax.random.key(0), stack, [rule], axes=AXES)
    wanted = stack["w"].sharding
    assert lora.merge(stack, factors)["w"].sharding.is_equivalent_to(wanted, 4)
    compiled = jax.jit(lora.merge).lower(stack, factors).compile()
    assert compiled.output_shardings["w"].is_equivalent_to(wanted, 4)
    part = stack["w"].addressable_shards[0].data.size
    for _, sizes in collectives(compiled):
        assert sum(sizes) < part


def test_fsdp_under_scan_and_remat_reduces_the_factors_gradients_alone(getkey):
    """Weights are gathered layer by layer, forward and again backward; no gradient of them is."""
    layers, width, hidden, rank = 4, 64, 128, 2
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    cut, whole = NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P())

    @jax.checkpoint
    def layer(x, w):
        w = jax.lax.with_sharding_constraint(w, whole)
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    def apply(params, x):
        return jax.lax.scan(layer, x, params)[0]

    params = {
        "up": jax.random.normal(getkey(), (layers, width, hidden)),
        "down": jax.random.normal(getkey(), (layers, hidden, width)),
    }
    params = jax.device_put(params, cut)
    x = jax.device_put(jax.random.normal(getkey(), (16, width)), NamedSharding(mesh, P("fsdp")))
    axes = lora.infer_axes(apply, params, x)
    rule = lora.LoRA("up|down", rank=rank, alpha=3)
    factors = lora.init(jax.random.key(0), params, [rule], axes=axes)
    step = jax.jit(
        jax.grad(
            lambda factors, params, x: jnp.square(lora.wrap(apply)(params, factors, x)).mean()
        ),
        out_shardings=lora.shardings(params, factors),
    )
    moved = collectives(step.lower(factors, params, x).compile())
    reduced = [n for name, sizes in moved if name != "all-gather" for n in sizes]
    gathered = [n for name, sizes in moved if name == "all-gather" for n in sizes]
    assert sum(reduced) == 2 * rank * (width + hidden)  # of one layer's factors, in the loop
    assert gathered.count(width * hidden) == 4  # up and down, forward and backward
    assert max(gathered) == width * hidden  # never the whole stack
