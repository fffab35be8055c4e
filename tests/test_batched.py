"""One batch, answered by many adapters: what each merged model answers, for one base product."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lora
from lorax_fn.adapters import is_adapter
from lorax_fn.flops import count_flops

IDS = np.array([2, 0, -1, 1, 0, 2])
KINDS = {
    "LoRA": lambda r: lora.LoRA(".*", rank=r, alpha=r + 3),
    "PiSSA": lambda r: lora.LoRA(".*", rank=r, alpha=r + 3, init="pissa"),
    "DoRA": lambda r: lora.DoRA(".*", rank=r, alpha=r + 3),
    "VeRA": lambda r: lora.VeRA(".*", rank=r),
    "LoHa": lambda r: lora.LoHa(".*", rank=r, alpha=r + 3),
    "LoKr": lambda r: lora.LoKr(".*", rank=4, alpha=r + 3, factor=2),
    "AdaLoRA": lambda r: lora.AdaLoRA(".*", rank=r, alpha=r + 3),
    "IA3": lambda r: lora.IA3(".*"),
    "IA3 in": lambda r: lora.IA3(".*", on="in"),
    "Full": lambda r: lora.Full(".*"),
    "tokens": lambda r: lora.TrainableTokens(".*", tokens=[1, 5]),
}


def apply_fn(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


@pytest.fixture
def params(getkey):
    return {"w": jax.random.normal(getkey(), (12, 10)), "v": jax.random.normal(getkey(), (10, 12))}


def moved(getkey, params, rules, axes=None):
    """Factors that change something; a leaf's arrays are drawn by numpy, which compiles nothing."""
    factors = lora.init(getkey(), params, rules, axes=axes)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(getkey())))
    return jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), factors)


def by_merging(apply_fn, params, each, ids, *args):
    """Each example answered alone, by a model of its own."""
    models = {-1: params} | {i: lora.merge(params, factors) for i, factors in enumerate(each)}
    plain = jax.jit(apply_fn)
    return np.concatenate([
        plain(models[i], *(x[j : j + 1] for x in args)) for j, i in enumerate(ids.tolist())
    ])  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_answers_as_its_merged_model(getkey, params, kind):
    """Of three ranks and scales; -1 is the bare base, whatever the adapters hold."""
    each = [moved(getkey, params, [KINDS[kind](rank)]) for rank in (1, 3, 2)]
    x = jax.random.normal(getkey(), (6, 12))
    stacked = lora.stack(each)
    traces = []

    def noted(params, x):
        traces.append(x.shape)
        return apply_fn(params, x)

    batched = jax.jit(lora.wrap_batched(noted, dense="error"))
    answer = batched(params, stacked, IDS, x)
    np.testing.assert_allclose(answer, by_merging(apply_fn, params, each, IDS, x), atol=2e-5)
    bare = jax.jit(jax.vmap(lambda x: apply_fn(params, x[None])[0]))(x)
    np.testing.assert_allclose(answer[2], bare[2], atol=2e-6)
    nans = jax.tree.map(lambda array: jnp.full_like(array, jnp.nan), stacked)
    np.testing.assert_array_equal(batched(params, nans, IDS, x)[2], answer[2])
    assert np.abs(answer - bare)[IDS >= 0].max(1).min() > 1e-3  # the others are adapted

    outside = batched(params, stacked, jnp.array([2, 0, -1, 3, 0, -2]), x)
    assert np.isnan(outside[np.array([3, 5])]).all()
    np.testing.assert_array_equal(outside[np.array([0, 1, 2, 4])], answer[np.array([0, 1, 2, 4])])
    assert traces == [(1, 12)]  # traced, and so compiled, once


class Model(nn.Module):
    """Lookup, tied head, convolution, DenseGeneral, and rematerialised layers under scan."""

    @nn.compact
    def __call__(self, tokens, scale):
        embed = nn.Embed(11, 12, name="embed")
        x = nn.Conv(12, (3,), name="conv")(embed(tokens))
        x = nn.MultiHeadDotProductAttention(3, name="attention")(x, x) * scale[:, None, None]
        layer = nn.scan(
            nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = layer(name="layers")(x, None)
        return embed.attend(nn.LayerNorm(name="norm")(x))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(12, name="dense")(nn.gelu(x)), None


def test_a_model_of_many_parts(getkey):
    model = Model()
    tokens = jax.random.randint(getkey(), (6, 5), 0, 11)
    scale = jnp.linspace(0.5, 2, 6)
    with jax.numpy_rank_promotion("allow"):  # Flax's norm and biases
        variables = jax.jit(model.init)(getkey(), tokens, scale)
        axes = lora.infer_axes(model.apply, variables, tokens, scale)
        each = [
            moved(
                getkey,
                variables,
                [
                    lora.LoRA(r".*(kernel|embedding)", rank=r, alpha=3.0),
                    lora.Full(r".*/(bias|scale)"),
                ],
                axes,
            )
            for r in (2, 3, 1)
        ]
        batched = jax.jit(lora.wrap_batched(model.apply, dense="error"))
        answer = batched(variables, lora.stack(each), IDS, tokens, scale)
        wanted = by_merging(model.apply, variables, each, IDS, tokens, scale)
    assert answer.shape == (6, 5, 11)
    np.testing.assert_allclose(answer, wanted, atol=1e-4)


@pytest.mark.optimized
def test_the_base_is_multiplied_once_for_the_whole_batch(getkey, params):
    """FLOPs and arrays: the base's, and thin ones for each example, for any number of adapters."""
    n, length, rank = 6, 7, 2
    x = jnp.ones((n, length, 12))
    plain = count_flops(jax.make_jaxpr(apply_fn)(params, x))
    thin = n * 2 * (2 * length * rank * (12 + 10))
    one = moved(getkey, params, [lora.LoRA(".*", rank=rank, alpha=3.0)])
    for adapters in (1, 5):
        stacked = lora.stack([one] * adapters)
        batched = lora.wrap_batched(apply_fn, dense="error")
        jaxpr = jax.make_jaxpr(batched)(params, stacked, np.zeros(n, int), x)
        assert count_flops(jaxpr) == plain + thin
        assert all(
            (12, 10) not in (shape, shape[1:]) or shape == (12, 10)
            for shape in (var.aval.shape for eqn in jaxpr.eqns for var in eqn.outvars)
        )
        compiled = jax.jit(batched).lower(params, stacked, np.zeros(n, int), x).compile()
        text = compiled.as_text()
        assert f"f32[{n},12,10]" not in text  # no weight for each example
        assert f"f32[{n},12,{rank}]" in text  # but factors


def test_examples_do_not_meet(getkey, params):
    """Not even in a norm over the batch: each is what it would be alone."""

    def apply_fn(params, x):
        h = x @ params["w"]
        return (h - h.mean(0, keepdims=True)) + h.max(0, keepdims=True)

    each = [moved(getkey, params, [lora.LoRA("w", rank=2, alpha=3.0)]) for _ in range(3)]
    x = jax.random.normal(getkey(), (6, 12))
    answer = lora.wrap_batched(apply_fn)(params, lora.stack(each), IDS, x)
    np.testing.assert_allclose(answer, by_merging(apply_fn, params, each, IDS, x), atol=1e-5)


def test_arguments_and_results_of_all_sorts(getkey, params):
    """Trees, keywords, what is no array, results with and without the batch, several devices."""

    def apply_fn(params, x, *, shift, mode, extra=None):
        assert mode == "tanh"
        assert extra is None
        h = jnp.tanh(x["x"] @ params["w"]) + shift
        return {"h": h, "mode": mode, "norm": jnp.sum(h**2), "length": 3}

    each = [moved(getkey, params, [lora.LoRA("w", rank=2, alpha=3.0)]) for _ in range(3)]
    x, shift = jax.random.normal(getkey(), (6, 12)), jax.random.normal(getkey(), (6, 10))
    batched = lora.wrap_batched(apply_fn)
    result = batched(params, lora.stack(each), IDS, {"x": x}, shift=shift, mode="tanh")
    wanted = by_merging(lambda p, x, s: jnp.tanh(x @ p["w"]) + s, params, each, IDS, x, shift)
    np.testing.assert_allclose(result["h"], wanted, atol=1e-5)
    np.testing.assert_allclose(result["norm"], (wanted**2).sum(1), rtol=1e-4)
    assert (result["mode"], result["length"]) == ("tanh", 3)


def test_gradients_reach_each_examples_own_adapter(getkey, params):
    """As when several are trained on one stream of examples."""
    each = [moved(getkey, params, [lora.LoRA(".*", rank=2, alpha=3.0)]) for _ in range(3)]
    x = jax.random.normal(getkey(), (6, 12))
    batched = lora.wrap_batched(apply_fn)
    loss = lambda stacked: jnp.sum(batched(params, stacked, IDS, x) ** 2)
    grads = jax.jit(jax.grad(loss))(lora.stack(each))
    apply = lora.wrap(apply_fn)
    for i, factors in enumerate(each):
        own = lambda f, i=i: jnp.sum(apply(params, f, x[i == IDS]) ** 2)
        wanted = jax.jit(jax.grad(own))(factors)
        jax.tree.map(
            lambda g, w, i=i: np.testing.assert_allclose(g[i], w, rtol=1e-3, atol=1e-4),
            grads,
            wanted,
        )


def test_neutral_nodes_change_nothing(getkey, params):
    for make in KINDS.values():
        factors = moved(getkey, params, [make(2)])
        neutral = jax.tree.map(lambda node: node.neutral(), factors, is_leaf=is_adapter)
        merged = lora.merge(params, neutral)
        for name in params:
            np.testing.assert_array_equal(merged[name], params[name])


def test_refusals(getkey, params):
    one = moved(getkey, params, [lora.LoRA(".*", rank=2, alpha=3.0)])
    stacked, x = lora.stack([one, one]), jnp.ones((3, 12))
    batched = lora.wrap_batched(apply_fn)
    ids = np.array([0, 1, -1])
    for call, wanted in [
        (lambda: batched(params, stacked, [0, 2, 1], x), "adapter 2 of 2 .* from 0 to 1, or -1"),
        (lambda: batched(params, stacked, jnp.array([0, -2, 1]), x), "adapter -2 of 2"),
        (lambda: batched(params, stacked, [0.0, 1.0, 1.0], x), r"ids are float64\[3\]"),
        (lambda: batched(params, stacked, 1, x), r"ids are int64\[\]"),
        (lambda: batched(params, stacked, [0, 1], x), r"float32\[3, 12\], with 2 ids"),
        (lambda: batched(params, stacked, ids, x, jnp.ones(())), r"float32\[\], with 3 ids"),
        (lambda: batched(params, one, ids, x), "different first axes; wanted what lora.stack made"),
        (lambda: batched(params, {"w": None, "v": None}, ids, x), "no arrays"),
        (lambda: lora.wrap_batched("model"), "wanted a function"),
        (lambda: lora.wrap_batched(apply_fn, dense="maybe"), "dense='maybe'"),
        (lambda: lora.take(stacked, jnp.array(2)), "adapter 2 of 2"),
    ]:
        with pytest.raises(lora.LoraError, match=wanted):
            call()
    outside = jax.jit(lora.take)(stacked, 2)
    assert all(np.isnan(array).all() for array in jax.tree.leaves(outside))


READER = """
import sys
import jax, numpy as np
for name in ("merged", "batched"):
    with open(f"{name}.bin", "rb") as file:
        function = jax.export.deserialize(bytearray(file.read()))
    *inputs, wanted = np.load(f"{name}.npz").values()
    np.testing.assert_allclose(function.call(*inputs), wanted, atol=1e-5)
assert "lorax_fn" not in sys.modules
print("both answer")
"""


def test_exported_functions_answer_in_another_process(getkey, params, tmp_path):
    """`jax.export` of the merged and of the batched function; what reads them has no lorax_fn."""
    each = [moved(getkey, params, [lora.LoRA(".*", rank=2, alpha=3.0)]) for _ in range(3)]
    x, ids = jax.random.normal(getkey(), (6, 12)), jnp.asarray(IDS, jnp.int32)
    calls = {
        "merged": (apply_fn, (lora.merge(params, each[0]), x)),
        "batched": (lora.wrap_batched(apply_fn), (params, lora.stack(each), ids, x)),
    }
    for name, (function, arguments) in calls.items():
        leaves, treedef = jax.tree.flatten(arguments)
        flat = jax.jit(lambda *leaves, f=function, t=treedef: f(*jax.tree.unflatten(t, leaves)))
        exported = jax.export.export(flat)(*leaves)
        (tmp_path / f"{name}.bin").write_bytes(exported.serialize())
        np.savez(tmp_path / f"{name}.npz", *leaves, flat(*leaves))
    # XLA_FLAGS: the reader has as many devices as the writer had, so `call` needs no shardings.
    done = subprocess.run(
        [sys.executable, "-c", READER], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stdout == "both answer\n"
