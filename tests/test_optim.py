"""`freeze` and `trainable_mask`."""

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
