"""Quantised leaves on a mesh: codes and scales lie as the weight does, and so do its factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lorax_fn as lora


@pytest.fixture
def params(getkey):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    w = jax.random.normal(getkey(), (64, 48))
    return {"w": jax.device_put(w, NamedSharding(mesh, P("fsdp", "tensor")))}


def test_codes_scales_and_factors_lie_as_the_weight_does(params):
    base = lora.quantize(params, "w", dtype="nf4", block=16)
    assert tuple(base["w"].qvalue.sharding.spec) == ("fsdp", "tensor")
    assert tuple(base["w"].scale.sharding.spec) == ("fsdp", "tensor")  # (4, 48)
    wide = lora.quantize(params, "w", dtype="nf4", block=32)["w"]  # two blocks on four devices
    assert tuple(wide.scale.sharding.spec) == (None, "tensor")
    factors = lora.init(jax.random.key(0), base, lora.LoRA("w", rank=2, alpha=3))
    assert tuple(factors["w"].a.sharding.spec) == ("fsdp", None)
    assert lora.shardings(base, factors)["w"].b.spec == P(None, "tensor")
    merged = lora.merge(base, factors)["w"]
    assert merged.sharding == params["w"].sharding


def test_a_step_on_the_mesh_is_that_of_one_device_and_gathers_no_codes(params, getkey):
    base = lora.quantize(params, "w", dtype="nf4", block=16)
    factors = lora.init(jax.random.key(0), base, lora.LoRA("w", rank=2, alpha=3))
    factors = jax.tree.map(lambda x: x + 0.1, factors)
    x = jax.random.normal(getkey(), (8, 64))
    wrapped = lora.wrap(lambda params, x: jnp.tanh(x @ params["w"]))

    def step(base, factors, x):
        return jax.value_and_grad(lambda f: wrapped(base, f, x).var())(factors)

    compiled = jax.jit(step).lower(base, factors, x).compile()
    alone = jax.device_put((base, factors, x), jax.devices()[0])
    got, wanted = jax.jit(step)(base, factors, x), jax.jit(step)(*alone)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    gathers = [line for line in compiled.as_text().splitlines() if " all-gather(" in line]
    assert not [line for line in gathers if "u8[" in line or "u4[" in line]


@pytest.mark.parametrize(("axis", "spec"), [(0, P("d")), (1, P(None, "d"))], ids=str)
def test_a_quantised_weight_gathered_within_shard_map_stays_factored(axis, spec, getkey):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    def local(w, x):
        return x @ jax.lax.all_gather(w, "d", axis=axis, tiled=True)

    def fsdp(params, x):
        specs = {"in_specs": (spec, P("d")), "out_specs": P("d")}
        return jax.shard_map(local, mesh=mesh, **specs)(params["w"], x)

    base = lora.quantize({"w": jax.random.normal(getkey(), (128, 32))}, "w", dtype="int8", block=16)
    factors = lora.init(getkey(), base, lora.LoRA("w", rank=2, alpha=3))
    factors, x = jax.tree.map(lambda a: a + 0.1, factors), jax.random.normal(getkey(), (8, 128))

    def loss(run):
        return jax.value_and_grad(lambda f: jnp.square(run(f)).sum())(factors)

    got = jax.jit(lambda: loss(lambda f: lora.wrap(fsdp, dense="error")(base, f, x)))()
    wanted = loss(lambda f: fsdp(lora.merge(base, f), x))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3 * abs(theirs).max())
