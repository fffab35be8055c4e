"""How factors start: drawn, or taken from the weight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lora
from lorax_fn.adapters.spectral import randomised_svd

RANK, ALPHA = 3, 7.5
SCALE = ALPHA / RANK


@pytest.fixture
def weight(getkey):
    """Singular values that fall off, as those of trained weights do."""
    u, _, vt = np.linalg.svd(np.asarray(jax.random.normal(getkey(), (12, 9))), full_matrices=False)
    return jnp.asarray(u * 2.0 ** -np.arange(9) @ vt, jnp.float32)


def start(weight, init, **options):
    rule = lora.LoRA("w", rank=RANK, alpha=ALPHA, init=init, **options)
    return lora.init(jax.random.key(3), {"w": weight}, [rule])["w"]


def test_pissa_trains_the_top_singular_triplets(weight):
    node = start(weight, "pissa")
    u, s, vt = np.linalg.svd(np.asarray(weight, np.float64), full_matrices=False)
    top = u[:, :RANK] * s[:RANK] @ vt[:RANK]
    np.testing.assert_allclose(SCALE * node.a @ node.b, top, atol=1e-5)
    # Split evenly between the factors: AᵀA = BBᵀ = S / scale.
    np.testing.assert_allclose(node.a.T @ node.a, np.diag(s[:RANK] / SCALE), atol=1e-5)
    np.testing.assert_allclose(node.b @ node.b.T, np.diag(s[:RANK] / SCALE), atol=1e-5)


def test_fast_pissa_comes_close_to_the_exact_one(weight):
    exact, fast = (start(weight, name) for name in ("pissa", "pissa_niter_4"))
    np.testing.assert_allclose(exact.a @ exact.b, fast.a @ fast.b, atol=1e-5)


def test_the_randomised_svd_needs_few_columns(getkey):
    """40 of 400 columns find the top 30 triplets of a matrix of rank 30."""
    a, b = jax.random.normal(getkey(), (500, 30)), jax.random.normal(getkey(), (30, 400))
    u, s, vt = randomised_svd(getkey(), a @ b, 30, 2)
    assert u.shape == (500, 40)
    exact = np.linalg.svd(np.asarray(a @ b), compute_uv=False)[:30]
    np.testing.assert_allclose(s[:30], exact, rtol=1e-4)
    np.testing.assert_allclose((u * s[None]) @ vt, a @ b, atol=1e-2)


def test_olora_trains_the_first_part_of_a_qr(weight):
    """As PEFT does: W.T = QR in PyTorch's layout, B = Q[:, :r], A = R[:r]."""
    node = start(weight, "olora")
    q, r = np.linalg.qr(np.asarray(weight.T, np.float64))
    np.testing.assert_allclose(node.a @ node.b, (q[:, :RANK] @ r[:RANK]).T, atol=1e-5)
    np.testing.assert_allclose(node.b @ node.b.T, np.eye(RANK), atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_stacks_and_odd_dim_orders_start_matrix_by_matrix(getkey, init):
    stack = jax.random.normal(getkey(), (4, 2, 3, 5))  # out, layers, contract, contract
    axes = {"w": lora.Axes(batch=(1,), contract=(2, 3), out=(0,))}
    rules = [lora.LoRA("w", rank=2, alpha=3, init=init)]
    whole = lora.init(getkey(), {"w": stack}, rules, axes=axes)["w"]
    assert whole.a.shape == (2, 3, 5, 2)
    assert whole.b.shape == (2, 2, 4)
    for layer in range(2):
        matrix = stack[:, layer].reshape(4, 15).T
        one = lora.init(getkey(), {"w": matrix}, rules)["w"]
        ours = whole.a[layer].reshape(15, 2) @ whole.b[layer]
        np.testing.assert_allclose(ours, one.a @ one.b, atol=2e-2 if "niter" in init else 1e-5)


def test_the_base_is_not_touched_and_merging_at_the_start_gives_it_back(weight):
    params = {"w": weight}
    node = start(weight, "pissa")
    np.testing.assert_array_equal(lora.merge(params, {"w": node})["w"], weight)


def test_an_unknown_initialiser_is_refused_with_the_list():
    with pytest.raises(lora.LoraError, match=r"'pisa'.*gaussian.*kaiming.*olora.*pissa"):
        lora.LoRA("w", init="pisa")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_rank_above_what_the_weight_has_is_refused(weight, init):
    with pytest.raises(lora.LoraError, match=r"rank=10 is above 9"):
        lora.init(jax.random.key(0), {"w": weight}, [lora.LoRA("w", rank=10, init=init)])


@pytest.mark.parametrize("rule", [lora.LoRA, lora.DoRA])
def test_a_trained_start_becomes_plain_factors_of_twice_the_rank(getkey, rule):
    axes = lora.Axes(batch=(1,), contract=(2,), out=(0,))
    params = {"w": jax.random.normal(getkey(), (5, 2, 6))}
    rules = [rule("w", rank=2, alpha=3, init="pissa", axes=axes)]
    node = lora.init(getkey(), params, rules)["w"]
    node = dataclasses.replace(node, a=node.a + 0.1, b=node.b * 1.3)
    plain = node.plain()
    assert plain.start is None
    assert (plain.a.shape, plain.b.shape) == ((2, 6, 4), (2, 4, 5))
    merged, wanted = (lora.merge(params, {"w": n})["w"] for n in (plain, node))
    np.testing.assert_allclose(merged, wanted, atol=1e-5)
    assert plain.plain() is plain


def test_factors_with_a_start_can_be_donated(weight):
    """No array stands twice among the factors."""
    factors = {"w": start(weight, "pissa")}
    moved = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(factors)
    assert moved["w"].a.shape == (*weight.shape[:1], RANK)


def test_a_stack_of_weights_with_starts_costs_what_its_layers_cost(getkey):
    """Two terms a layer, each stacked: twice what plain LoRA adds, however many layers."""
    params = {"layers": [jax.random.normal(getkey(), (8, 8)) for _ in range(6)]}

    def stacked(params, x):
        layer = lambda x, w: (jnp.tanh(x @ w), None)
        return jax.lax.scan(layer, x, jnp.stack(params["layers"]))[0]

    def added(init):
        factors = lora.init(getkey(), params, [lora.LoRA(".*", rank=2, alpha=3, init=init)])
        totals = lora.inspect(stacked, params, factors, jnp.ones((5, 8))).totals
        return totals.adapted_flops - totals.base_flops

    assert added("pissa") == 2 * added("kaiming")
