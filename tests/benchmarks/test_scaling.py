"""The paper plan's arithmetic, on models small enough to hold and programs small enough to know."""

import argparse
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lorax_fn as lora
from benchmarks import decoder, growth, many_adapters, scaling_plan
from benchmarks.collectives import collectives, first_group
from benchmarks.hlo import Instruction

OPTIONS = argparse.Namespace(batch=8, length=24)


@pytest.fixture
def mesh():
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def ring(function, out_spec, repeats=1):
    """The collectives of a function of a (2, 16) part of an array, in a loop."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    body = jax.shard_map(function, mesh=mesh, in_specs=P("x"), out_specs=out_spec, check_vma=False)
    looped = lambda xs: lax.scan(lambda _, x: (None, body(x)), None, xs)[1]
    cut = NamedSharding(mesh, P(None, "x"))
    x = jax.ShapeDtypeStruct((repeats, 16, 16), jnp.float32, sharding=cut)
    return collectives(jax.jit(looped).lower(x).compile().as_text())


PART = 2 * 16 * 4  # bytes
KINDS = {
    "all-reduce": (lambda x: lax.psum(x, "x"), P(), PART * 2 * 7 / 8),
    "all-gather": (lambda x: lax.all_gather(x, "x"), P(), 8 * PART * 7 / 8),
    "reduce-scatter": (
        lambda x: lax.psum_scatter(x, "x", scatter_dimension=1, tiled=True), P("x"), PART * 7 / 8
    ),
    "all-to-all": (
        lambda x: lax.all_to_all(x, "x", 1, 0, tiled=True), P("x"), PART * 7 / 8
    ),
    "collective-permute": (
        lambda x: lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]), P("x"), PART
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "case"), KINDS.items(), ids=KINDS)
def test_bytes_sent_are_those_of_a_ring(kind, case):
    function, out_spec, wanted = case
    moved = ring(function, out_spec, repeats=5)
    assert {c.kind for c in moved} == {kind}
    assert sum(c.sent for c in moved) == 5 * wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=3] {'axis_1'}, dimensions={0}", (0, 1, 2)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=3] {'axis_0'}, dimensions={0}", (0, 3)),
    ],
)
def test_groups_of_devices_are_read_in_every_notation(text, wanted):
    assert first_group(Instruction("i", (), "all-reduce", (), text)) == wanted


def test_groups_that_are_not_understood_are_an_error():
    with pytest.raises(ValueError, match="groups of strange are not understood"):
        first_group(Instruction("strange", (), "all-reduce", (), "replica_groups=?"))


@pytest.mark.parametrize(
    ("name", "adapter"),
    # As PEFT counts them for rank 16 on the seven linear layers; Mixtral's by the formula.
    [
        ("Llama-3-8B", 41_943_040),
        ("Llama-3-70B", 207_093_760),
        ("Mixtral-8x7B", 32 * 16 * (8192 + 2 * 5120 + 8192 + 8 * 3 * (4096 + 14336))),
    ],
)
def test_models_have_their_published_sizes(name, adapter):
    found = scaling_plan.parameters(name)
    assert found["model"] == scaling_plan.PUBLISHED[name]
    assert (found["adapter"], found["adapter bytes"]) == (adapter, 4 * adapter)
    assert f"| {found['model']:,} | {found['model']:,} |" in scaling_plan.PLAN.read_text()
    assert f"| {adapter:,} |" in scaling_plan.PLAN.read_text()


def test_a_model_that_is_not_the_published_one_is_refused(monkeypatch):
    monkeypatch.setitem(scaling_plan.PUBLISHED, "tiny", 1)
    with pytest.raises(ValueError, match=r"tiny has 32,992 parameters here, published are 1"):
        scaling_plan.parameters("tiny")


def held(tree, device):
    """Bytes that a device really holds."""
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
    return sum(s.data.nbytes for s in shards if s.device == device)


@pytest.mark.parametrize("name", ["tiny", "tiny experts"])
def test_bytes_of_a_device_are_those_that_it_holds(name, mesh):
    abstract = scaling_plan.abstract(name, mesh)
    real = jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), abstract)
    found = scaling_plan.memory(name, (4, 2), OPTIONS)
    params, factors, state = (held(tree, jax.devices()[3]) for tree in real)
    assert (found["base"], found["factors"], found["moments"]) == (
        params,
        factors,
        state + 4,
    )  # a count that lies nowhere
    assert found["full moments"] == 2 * found["base"] + 4


def test_bytes_sent_in_a_step_are_those_of_the_formulas():
    """Each weight is gathered twice, embedding and head once; then the factors' gradients."""
    config = scaling_plan.MODELS["tiny"]
    found = scaling_plan.partitioned("tiny", (4, 2), "LoRA", OPTIONS)
    shapes = config.shapes()
    layers = sum(math.prod(s) for n, s in shapes["layers"].items() if "norm" not in n)
    ends = math.prod(shapes["embed"]) + math.prod(shapes["head"])
    assert found["base gathered"] == (2 * layers + ends) / 2 * 2 * 3 / 4  # tensor, bytes, ring
    cut = 3 * 16 * 32 * 7  # of each layer's factors the side that fsdp cuts: A, or B of out, down
    assert found["factors gathered"] == 2 * cut * 4 * 3 / 4
    assert found["largest gradient"] == 16 * 32
    adapter = scaling_plan.parameters("tiny")["adapter"]
    assert 0 < found["gradients"] <= 2 * adapter * 2 * 3 / 4 + 100


def real_params(config, key):
    leaves, treedef = jax.tree.flatten(config.shapes(), is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves))
    draw = lambda k, s: 0.3 * jax.random.normal(k, s)
    return jax.tree.unflatten(treedef, map(draw, keys, leaves))


@pytest.mark.parametrize("name", ["tiny", "tiny experts"])
def test_the_decoder_is_causal_and_adapted_factored(name, mesh):
    config = scaling_plan.MODELS[name]
    params = real_params(config, jax.random.key(0))
    forward = functools.partial(decoder.apply, config, mesh)
    tokens = jax.random.randint(jax.random.key(1), (4, 8), 0, config.vocabulary)
    axes = lora.infer_axes(forward, params, tokens)
    rules = [lora.LoRA(scaling_plan.TARGETS, rank=2, alpha=3)]
    factors = lora.init(jax.random.key(2), params, rules, axes=axes)
    factors = jax.tree.map(lambda x: x + 0.05, factors)
    apply = jax.jit(lora.wrap(forward, dense="error"))
    logits = apply(params, factors, tokens)
    later = apply(params, factors, tokens.at[:, -1].add(1))
    np.testing.assert_allclose(logits[:, :-1], later[:, :-1], atol=1e-4)
    assert np.abs(logits[:, -1] - later[:, -1]).max() > 1e-2


def test_experts_are_the_mixture_of_each_tokens_best_two(monkeypatch):
    """Where no expert runs out of places."""
    monkeypatch.setattr(decoder, "CAPACITY", 4)
    config = scaling_plan.MODELS["tiny experts"]
    params = real_params(config, jax.random.key(0))["layers"]
    w = {name: array[0] for name, array in params.items()}
    x = jax.random.normal(jax.random.key(1), (2, 6, config.width))
    got = decoder._experts(config, w, x, lambda array, *_: array)
    silu = lambda z: z / (1 + np.exp(-z))
    w, x = jax.tree.map(np.asarray, (w, x))
    for b, s in np.ndindex(2, 6):
        scores = x[b, s] @ w["router"]
        best = np.argsort(scores)[-2:]
        gates = np.exp(scores[best]) / np.exp(scores[best]).sum()
        outs = [silu(x[b, s] @ w["gate"][e]) * (x[b, s] @ w["up"][e]) @ w["down"][e] for e in best]
        np.testing.assert_allclose(got[b, s], gates @ np.array(outs), atol=1e-4)


def test_growth_measures_base_and_wrapped(tmp_path, capsys):
    path = tmp_path / "growth.json"
    growth.main([*["--smoke", "--layers", "1", "--json"], str(path), "--widths"])
    report = json.loads(path.read_text())
    for structure in ("unrolled", "scanned"):
        row = report[structure]["layers"]["1"]
        assert all(row[name][key] > 0 for name in row for key in row[name])
    out = capsys.readouterr().out
    assert re.search(r"scanned, width 32\nlayers +trace.lower s .*\n +1 +\d", out)


def test_many_adapters_are_compared_where_they_agree(tmp_path, capsys):
    path = tmp_path / "many.json"
    many_adapters.main([*["--smoke", "--targets", "q,v", "--json"], str(path)])
    (rows,) = json.loads(path.read_text())["rows"].values()
    assert set(rows) == {"together", "runs", "joint"}
    assert rows["runs"]["ratio"] == 1
    assert rows["together"]["flops"] <= 1.1 * rows["runs"]["flops"]
    assert "MiB side by side" in capsys.readouterr().out
