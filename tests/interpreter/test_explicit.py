"""On a mesh with explicit axes, where shardings are part of types, all is as the base model has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lorax_fn as lora


@pytest.fixture
def mesh():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


def cut_out(params, x):
    return x @ params["w"]


def cut_contract(params, x):
    return jnp.einsum("bi,io->bo", x, params["w"], out_sharding=P("data", None))


def up_and_down(params, x):
    hidden = jax.nn.relu(x @ params["w"] + params["bias"][None])
    return jnp.einsum("bo,oi->bi", hidden, params["v"], out_sharding=P("data", None))


def over_layers(params, x):
    def layer(x, w):
        return up_and_down({"bias": params["bias"], **w}, x), None

    stacks = {"w": params["w"], "v": params["v"]}
    return jax.lax.scan(jax.checkpoint(layer), x, stacks)[0]


def heads(params, x):
    return jnp.einsum("bd,dhk->bhk", x, params["w"])


def gathered(params, x):
    """As FSDP does: the weight is brought together, then used."""
    w = jax.sharding.reshard(params["w"], P(None, None))
    return x @ w


def lookup(params, ids):
    return params["w"].at[ids].get(out_sharding=P("data", None))


DATA = (8, 16), P("data", None)
IN, OUT = P("model", None), P(None, "model")
CASES = {
    "cut_out": (cut_out, {"w": ((16, 32), OUT)}, DATA),
    "cut_contract": (cut_contract, {"w": ((16, 32), IN)}, ((8, 16), P("data", "model"))),
    "up_and_down": (
        up_and_down,
        {"w": ((16, 32), OUT), "v": ((32, 16), IN), "bias": ((32,), P("model"))},
        DATA,
    ),
    "over_layers": (
        over_layers,
        {
            "w": ((3, 16, 32), P(None, None, "model")),
            "v": ((3, 32, 16), P(None, "model", None)),
            "bias": ((32,), P("model")),
        },
        DATA,
    ),
    "heads": (heads, {"w": ((16, 4, 8), P(None, "model", None))}, DATA),
    "gathered": (gathered, {"w": ((16, 32), P("data", None))}, DATA),
    "lookup": (lookup, {"w": ((16, 32), OUT)}, ((8,), P("data"))),
}


@pytest.mark.parametrize(
    ("name", "rule"),
    [*((name, lora.LoRA) for name in CASES), ("cut_contract", lora.DoRA), ("heads", lora.DoRA)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_values_gradients_and_their_places_are_those_of_the_merged_model(mesh, getkey, name, rule):
    fn, weights, (shape, spec) = CASES[name]

    def put(array, spec):
        return jax.device_put(array, NamedSharding(mesh, spec))

    params = {k: put(jax.random.normal(getkey(), s), cut) for k, (s, cut) in weights.items()}
    x = jnp.arange(8) if len(shape) == 1 else jax.random.normal(getkey(), shape)
    x = put(x, spec)
    axes = lora.infer_axes(fn, params, x)
    targets = [name for name in weights if name != "bias"]
    factors = lora.init(getkey(), params, [rule(targets, rank=2, alpha=3.0)], axes=axes)
    factors = jax.tree.map(lambda a: a + 0.1, factors)

    wrapped = lora.wrap(fn, dense="error")
    y = jax.jit(wrapped)(params, factors, x)
    expected = jax.jit(fn)(lora.merge(params, factors), x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    assert y.sharding == expected.sharding

    def loss(run):
        return lambda f: jnp.sum(run(f) ** 2)

    by_wrap = jax.jit(jax.grad(loss(lambda f: wrapped(params, f, x))))(factors)
    by_merge = jax.grad(loss(lambda f: fn(lora.merge(params, f), x)))
    for got, factor in zip(jax.tree.leaves(by_wrap), jax.tree.leaves(factors), strict=True):
        assert got.sharding.is_equivalent_to(factor.sharding, factor.ndim)
    if rule is lora.LoRA:  # DoRA's norm is held constant, which merging does not know
        for got, want in zip(
            jax.tree.leaves(by_wrap), jax.tree.leaves(by_merge(factors)), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "spec"),
    [("nf4", IN), ("nf4", OUT), ("nf4", P("data", "model")), ("int8", P(("data", "model"), None))],
    ids=str,
)
def test_quantised_weights_are_cut_and_computed_as_they_lie(mesh, getkey, dtype, spec):
    def fn(params, ids, x):
        rows = params["embedding"].at[ids].get(out_sharding=P("data", None))
        return rows, jnp.einsum("bi,io->bo", x, params["w"], out_sharding=P("data", None))

    def put(*shape):
        return jax.device_put(jax.random.normal(getkey(), shape), NamedSharding(mesh, spec))

    params = {"embedding": put(64, 64), "w": put(64, 32)}
    ids = jax.device_put(jnp.arange(8) * 7, NamedSharding(mesh, P("data")))
    x = jax.device_put(jax.random.normal(getkey(), (8, 64)), NamedSharding(mesh, P("data")))
    base = lora.quantize(params, ["embedding", "w"], dtype=dtype, block=8)
    assert base["w"].qvalue.sharding == params["w"].sharding
    within = jax.jit(lambda params: lora.quantize(params, ["w"], dtype=dtype, block=8))(params)
    assert within["w"].qvalue.sharding == params["w"].sharding
    factors = lora.init(getkey(), base, [lora.LoRA(["embedding", "w"], rank=2, alpha=3.0)])
    factors = jax.tree.map(lambda a: a + 0.1, factors)
    merged = lora.merge(base, factors)
    assert merged["w"].sharding == params["w"].sharding

    def loss(run):
        return jax.value_and_grad(lambda f: sum(jnp.square(y).mean() for y in run(f)))(factors)

    got = jax.jit(lambda: loss(lambda f: lora.wrap(fn)(base, f, ids, x)))()
    wanted = loss(lambda f: fn(lora.merge(base, f), ids, x))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * abs(theirs).max())


def test_many_adapters_at_once(mesh, getkey):
    w = jax.device_put(jax.random.normal(getkey(), (16, 32)), NamedSharding(mesh, IN))
    x = jax.device_put(
        jax.random.normal(getkey(), (8, 16)), NamedSharding(mesh, P("data", "model"))
    )
    rules = [lora.LoRA("w", rank=2, alpha=3.0)]
    each = [lora.init(getkey(), {"w": w}, rules) for _ in range(2)]
    each = [jax.tree.map(lambda a: a + 0.1, f) for f in each]
    wrapped = lora.wrap(cut_contract, dense="error")
    together = jax.jit(jax.vmap(wrapped, in_axes=(None, 0, None)))({"w": w}, lora.stack(each), x)
    for got, factors in zip(together, each, strict=True):
        np.testing.assert_allclose(got, wrapped({"w": w}, factors, x), rtol=1e-5, atol=1e-5)
