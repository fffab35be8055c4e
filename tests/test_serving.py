"""Many adapters of one base as one pytree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_fn as lora
from lorax_fn.adapters import is_adapter


@pytest.fixture
def params(getkey):
    return {"w": jax.random.normal(getkey(), (12, 10)), "v": jax.random.normal(getkey(), (10, 12))}


def apply_fn(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


apply = lora.wrap(apply_fn, dense="error")

KINDS = {
    "LoRA": lambda r: lora.LoRA(".*", rank=r, alpha=r + 3),
    "PiSSA": lambda r: lora.LoRA(".*", rank=r, alpha=r + 3, init="pissa"),
    "DoRA": lambda r: lora.DoRA(".*", rank=r, alpha=r + 3),
    "VeRA": lambda r: lora.VeRA(".*", rank=r),
    "LoHa": lambda r: lora.LoHa(".*", rank=r, alpha=r + 3),
    "LoKr": lambda r: lora.LoKr(".*", rank=4, alpha=r + 3, factor=2),
    "AdaLoRA": lambda r: lora.AdaLoRA(".*", rank=r, alpha=r + 3),
    "IA3": lambda r: lora.IA3(".*"),
    "Full": lambda r: lora.Full(".*"),
}


def moved(getkey, params, rule):
    factors = lora.init(getkey(), params, [rule])
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(getkey(), x.shape), factors)


@pytest.mark.parametrize("kind", KINDS)
def test_each_adapter_answers_as_it_does_alone(getkey, params, kind):
    """Of three ranks and three scales."""
    each = [moved(getkey, params, KINDS[kind](rank)) for rank in (1, 3, 2)]
    xs = jax.random.normal(getkey(), (3, 5, 12))
    stacked = lora.stack(each)
    together = jax.vmap(lambda f, x: apply(params, f, x))(stacked, xs)
    pick = jax.jit(lambda i, x: apply(params, lora.take(stacked, i), x))
    for i, (factors, x) in enumerate(zip(each, xs, strict=True)):
        wanted = apply(params, factors, x)
        np.testing.assert_allclose(together[i], wanted, atol=1e-5)
        np.testing.assert_allclose(pick(jnp.asarray(i), x), wanted, atol=1e-5)
        np.testing.assert_allclose(apply(params, lora.take(stacked, i), x), wanted, atol=1e-5)


def test_training_together_is_training_alone(getkey, params):
    """Each with its own rank, data and learning rate; padded columns stay zero."""
    rules = [lora.LoRA(".*", rank=r, alpha=1.5 * r) for r in (2, 4, 1)]
    each = [lora.init(getkey(), params, [rule]) for rule in rules]
    rates = jnp.array([1e-2, 3e-2, 1e-1])
    xs, ys = jax.random.normal(getkey(), (2, 3, 6, 12))

    def train(factors, rate, x, y):
        tx = lora.freeze(optax.adam(1.0))

        def step(carry, _):
            factors, state = carry
            loss = lambda f: jnp.mean((apply(params, f, x) - y) ** 2)
            value, grads = jax.value_and_grad(loss)(factors)
            with jax.numpy_dtype_promotion("standard"):
                updates, state = tx.update(grads, state, factors)
            updates = jax.tree.map(lambda u: rate * u, updates)
            return (optax.apply_updates(factors, updates), state), value

        (factors, _), losses = jax.lax.scan(step, (factors, tx.init(factors)), length=8)
        return factors, losses

    together, losses = jax.jit(jax.vmap(train))(lora.stack(each), rates, xs, ys)
    for i, factors in enumerate(each):
        alone, wanted = train(factors, rates[i], xs[i], ys[i])
        np.testing.assert_allclose(losses[i], wanted, rtol=1e-4)
        rank = rules[i].rank
        for name in params:
            np.testing.assert_allclose(together[name].b[i, :rank], alone[name].b, atol=1e-4)
            assert not together[name].a[i, :, rank:].any()
            assert not together[name].b[i, rank:].any()


def test_the_base_is_multiplied_once_with_all_data(getkey, params):
    stacked = lora.stack([moved(getkey, params, KINDS["LoRA"](2)) for _ in range(4)])
    xs = jnp.ones((4, 5, 12))
    jaxpr = jax.make_jaxpr(jax.vmap(lambda f, x: apply(params, f, x)))(stacked, xs)
    products = [eqn for eqn in jaxpr.eqns if "dot" in eqn.primitive.name]
    with_base = [e for e in products if (12, 10) in [v.aval.shape for v in e.invars]]
    assert len(with_base) == 1


def test_a_shared_scale_stays_and_others_are_folded(getkey, params):
    same = lora.stack([moved(getkey, params, lora.LoRA("w", rank=r, alpha=3 * r)) for r in (1, 2)])
    other = lora.stack([moved(getkey, params, lora.LoRA("w", rank=r, alpha=3)) for r in (1, 2)])
    assert (same["w"].scale, other["w"].scale) == (3.0, 1.0)


def test_what_cannot_be_stacked_is_named(getkey, params):
    one = moved(getkey, params, lora.LoRA("w", rank=2))
    both = moved(getkey, params, lora.LoRA(".*", rank=2))
    dora = moved(getkey, params, lora.DoRA("w", rank=2))
    dropped = moved(getkey, params, lora.LoRA("w", rank=2, dropout=0.1))
    wider = moved(getkey, {**params, "w": jnp.ones((12, 20))}, lora.LoRA("w", rank=2))
    kron = [moved(getkey, params, lora.LoKr("w", rank=2, factor=f)) for f in (2, 4)]
    for adapters, wanted in [
        ([one, both], r"factors 0 have nothing at 'v', factors 1 have LoRA"),
        ([one, dora], r"have LoRA at 'w', factors 1 have DoRA"),
        ([one, dropped], r"factors 0 and 1 at 'w' differ in dropout \(0\.0, 0\.1\);"),
        ([one, wider], r"at 'w' have arrays of shape \[2, 10\] and \[2, 20\]"),
        (kron, r"at 'w' "),
        ([], r"list of 0; wanted a list"),
        (one, r"got dict"),
    ]:
        with pytest.raises(lora.LoraError, match=wanted):
            lora.stack(adapters)
    stacked = lora.stack([one, one])
    for wrong in (2, -1):
        with pytest.raises(lora.LoraError, match=f"adapter {wrong} of 2 .* 0 to 1"):
            lora.take(stacked, wrong)
    nodes = jax.tree.leaves(lora.take(stacked, 1), is_leaf=is_adapter)
    np.testing.assert_array_equal(nodes[0].a, one["w"].a)
