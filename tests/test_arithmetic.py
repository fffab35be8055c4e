"""Adapter arithmetic, against numpy and examples worked by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lora
from lorax_fn import task_vectors
from lorax_fn.adapters import LoRAFactors
from lorax_fn.flops import count_flops
from tests.reference import low_rank_sum

# Shape, roles ("b" batch, "c" contract, "o" out) and axes of weights as models have them.
WEIGHTS = {
    "query": ((8, 2, 5), "coo", lora.Axes(contract=(0,), out=(1, 2))),
    "conv": ((3, 3, 4, 6), "ccco", lora.Axes(contract=(0, 1, 2), out=(3,))),
    "turned": ((7, 3, 9), "obc", lora.Axes(batch=(1,), contract=(2,), out=(0,))),
    "experts": ((2, 3, 9, 7), "bbco", lora.Axes(batch=(0, 1), contract=(2,), out=(3,))),
}


MATRIX = lora.Axes(contract=(0,), out=(1,))


def adapter(getkey, shape, axes, rank, alpha):
    rng = np.random.default_rng(np.asarray(jax.random.key_data(getkey())))
    batch, contract, out = (
        [shape[d] for d in dims] for dims in (axes.batch, axes.contract, axes.out)
    )
    a, b = (
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((*batch, *contract, rank), (*batch, rank, *out))
    )
    return {"w": LoRAFactors(a, b, scale=alpha / rank, axes=axes, dropout=0.0)}


@functools.partial(jax.jit, static_argnames=("method", "rank", "density"))
def combine(each, weights, **options):
    return lora.combine(each, weights, **options)


def change(factors, shape):
    """ΔW, as `merge` adds it to nothing."""
    return np.asarray(lora.merge({"w": np.zeros(shape, np.float32)}, factors)["w"])


def numpy_change(factors, roles):
    node = factors["w"]
    return low_rank_sum(np.float64(node.a), np.float64(node.b), roles, node.scale)


def matrices(delta, roles):
    """(batch, contract, out) of an array with these roles."""
    order = [i for wanted in "bco" for i, role in enumerate(roles) if role == wanted]
    sizes = [np.prod([n for n, r in zip(delta.shape, roles, strict=True) if r == wanted], dtype=int)
             for wanted in "bco"]  # fmt: skip
    return delta.transpose(order).reshape(sizes)


@pytest.fixture(params=WEIGHTS)
def several(request, getkey):
    """(shape, roles, three adapters of ranks 2, 4, 3)."""
    shape, roles, axes = WEIGHTS[request.param]
    each = [adapter(getkey, shape, axes, r, r * s) for r, s in ((2, 1.5), (4, 0.5), (3, 3.0))]
    return shape, roles, each


def test_cat_is_exact(several):
    shape, roles, each = several
    combined = combine(each, [0.7, -1.3, 2.0], method="cat")
    wanted = sum(w * numpy_change(f, roles) for w, f in zip((0.7, -1.3, 2.0), each, strict=True))
    np.testing.assert_allclose(change(combined, shape), wanted, atol=1e-4)
    assert combined["w"].rank == 9


def test_svd_is_the_best_approximation(several):
    """That of numpy's SVD of the dense sum, for each layer and expert by itself."""
    shape, roles, each = several
    combined = combine(each, [0.7, -1.3, 2.0], method="svd", rank=2)
    total = sum(w * numpy_change(f, roles) for w, f in zip((0.7, -1.3, 2.0), each, strict=True))
    u, s, vt = np.linalg.svd(matrices(total, roles), full_matrices=False)
    best = (u[:, :, :2] * s[:, None, :2]) @ vt[:, :2]
    np.testing.assert_allclose(matrices(change(combined, shape), roles), best, atol=1e-4)
    assert combine(each, [1, 1, 1], method="svd")["w"].rank == 4


def test_resize_reports_what_it_loses(several):
    shape, roles, (_, factors, _) = several
    smaller, errors = jax.jit(lora.resize, static_argnums=1)(factors, 2)
    before, after = (matrices(x, roles) for x in (numpy_change(factors, roles),
                                                  change(smaller, shape)))  # fmt: skip
    lost = np.linalg.norm(before - after, axis=(1, 2)) / np.linalg.norm(before, axis=(1, 2))
    np.testing.assert_allclose(errors["w"].ravel(), lost, atol=1e-5)
    s = np.linalg.svd(before, compute_uv=False)
    optimal = np.sqrt(np.square(s[:, 2:]).sum(-1) / np.square(s).sum(-1))
    np.testing.assert_allclose(errors["w"].ravel(), optimal, atol=1e-5)
    assert errors["w"].shape == tuple(n for n, r in zip(shape, roles, strict=True) if r == "b")
    larger, none = jax.jit(lora.resize, static_argnums=1)(factors, 6)
    np.testing.assert_allclose(change(larger, shape), numpy_change(factors, roles), atol=1e-4)
    assert larger["w"].rank == 6
    np.testing.assert_allclose(none["w"], 0, atol=1e-6)


def test_scale_and_subtract(several):
    shape, roles, (f, g, _) = several
    deltas = numpy_change(f, roles), numpy_change(g, roles)
    np.testing.assert_allclose(change(lora.scale(f, -2.5), shape), -2.5 * deltas[0], atol=1e-4)
    np.testing.assert_allclose(change(lora.subtract(f, g), shape), deltas[0] - deltas[1], atol=1e-4)
    scaled = jax.jit(lora.scale)(f, jnp.asarray(0.3))
    np.testing.assert_allclose(change(scaled, shape), 0.3 * deltas[0], atol=1e-4)
    assert scaled["w"].scale == f["w"].scale


def test_methods_on_factors_and_on_changes_with_everything_kept(getkey):
    """Density 1: "ties" is a mean of those that agree, "dare" and "prune" are "linear"."""
    shape, roles, axes = (3, 9, 7), "bco", lora.Axes(batch=(0,), contract=(1,), out=(2,))
    each = [adapter(getkey, shape, axes, 3, alpha) for alpha in (2.0, 5.0)]
    weights, key = (0.5, -0.8), getkey()
    roots = [np.sqrt(abs(w * f["w"].scale)) for w, f in zip(weights, each, strict=True)]
    a = roots[0] * np.float64(each[0]["w"].a) - roots[1] * np.float64(each[1]["w"].a)
    b = roots[0] * np.float64(each[0]["w"].b) + roots[1] * np.float64(each[1]["w"].b)
    linear = low_rank_sum(a, b, roles, 1.0)
    for method, options in [
        ("linear", {}),
        ("magnitude_prune", {"density": 1.0}),
        ("dare_linear", {"density": 1.0, "key": key}),
        ("dare", {"density": 1.0, "key": key}),
    ]:
        combined = combine(each, weights, method=method, **options)
        np.testing.assert_allclose(change(combined, shape), linear, atol=1e-4)
    total = sum(w * numpy_change(f, roles) for w, f in zip(weights, each, strict=True))
    full = {"rank": 7, "density": 1.0}
    for method, options in [
        ("magnitude_prune_svd", full),
        ("dare_linear_svd", full | {"key": key}),
    ]:
        combined = combine(each, weights, method=method, **options)
        np.testing.assert_allclose(change(combined, shape), total, atol=1e-4)
    signs = [np.sign(numpy_change(f, roles)) for f in each]
    majority = np.where(sum(numpy_change(f, roles) for f in each) >= 0, 1, -1)
    votes = sum((s == majority).astype(int) for s in signs)
    elected = sum(
        w * numpy_change(f, roles) * (s == majority)
        for w, f, s in zip(weights, each, signs, strict=True)
    )
    combined = lora.combine(each, weights, method="ties_svd", **full)
    np.testing.assert_allclose(change(combined, shape), elected / np.maximum(votes, 1), atol=1e-4)


def test_ties_by_hand():
    """Three task vectors, two entries of each kept (density 0.5), worked on paper.

    Kept:     (0, 4, -3, 0), (0, -5, -1, 0), (2, 0, 0, 6).
    Sums:      2, -1, -4, 6, so the majority is +, -, -, +.
    Agreeing: {2}, {-5}, {-3, -1}, {6}, with the weights 1, 2, 1.
    """
    vectors = jnp.array([[1.0, 4, -3, 0.5], [0.2, -5, -1, 0.1], [2.0, 0.3, 1, 6]])
    merged = task_vectors.merge("ties", vectors, jnp.array([1.0, 2, 1]), 0.5, "total", None)
    np.testing.assert_allclose(merged, [2, -10, (-3 - 2) / 2, 6])
    # By frequency: the second entry has one + and one -, and plus is taken.
    merged = task_vectors.merge("ties", vectors, jnp.array([1.0, 2, 1]), 0.5, "frequency", None)
    np.testing.assert_allclose(merged, [2, 4, (-3 - 2) / 2, 6])


def test_dare_by_hand(monkeypatch):
    """Of (1, 2, 3, 4) and (4, 3, 2, 1) those marked are kept and doubled, then weighted 1 and -1."""
    kept = iter([np.array([1, 0, 1, 0]) > 0, np.array([0, 0, 1, 1]) > 0])
    monkeypatch.setattr(jax.random, "bernoulli", lambda key, p, shape: next(kept))
    vectors = jnp.array([[1.0, 2, 3, 4], [4.0, 3, 2, 1]])
    weights, key = jnp.array([1.0, -1]), jax.random.key(0)
    merged = task_vectors.merge("dare_linear", vectors, weights, 0.5, "total", key)
    np.testing.assert_allclose(merged, [2, 0, 6 - 4, -2])


def test_dare_keeps_the_mean_and_draws_by_path(getkey):
    params = {name: jnp.zeros((40, 50)) for name in "vw"}
    rule = lora.Full(".*")
    ones = jax.tree.map(jnp.ones_like, lora.init(getkey(), params, [rule]))
    combined = lora.combine([ones], [1.0], method="dare_linear", density=0.25, key=getkey())
    v, w = (np.asarray(combined[name].delta) for name in "vw")
    assert set(np.unique(v)) == {0.0, 4.0}
    assert abs(v.mean() - 1) < 0.2  # five deviations
    assert (v != w).any()
    again = lora.combine([{"w": ones["w"], "v": None}], [1.0], method="dare_linear", density=0.25,
                         key=jax.random.key(1))  # fmt: skip
    alone = lora.combine([ones], [1.0], method="dare_linear", density=0.25, key=jax.random.key(1))
    np.testing.assert_array_equal(again["w"].delta, alone["w"].delta)


def test_full_changes_are_task_vectors(getkey):
    params = {"w": jnp.zeros((4, 5)), "b": jnp.zeros(5)}
    f, g = (
        jax.tree.map(lambda x: jax.random.normal(getkey(), x.shape), tree)
        for tree in [lora.init(getkey(), params, [lora.Full(".*")])] * 2
    )
    for method in ("cat", "svd", "linear"):
        combined = lora.combine([f, g], [0.5, -2.0], method=method)
        wanted = 0.5 * np.float64(f["b"].delta) - 2 * np.float64(g["b"].delta)
        np.testing.assert_allclose(combined["b"].delta, wanted, atol=1e-6)
    pruned = lora.combine([f], [1.0], method="magnitude_prune_svd", density=0.5)["w"].delta
    kept = np.abs(f["w"].delta) >= np.sort(np.abs(f["w"].delta).ravel())[10]
    np.testing.assert_allclose(pruned, np.where(kept, f["w"].delta, 0), rtol=1e-6)
    np.testing.assert_allclose(lora.scale(f, 0.5)["b"].delta, 0.5 * f["b"].delta, rtol=1e-6)
    same, errors = lora.resize(f, 3)
    assert same["w"].delta is f["w"].delta
    assert errors == {}


def test_leaves_that_some_adapt_and_starts(getkey):
    """Where one adapter has nothing, the other is all there is; PiSSA's start is part of ΔW."""
    params = {"v": jax.random.normal(getkey(), (6, 5)), "w": jax.random.normal(getkey(), (6, 5))}
    pissa = lora.init(getkey(), params, [lora.LoRA(".*", rank=2, alpha=3, init="pissa")])
    pissa = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(getkey(), x.shape), pissa)
    plain = lora.init(getkey(), params, [lora.LoRA("w", rank=3, alpha=2)])
    plain = jax.tree.map(lambda x: jax.random.normal(getkey(), x.shape), plain)
    deltas = [
        {n: np.float64(lora.merge(params, f)[n]) - np.float64(params[n]) for n in "vw"}
        for f in (pissa, plain)
    ]
    merged = lora.merge(params, lora.combine([pissa, plain], [0.5, 2.0], method="cat"))
    for name in "vw":
        wanted = np.float64(params[name]) + 0.5 * deltas[0][name] + 2.0 * deltas[1][name]
        np.testing.assert_allclose(merged[name], wanted, atol=1e-5)
    scaled = lora.merge(params, lora.scale(pissa, -2.0))
    np.testing.assert_allclose(scaled["v"], params["v"] - 2 * deltas[0]["v"], atol=1e-5)
    smaller, _ = lora.resize(pissa, 4)
    np.testing.assert_allclose(lora.merge(params, smaller)["v"], lora.merge(params, pissa)["v"],
                               atol=1e-5)  # fmt: skip


def test_half_precision_is_summed_in_float32(getkey):
    f = adapter(getkey, (64, 48), MATRIX, 4, 6.0)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), f)
    twice = lora.combine([half, half], [1.0, 1.0], method="svd", rank=4)
    assert twice["w"].a.dtype == jnp.bfloat16
    wanted = 2 * numpy_change(half, "co")
    assert np.abs(change(twice, (64, 48)) - wanted).max() < 0.02 * np.abs(wanted).max()


def test_weights_and_amounts_may_be_traced(getkey):
    """The weights of a mixture are learned through `combine` and `wrap`."""
    params, x = {"w": jax.random.normal(getkey(), (6, 5))}, jax.random.normal(getkey(), (3, 6))
    each = [adapter(getkey, (6, 5), MATRIX, 2, 3.0) for _ in range(2)]
    apply = lora.wrap(lambda params, x: x @ params["w"])

    def loss(weights):
        return jnp.sum(apply(params, lora.combine(each, weights, method="cat"), x))

    gradient = jax.jit(jax.grad(loss))(jnp.array([0.3, 0.6]))
    wanted = [np.sum(np.float64(x) @ numpy_change(f, "co")) for f in each]
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4)


@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
def test_nothing_dense_is_formed(getkey, method):
    """1,000 × 800: neither an array nor a product of that size."""
    each = [adapter(getkey, (1000, 800), MATRIX, 4, 6.0) for _ in range(2)]
    jaxpr = jax.make_jaxpr(lambda each: lora.combine(each, [1.0, 2.0], method=method))(each)
    check_thin(jaxpr)
    check_thin(jax.make_jaxpr(lambda f: lora.resize(f, 2))(each[0]))


def check_thin(jaxpr):
    inner = [v for eqn in jaxpr.eqns for v in eqn.params.values() if hasattr(v, "eqns")]
    assert all(var.aval.size <= 1000 * 8 for eqn in jaxpr.eqns for var in eqn.outvars)
    assert count_flops(jaxpr) <= 2 * 2 * 1800 * 8 * 8
    for jaxpr in inner:
        check_thin(jaxpr)


def test_compare(getkey):
    """Norms, ranks and angles of changes that are known: orthogonal, opposite, of equal values."""
    axes = lora.Axes(batch=(0,), contract=(1,), out=(2,))
    params = {"v": jnp.zeros((2, 9, 7)), "w": jnp.zeros((9, 7)), "b": jnp.zeros(7)}
    rules = [lora.LoRA("v", rank=2, alpha=3, axes=axes), lora.LoRA("w", rank=2, alpha=3)]
    f = lora.init(getkey(), params, [*rules, lora.Full("b")])
    random = lambda tree: jax.tree.map(lambda x: jax.random.normal(getkey(), x.shape), tree)
    f, g = random(f), random(f)
    comparison = lora.compare(f, g)
    assert [row.path for row in comparison.rows] == ["b", "v[0]", "v[1]", "w"]
    rows = {row.path: row for row in comparison.rows}
    pairs = {"w": [numpy_change(t, "co") for t in (f, g)],
             "v[1]": [numpy_change({"w": t["v"]}, "bco")[1] for t in (f, g)]}  # fmt: skip
    for path, deltas in pairs.items():
        row, (df, dg) = rows[path], deltas
        np.testing.assert_allclose(row.norms, [np.linalg.norm(df), np.linalg.norm(dg)], rtol=1e-4)
        np.testing.assert_allclose(row.inner, np.sum(df * dg), rtol=1e-3, atol=1e-3)
        s = np.linalg.svd(df, compute_uv=False)[:2]
        shares = s / s.sum()
        entropy = -np.sum(shares * np.log(shares))
        np.testing.assert_allclose(row.effective_ranks[0], np.exp(entropy), rtol=1e-4)
        u, p = (np.linalg.svd(d)[0][:, :2] for d in deltas)
        np.testing.assert_allclose(row.overlap_in, np.square(u.T @ p).sum() / 2, rtol=1e-3)
        v, q = (np.linalg.svd(d)[2][:2] for d in deltas)
        np.testing.assert_allclose(row.overlap_out, np.square(v @ q.T).sum() / 2, rtol=1e-3)
    db = [np.float64(t["b"].delta) for t in (f, g)]
    np.testing.assert_allclose(rows["b"].inner, db[0] @ db[1], rtol=1e-5)
    assert np.isnan(rows["b"].overlap_in)

    opposite = lora.compare(f, lora.scale(f, -2.0))
    np.testing.assert_allclose(opposite.cosine, -1, rtol=1e-5)
    np.testing.assert_allclose(opposite.norms[1], 2 * opposite.norms[0], rtol=1e-5)
    np.testing.assert_allclose([row.overlap_in for row in opposite.rows[1:]], 1, rtol=1e-4)
    nothing = lora.compare(f, {"v": None, "w": None, "b": None})
    assert nothing.norms[1] == 0
    assert np.isnan(nothing.cosine)


def test_comparison_as_table_and_picture(getkey, tmp_path):
    f, g = (adapter(getkey, (9, 7), MATRIX, r, 3.0) for r in (2, 3))
    comparison = lora.compare(f, g)
    lines = str(comparison).splitlines()
    assert lines[0].split() == ["path", "norm", "f", "norm", "g", "rank", "f", "rank", "g",
                                "cosine", "in", "out"]  # fmt: skip
    assert lines[2].split()[0] == "w"
    assert lines[3].split()[0] == "all"
    comparison.plot(tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_refusals(getkey):
    f, g = (adapter(getkey, (9, 7), MATRIX, r, 3.0) for r in (2, 3))
    dora = lora.init(getkey(), {"w": jnp.ones((9, 7))}, [lora.DoRA("w", rank=2)])
    full = lora.init(getkey(), {"w": jnp.ones((9, 7))}, [lora.Full("w")])
    other = adapter(getkey, (9, 8), MATRIX, 2, 3.0)
    one, two = [1.0], [1.0, 1.0]
    for call, wanted in [
        (lambda: lora.combine([f, dora], two), "'w' is adapted by DoRA; arithmetic is defined on"),
        (lambda: lora.scale(dora, 2.0), "'w' is adapted by DoRA"),
        (lambda: lora.resize(dora, 2), "'w' is adapted by DoRA"),
        (lambda: lora.compare(f, dora), "'w' is adapted by DoRA"),
        (lambda: lora.subtract(f, full), r"at 'w' the adapters 0 and 1 .*LoRA.*Full"),
        (lambda: lora.combine([f, other], two), r"at 'w' the adapters 0 and 1 .*\(7,\).*\(8,\)"),
        (lambda: lora.combine([f, {"v": f["w"]}], two), "factors 0 have LoRA at 'w', factors 1 have"),
        (lambda: lora.combine([f, {"w": jnp.ones(3)}], two), r"have an array float32\[3\]"),
        (lambda: lora.combine([], []), "list of 0"),
        (lambda: lora.combine(f, one), "got dict"),
        (lambda: lora.combine([f, g], one), r"got \[1\] weights for 2 adapters"),
        (lambda: lora.combine([f], ["x"]), "wanted 1 numbers"),
        (lambda: lora.combine([f], [jnp.nan]), "not all finite"),
        (lambda: lora.combine([f, g], two, method="linear"), r"ranks \[2, 3\] at 'w'"),
        (lambda: lora.combine([f], one, method="slerp"), "method='slerp' is unknown; wanted one of"),
        (lambda: lora.combine([f], one, method="ties"), "density=None"),
        (lambda: lora.combine([f], one, method="ties", density=1.5), "density=1.5"),
        (lambda: lora.combine([f], one, method="cat", density=0.5), "takes no density"),
        (lambda: lora.combine([f], one, method="linear", rank=2), "takes no rank"),
        (lambda: lora.combine([f], one, method="svd", rank=0), "rank=0"),
        (lambda: lora.combine([f], one, method="ties", density=0.5, key=getkey()), "takes no key"),
        (lambda: lora.combine([f], one, method="dare_ties", density=0.5), "key is NoneType"),
        (lambda: lora.combine([f], one, method="ties", density=0.5, majority_sign_method="x"),
         "majority_sign_method='x'"),
        (lambda: lora.scale(f, jnp.inf), "finite"),
        (lambda: lora.scale({"w": jnp.ones(3)}, 2.0), "wanted factors"),
        (lambda: jax.jit(lora.compare)(f, g), "traced"),
    ]:  # fmt: skip
        with pytest.raises(lora.LoraError, match=wanted):
            call()
