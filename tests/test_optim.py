"""`freeze` and `trainable_mask`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import lorax_fn as lora


@pytest.fixture(autouse=True)
def promotion(promotion):
    """Optax's own arithmetic promotes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def trees(getkey):
    params = {"w": jax.random.normal(getkey(), (30, 20)), "b": jnp.ones(20)}
    rules = [lora.LoRA("w", rank=2, alpha=6), lora.Full("b")]
    return params, lora.init(getkey(), params, rules)


def loss(trees):
    wrapped = lora.wrap(lambda params, x: x @ params["w"] + params["b"][None])
    return (wrapped(trees["params"], trees["lora"], jnp.ones((4, 30))) ** 2).sum()


def test_mask_is_true_at_adapters_only(trees):
    params, factors = trees
    mask = lora.trainable_mask({"params": params, "lora": factors})
    assert mask["params"] == {"w": False, "b": False}
    assert jax.tree.leaves(mask["lora"]) == [True, True, True]


def test_only_adapters_have_optimiser_state(trees):
    params, factors = trees
    state = lora.freeze(optax.adamw(1e-3)).init({"params": params, "lora": factors})
    held = sum(leaf.size for leaf in jax.tree.leaves(state))
    adapters = sum(leaf.size for leaf in jax.tree.leaves(factors))
    assert held == 2 * adapters + 1  # two moments, a step count


@pytest.mark.parametrize("optimiser", [optax.adamw(1e-2, weight_decay=0.1), optax.sgd(1e-5)])
def test_frozen_leaves_never_move_and_adapters_do(trees, optimiser):
    params, factors = trees
    both = {"params": params, "lora": factors}
    tx = lora.freeze(optimiser)
    state = tx.init(both)
    trained = both
    for _ in range(3):
        updates, state = tx.update(jax.grad(loss)(trained), state, trained)
        trained = optax.apply_updates(trained, updates)
    jax.tree.map(np.testing.assert_array_equal, trained["params"], params)
    assert loss(trained) < loss(both)


def test_trains_like_the_bare_optimiser_on_factors_alone(trees):
    params, factors = trees

    def grads(factors):
        return jax.grad(lambda f: loss({"params": params, "lora": f}))(factors)

    results = []
    for tx in (optax.adam(1e-2), lora.freeze(optax.adam(1e-2))):
        updates, _ = tx.update(grads(factors), tx.init(factors), factors)
        results.append(updates)
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_works_in_a_train_state_under_jit(trees):
    params, factors = trees
    state = TrainState.create(
        apply_fn=loss,
        params={"params": params, "lora": factors},
        tx=lora.freeze(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))),
    )
    step = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params)))
    after = step(step(state))
    jax.tree.map(np.testing.assert_array_equal, after.params["params"], params)
    assert loss(after.params) < loss(state.params)


def stacked_factors(getkey, **options):
    """A matrix and a stack of three, their factors all random."""
    params = {"w": jnp.ones((9, 7)), "stack": jnp.ones((3, 5, 4))}
    axes = {"w": lora.Axes((), (0,), (1,)), "stack": lora.Axes((0,), (1,), (2,))}
    rules = [lora.LoRA(["w", "stack"], rank=2, alpha=3, **options)]
    factors = lora.init(getkey(), params, rules, axes=axes)
    return jax.tree.map(lambda leaf: jax.random.normal(getkey(), leaf.shape), factors)


def test_labels_name_the_fields_and_serve_optax_partition(trees):
    params, factors = trees
    both = {"params": params, "lora": factors}
    labels = lora.param_labels(both)
    assert labels["params"] == {"w": "frozen", "b": "frozen"}
    assert (labels["lora"]["w"].a, labels["lora"]["w"].b) == ("a", "b")
    assert labels["lora"]["b"].delta == "delta"

    transforms = {"a": optax.sgd(1.0), "b": optax.sgd(3.0), "delta": optax.set_to_zero()}
    tx = optax.partition(transforms | {"frozen": optax.set_to_zero()}, lora.param_labels)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, both), tx.init(both), both)
    assert {float(u) for u in updates["lora"]["w"].a.ravel()} == {-1.0}
    assert {float(u) for u in updates["lora"]["w"].b.ravel()} == {-3.0}
    assert not jnp.any(updates["lora"]["b"].delta)
    assert not jnp.any(updates["params"]["w"])


def test_labels_tell_the_frozen_parts_of_a_node(getkey):
    factors = stacked_factors(getkey, freeze_a=True)
    labels = lora.param_labels(factors)
    assert (labels["w"].a, labels["w"].b) == ("frozen", "b")


@pytest.mark.parametrize("optimiser", [optax.sgd(0.1), optax.adamw(0.1, weight_decay=0.3)])
def test_lora_plus_multiplies_the_updates_of_b_alone(getkey, optimiser):
    factors = stacked_factors(getkey)
    grads = jax.tree.map(lambda leaf: jax.random.normal(getkey(), leaf.shape), factors)
    plain, plus = (
        tx.update(grads, tx.init(factors), factors)[0]
        for tx in (lora.freeze(optimiser), lora.freeze(lora.lora_plus(optimiser, ratio=5.0)))
    )
    for name in factors:
        np.testing.assert_array_equal(plain[name].a, plus[name].a)
        np.testing.assert_allclose(5 * plain[name].b, plus[name].b, rtol=1e-6)


def test_preconditioning_is_the_papers_formula(getkey):
    factors, delta = stacked_factors(getkey), 0.01
    grads = jax.tree.map(lambda leaf: jax.random.normal(getkey(), leaf.shape), factors)
    tx = lora.freeze(lora.precondition(delta))
    updates, _ = jax.jit(tx.update)(grads, tx.init(factors), factors)
    for name in factors:
        a, b = (np.asarray(x, np.float64) for x in (factors[name].a, factors[name].b))
        g_a, g_b = (np.asarray(x, np.float64) for x in (grads[name].a, grads[name].b))
        eye = delta * np.eye(2)
        wanted_a = g_a @ np.linalg.inv(b @ b.swapaxes(-1, -2) + eye)
        wanted_b = np.linalg.inv(a.swapaxes(-1, -2) @ a + eye) @ g_b
        np.testing.assert_allclose(updates[name].a, wanted_a, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(updates[name].b, wanted_b, rtol=1e-3, atol=1e-4)


def test_preconditioned_steps_do_not_depend_on_how_the_product_is_split(getkey):
    """What the method is for: A·c, B/c is the same point, and moves the same way."""
    tx = lora.precondition(1e-9)

    def moved(factors):
        grads = jax.grad(lambda f: jnp.square(f["w"].a @ f["w"].b - 1).sum())({"w": factors})
        updates, _ = tx.update(grads, tx.init({"w": factors}), {"w": factors})
        after = optax.apply_updates(factors, jax.tree.map(lambda u: -0.1 * u, updates["w"]))
        return after.a @ after.b

    node = stacked_factors(getkey)["w"]
    rescaled = dataclasses.replace(node, a=node.a * 4, b=node.b / 4)
    np.testing.assert_allclose(moved(node), moved(rescaled), rtol=1e-3, atol=1e-3)


def test_preconditioning_with_a_frozen_a_stands_outside_of_freeze(getkey):
    factors = stacked_factors(getkey, freeze_a=True)
    grads = jax.tree.map(jnp.ones_like, factors)
    inside = lora.freeze(optax.chain(lora.precondition(), optax.sgd(1.0)))
    with pytest.raises(lora.LoraError, match=r"sees no a: lora.freeze hides .*optax.chain"):
        inside.update(grads, inside.init(factors), factors)
    outside = optax.chain(lora.precondition(), lora.freeze(optax.sgd(1.0)))
    updates, _ = outside.update(grads, outside.init(factors), factors)
    assert not jnp.any(updates["w"].a)
    assert jnp.all(updates["w"].b != -1)


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: lora.lora_plus(optax.sgd(1.0), ratio=0), r"ratio=0.*16"),
        (lambda: lora.lora_plus(optax.sgd), r"lora_plus got .*optax\.adamw\(1e-4\)"),
        (lambda: lora.freeze(optax.adam), r"freeze got .*optax\.adamw\(1e-4\)"),
        (lambda: lora.lora_plus(optax.sgd(1.0), ratio=float("nan")), r"ratio=nan"),
        (lambda: lora.precondition(-1e-3), r"delta=-0.001.*1e-6"),
    ],
)
def test_settings_out_of_range_are_refused(make, wanted):
    with pytest.raises(lora.LoraError, match=wanted):
        make()


def test_preconditioning_asks_for_the_factors(getkey):
    factors = stacked_factors(getkey)
    tx = lora.precondition()
    with pytest.raises(lora.LoraError, match="needs the factors"):
        tx.update(factors, tx.init(factors))


def test_preconditioning_stands_outside_of_a_partition(getkey):
    factors = stacked_factors(getkey)
    grads = jax.tree.map(jnp.ones_like, factors)
    parts = {"a": optax.chain(lora.precondition(), optax.sgd(1.0)), "b": optax.sgd(1.0)}
    tx = optax.partition(parts, lora.param_labels)
    with pytest.raises(lora.LoraError, match=r"sees no b: .*optax.partition"):
        tx.update(grads, tx.init(factors), factors)
