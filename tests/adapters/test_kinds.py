"""What belongs to one kind alone; the battery has what they all have in common."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lora


def made(rule, shape=(12, 10), **options):
    params = {"w": jax.random.normal(jax.random.key(1), shape)}
    return params, lora.init(jax.random.key(0), params, [rule], **options)


def matmul(params, x):
    return x @ params["w"]


# ------------------------------------------------------------------------------------------
# What several share


def test_a_numpy_rank_gives_a_scale_that_does_not_promote():
    for rule in (lora.LoRA, lora.LoHa):
        scale = rule("w", rank=np.int64(4), alpha=6).scale
        assert type(scale) is float
    assert type(lora.LoRA("w", rank=np.int64(4), rslora=True).scale) is float


@pytest.mark.parametrize("rule", [lora.LoRA, lora.LoHa, lora.LoKr])
def test_half_precision_factors_are_multiplied_in_float32(getkey, rule):
    """Merging rounds the sum once: no product of two factors is rounded before."""
    params, factors = made(rule("w", rank=2, alpha=3, dtype=jnp.bfloat16), shape=(24, 24))
    factors = jax.tree.map(lambda x: jax.random.normal(getkey(), x.shape, x.dtype), factors)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), factors)
    merged, wanted = (lora.merge(params, f)["w"] for f in (factors, wide))
    np.testing.assert_allclose(merged, wanted, rtol=1e-6)


@pytest.mark.parametrize("rule", [lora.DoRA("w"), lora.LoRA("w", init="pissa")])
def test_what_starts_from_values_does_not_start_from_shapes(rule):
    """But under eval_shape, where nothing is computed."""
    params = {"w": jax.ShapeDtypeStruct((12, 10), jnp.float32)}
    with pytest.raises(lora.LoraError, match=r"'w' is abstract.*eval_shape"):
        lora.init(jax.random.key(0), params, [rule])
    node = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, [rule]))["w"]
    assert node.a.shape == (12, 8)


# ------------------------------------------------------------------------------------------
# DoRA


def step_flops(rule, rows=512, width=128):
    """FLOPs of a compiled training step of four layers."""
    params = {f"w{i}": jnp.ones((width, width)) for i in range(4)}
    factors = lora.init(jax.random.key(0), params, [rule])

    def model(params, x):
        for i in range(4):
            x = jnp.tanh(x @ params[f"w{i}"])
        return x

    def loss(factors, x):
        return lora.wrap(model, dense="error")(params, factors, x).sum()

    compiled = jax.jit(jax.grad(loss)).lower(factors, jnp.ones((rows, width))).compile()
    return compiled.cost_analysis()["flops"]


def test_a_dora_step_costs_hardly_more_than_a_lora_step():
    assert step_flops(lora.DoRA(".*", rank=8)) <= 1.05 * step_flops(lora.LoRA(".*", rank=8))


def test_dora_forms_no_matrix_of_the_weights_size():
    """But for W itself, which passes through stop_gradient, all values of the step are smaller."""
    params, factors = made(lora.DoRA("w", rank=2), shape=(61, 59))

    def loss(factors, x):
        return lora.wrap(matmul, dense="error")(params, factors, x).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(factors, jnp.ones((3, 61)))
    others = [eqn for eqn in jaxpr.eqns if eqn.primitive.name != "stop_gradient"]
    assert max(var.aval.size for eqn in others for var in eqn.outvars) <= 61 * 3


def test_a_zero_column_is_merged_and_unmerged_as_one():
    params = {"w": jnp.ones((6, 4)).at[:, 2].set(0)}
    factors = lora.init(jax.random.key(0), params, [lora.DoRA("w", rank=2)])
    back = lora.unmerge(lora.merge(params, factors), factors)
    np.testing.assert_allclose(back["w"], params["w"], atol=1e-6)


def test_a_weight_with_a_zero_column_stays_finite():
    params = {"w": jnp.ones((6, 4)).at[:, 2].set(0)}
    factors = lora.init(jax.random.key(0), params, [lora.DoRA("w", rank=2)])
    apply = lora.wrap(matmul)
    x = jnp.ones((3, 6))
    np.testing.assert_array_equal(apply(params, factors, x), matmul(params, x))
    grads = jax.grad(lambda f: apply(params, f, x).sum())(factors)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


def test_dropout_of_dora_leaves_the_base_product_alone():
    """One key, no second base product: with B zero nothing changes."""
    params, factors = made(lora.DoRA("w", rank=2, dropout=0.5))
    x, key = jnp.ones((3, 12)), jax.random.key(5)
    apply = lora.wrap(matmul)
    np.testing.assert_array_equal(
        apply(params, factors, x, lora_key=key), apply(params, factors, x)
    )
    text = str(jax.make_jaxpr(lambda f: apply(params, f, x, lora_key=key))(factors))
    plain = str(jax.make_jaxpr(lambda f: apply(params, f, x))(factors))
    assert text.count("dot_general") == plain.count("dot_general")


# ------------------------------------------------------------------------------------------
# VeRA


def test_vera_shares_its_projections_between_equal_shapes_and_seeds():
    params = {"q": jnp.ones((8, 6)), "v": jnp.ones((8, 6))}
    first = lora.init(jax.random.key(0), params, [lora.VeRA(".*", rank=5)])
    other_key = lora.init(jax.random.key(1), params, [lora.VeRA(".*", rank=5)])
    other_seed = lora.init(jax.random.key(0), params, [lora.VeRA(".*", rank=5, seed=1)])
    np.testing.assert_array_equal(first["q"].a, first["v"].a)
    np.testing.assert_array_equal(first["q"].b, other_key["v"].b)
    assert not np.array_equal(first["q"].a, other_seed["q"].a)


def test_vera_shares_its_projections_between_the_layers_of_a_stack():
    _, factors = made(lora.VeRA("w", rank=5), (4, 8, 6), axes={"w": lora.Axes((0,), (1,), (2,))})
    node = factors["w"]
    assert (node.a.shape, node.b.shape) == ((8, 5), (5, 6))
    assert (node.d.shape, node.g.shape) == ((4, 5), (4, 6))


# ------------------------------------------------------------------------------------------
# LoKr


def test_lokr_with_a_low_rank_right_part_is_the_kronecker_product():
    params, factors = made(lora.LoKr("w", rank=2, alpha=3), shape=(64, 36))
    node = factors["w"]
    assert (node.left.shape, node.a.shape, node.b.shape) == ((8, 6), (8, 2), (2, 6))
    keys = iter(jax.random.split(jax.random.key(2), 3))
    node = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), node)
    wanted = params["w"] + 1.5 * jnp.kron(node.left, node.a @ node.b)
    np.testing.assert_allclose(lora.merge(params, {"w": node})["w"], wanted, atol=1e-4)
    x = jax.random.normal(jax.random.key(3), (5, 64))
    adapted = lora.wrap(matmul, dense="error")(params, {"w": node}, x)
    np.testing.assert_allclose(adapted, x @ wanted, atol=1e-3)


@pytest.mark.parametrize(
    ("length", "factor", "wanted"),
    # The table in the docstring of `factorization` in PEFT's LyCORIS utilities.
    [
        (127, -1, (1, 127)), (128, -1, (8, 16)), (250, -1, (10, 25)), (360, -1, (18, 20)),
        (512, -1, (16, 32)), (1024, -1, (32, 32)), (128, 4, (4, 32)), (250, 4, (2, 125)),
        (360, 8, (8, 45)), (512, 16, (16, 32)), (127, 16, (1, 127)), (250, 16, (10, 25)),
    ],
)  # fmt: skip
def test_dims_are_split_as_peft_splits_them(length, factor, wanted):
    _, factors = made(lora.LoKr("w", rank=99, factor=factor), shape=(length, length))
    node = factors["w"]
    assert (node.left.shape[0], node.right.shape[0]) == wanted


def test_lokr_costs_less_than_the_dense_product():
    params, factors = made(lora.LoKr("w", rank=4), shape=(256, 256))
    report = lora.inspect(matmul, params, factors, jnp.ones((64, 256)))
    assert report.dense == []
    assert report.totals.adapted_flops < 1.2 * report.totals.base_flops


# ------------------------------------------------------------------------------------------
# Trainable tokens


def test_only_the_rows_of_the_tokens_change():
    params, factors = made(lora.TrainableTokens("w", tokens=[7, 2]))
    node = dataclasses.replace(factors["w"], rows=jnp.arange(20.0).reshape(2, 10) + 1)
    merged = lora.merge(params, {"w": node})["w"]
    wanted = params["w"].at[jnp.array([7, 2])].add(node.rows)
    np.testing.assert_allclose(merged, wanted, rtol=1e-6)

    def tied(params, ids):
        return params["w"][ids] @ params["w"].T

    ids = jnp.array([2, 0, 7])
    adapted = lora.wrap(tied, dense="error")(params, {"w": node}, ids)
    np.testing.assert_allclose(adapted, tied({"w": wanted}, ids), rtol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [([], "at least one"), ([1, 1], "distinct"), ([-1], "from 0"), (["a"], "sequence of row")],
)
def test_tokens_that_are_no_rows_are_refused(tokens, wanted):
    with pytest.raises(lora.LoraError, match=wanted):
        lora.TrainableTokens("w", tokens=tokens)


def test_a_token_beyond_the_table_is_refused():
    with pytest.raises(lora.LoraError, match=r"token 12 is beyond the 12 rows of 'w'"):
        made(lora.TrainableTokens("w", tokens=[12]))


# ------------------------------------------------------------------------------------------
# AdaLoRA


def budgeted(target_rank=2, **options):
    settings = {"total_steps": 10, "warmup": 2, "final_steps": 3} | options
    return lora.RankBudget(target_rank, **settings)


def test_the_penalty_is_zero_for_orthonormal_factors_alone(getkey):
    _, factors = made(lora.AdaLoRA("w", rank=4))
    q = jnp.linalg.qr(jax.random.normal(getkey(), (12, 4)))[0]
    node = dataclasses.replace(factors["w"], a=q, b=q[:10].T)
    b = np.asarray(node.b, np.float64)
    wanted = np.linalg.norm(b @ b.T - np.eye(4)) / 2
    np.testing.assert_allclose(lora.orthogonality({"w": node}), wanted, rtol=1e-4)


def test_the_budget_keeps_the_most_important_triplets(getkey):
    """Scores by the paper's formulas: S = |w·g| averaged, times its averaged deviation."""
    params = {"w": jnp.ones((12, 10)), "v": jnp.ones((6, 5))}
    factors = lora.init(getkey(), params, [lora.AdaLoRA(".*", rank=4)])
    factors = jax.tree.map(lambda leaf: jax.random.normal(getkey(), leaf.shape), factors)
    budget = budgeted(target_rank=2, total_steps=2, warmup=0, final_steps=1)
    state = budget.init(factors)
    grads = [
        jax.tree.map(lambda leaf: jax.random.normal(getkey(), leaf.shape), factors)
        for _ in range(2)
    ]
    mean = spread = None
    before = factors
    for grad in grads:
        now = jax.tree.map(lambda w, g: np.abs(w * g), factors, grad)
        zero = jax.tree.map(np.zeros_like, now)
        mean = jax.tree.map(lambda m, n: 0.85 * m + 0.15 * n, mean or zero, now)
        spread = jax.tree.map(
            lambda s, n, m: 0.85 * s + 0.15 * np.abs(n - m), spread or zero, now, mean
        )
        factors, state = jax.jit(budget.update)(factors, grad, state)
    score = jax.tree.map(lambda m, s: m * s, mean, spread)
    scores = {name: node.a.mean(0) + node.e + node.b.mean(1) for name, node in score.items()}
    threshold = np.sort(np.concatenate(list(scores.values())))[-4]  # 2 matrices × 2 triplets
    for name, node in factors.items():
        kept = scores[name] >= threshold
        np.testing.assert_array_equal(node.e, np.where(kept, before[name].e, 0))
        np.testing.assert_array_equal(node.a, before[name].a)
    assert int(state.step) == 2


def test_the_budget_falls_along_a_cubic(getkey):
    _, factors = made(lora.AdaLoRA("w", rank=8))
    factors = jax.tree.map(lambda leaf: jax.random.normal(getkey(), leaf.shape), factors)
    budget, kept = budgeted(), []
    state = budget.init(factors)
    for _ in range(11):
        thinned, state = budget.update(factors, factors, state)
        kept.append(int((thinned["w"].e != 0).sum()))
    wanted = [2 + 6 * (1 - min(max(step - 2, 0) / 5, 1)) ** 3 for step in range(11)]
    assert kept == [int(n) for n in wanted]


def test_a_gradient_that_is_not_finite_leaves_the_budget_as_it_was(getkey):
    _, factors = made(lora.AdaLoRA("w", rank=4))
    factors = jax.tree.map(lambda leaf: jax.random.normal(getkey(), leaf.shape), factors)
    budget = budgeted(total_steps=100, warmup=90)
    bad = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan).at[1].set(jnp.inf), factors)
    _, state = budget.update(factors, bad, budget.init(factors))
    thinned, state = budget.update(factors, factors, state)
    np.testing.assert_array_equal(thinned["w"].e, factors["w"].e)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: budgeted(total_steps=5), "leave nothing of total_steps=5"),
        (lambda: budgeted(beta1=1.0), "beta1=1.0"),
        (lambda: budgeted().init(made(lora.LoRA("w"))[1]), "no AdaLoRA node"),
        (lambda: lora.orthogonality(made(lora.LoRA("w"))[1]), "no AdaLoRA node"),
        (lambda: lora.IA3("w", on="both"), "'out' or 'in'"),
        (lambda: lora.VeRA("w", d_initial=float("inf")), "d_initial=inf"),
        (lambda: lora.VeRA("w", d_initial="0.1"), "d_initial='0.1'"),
        (lambda: budgeted(total_steps="9"), "total_steps='9'; wanted an integer"),
        (lambda: lora.LoKr("w", factor=0), "factor=0"),
        (lambda: lora.LoHa("w", rank=0), "rank=0 is below 1"),
        (lambda: made(lora.LoHa("w", rank=11)), "rank=11 is above 10"),
        (lambda: made(lora.DoRA("w", rank=2), shape=(3, 4, 5)), "infer_axes"),
        (lambda: made(lora.VeRA("w"), shape=(4,)), "two dims"),
    ],
)
def test_misuse_is_refused(make, wanted):
    with pytest.raises(lora.LoraError, match=wanted):
        make()
