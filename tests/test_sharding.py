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


class Logical(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        return nn.Dense(6, kernel_init=init, name="dense")(x)


def test_linen_logical_names_place_by_the_rules_in_force(mesh):
    params = jax.eval_shape(Logical().init, jax.random.key(0), jnp.ones((4, 8)))
    rules = [lora.LoRA(["dense"], rank=2, alpha=3)]
    make = jax.jit(lambda key: lora.init(key, params, rules))
    with jax.set_mesh(mesh), nn.logical_axis_rules([("embed", "fsdp"), ("mlp", "tensor")]):
        node = make(jax.random.key(0))["params"]["dense"]["kernel"].value
        found = lora.shardings(params, lora.init(jax.random.key(0), params, rules))
    assert {shard.data.shape for shard in node.a.addressable_shards} == {(4, 2)}
    spec = found["params"]["dense"]["kernel"].value
    assert (spec.a.spec, spec.b.spec) == (P("fsdp", None), P(None, "tensor"))


def test_logical_names_without_rules_are_named(mesh):
    params = jax.eval_shape(Logical().init, jax.random.key(0), jnp.ones((4, 8)))
    with (
        jax.set_mesh(mesh),
        pytest.raises(lora.LoraError, match=r"'params/dense/kernel' name .*'embed'.*'tensor'"),
    ):
        lora.init(jax.random.key(0), params, [lora.LoRA(["dense"])])


def test_nnx_logical_names_place_by_their_rules(mesh):
    init = nnx.with_partitioning(
        nnx.initializers.lecun_normal(),
        ("embed", "mlp"),
        sharding_rules=(("embed", "fsdp"), ("mlp", "tensor")),
    )
    with jax.set_mesh(mesh):
        model = nnx.eval_shape(lambda: nnx.Linear(8, 6, kernel_init=init, rngs=nnx.Rngs(0)))
        _, params = nnx.split(model)
        rules = [lora.LoRA(["kernel"], rank=2, alpha=3)]
        factors = jax.jit(lambda key: lora.init(key, params, rules))(jax.random.key(0))
        found = lora.shardings(params, factors)
    (node,) = jax.tree.leaves(found, is_leaf=is_adapter)
    assert (node.a, node.b) == (
        NamedSharding(mesh, P("fsdp", None)),
        NamedSharding(mesh, P(None, "tensor")),
    )
    (made,) = jax.tree.leaves(factors, is_leaf=is_adapter)
    assert {shard.data.shape for shard in made.b.addressable_shards} == {(2, 3)}


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


def test_a_mesh_of_explicit_axes(getkey):
    """`jax.make_mesh`'s own kind: shardings are part of the types, and sums have to say theirs."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    on = lambda *spec: NamedSharding(mesh, P(*spec))
    cut = {"w": on("fsdp", "tensor"), "v": on("tensor", "fsdp")}
    shapes = {"w": (16, 32), "v": (32, 8)}
    params = {n: jax.device_put(jax.random.normal(getkey(), shapes[n]), cut[n]) for n in cut}
    x = jax.device_put(jax.random.normal(getkey(), (4, 16)), on("fsdp"))

    def apply(params, x, explicit=True):
        first = dict(out_sharding=P("fsdp", "tensor")) if explicit else {}
        second = dict(out_sharding=P("fsdp", None)) if explicit else {}
        return jnp.dot(jnp.tanh(jnp.dot(x, params["w"], **first)), params["v"], **second)

    def loss(factors, params, x, explicit=True):
        out = lora.wrap(apply, dense="error")(params, factors, x, explicit=explicit)
        return jnp.square(out).sum()

    rules = [lora.LoRA(".*", rank=2, alpha=3)]
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    with jax.set_mesh(mesh):
        factors = jax.jit(lambda key: lora.init(key, abstract, rules))(jax.random.key(0))
        factors = jax.tree.map(lambda x: x + 0.1, factors)
        assert factors["w"].a.sharding == on("fsdp", None)
        assert factors["w"].b.sharding == on(None, "tensor")
        value, grads = jax.jit(jax.value_and_grad(loss))(factors, params, x)
        many = jax.jit(jax.vmap(loss, in_axes=(None, None, 0)))(
            factors, params, jnp.stack([x, 2 * x])
        )
        merged = lora.merge(params, factors)
    assert jax.tree.map(lambda g: g.sharding, grads) == jax.tree.map(lambda f: f.sharding, factors)
    assert merged["w"].sharding == cut["w"]
    here = jax.tree.map(np.asarray, (factors, params, x))
    wanted, wanted_grads = jax.value_and_grad(loss)(*here, explicit=False)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(many[0], wanted, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


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
    moved = collectives(compiled)
    part = stack["w"].addressable_shards[0].data.size
    assert all(sum(sizes) < part for _, sizes in moved)
    if not isinstance(rule, lora.DoRA):
        assert moved == []


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

    def moved_by(rule):
        factors = lora.init(jax.random.key(0), params, [rule], axes=axes)
        step = jax.jit(
            jax.grad(
                lambda factors, params, x: jnp.square(lora.wrap(apply)(params, factors, x)).mean()
            ),
            out_shardings=lora.shardings(params, factors),
        )
        return collectives(step.lower(factors, params, x).compile())

    moved = moved_by(lora.LoRA("up|down", rank=rank, alpha=3))
    reduced = [n for name, sizes in moved if name != "all-gather" for n in sizes]
    gathered = [n for name, sizes in moved if name == "all-gather" for n in sizes]
    assert sum(reduced) == 2 * rank * (width + hidden)  # of one layer's factors, in the loop
    assert gathered.count(width * hidden) == 4  # up and down, forward and backward
    assert max(gathered) == width * hidden  # never the whole stack
    # What the same would read of training that does reduce gradients of the base's size.
    reduced = [
        n for name, sizes in moved_by(lora.Full(".*")) if name != "all-gather" for n in sizes
    ]
    assert max(reduced) >= width * hidden // 8
    assert sum(reduced) >= 2 * width * hidden // 8
