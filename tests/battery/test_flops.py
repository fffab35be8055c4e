"""A wrapped training step costs what LoRA written by hand into the layers costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lora
from tests.battery.handwritten import HAND_WRITTEN
from tests.battery.materials import materials


def compiled_step(model, fn):
    """A step of `fn(params, factors, x)`: loss and gradient with respect to the factors."""
    drawn = materials(model.case)

    def loss(factors, params, x):
        return jnp.mean(jnp.square(fn(params, factors, x)))

    step = jax.jit(jax.value_and_grad(loss))
    return step.lower(drawn.factors[0], drawn.params, drawn.xs[0]).compile()


def flops(model, fn):
    return compiled_step(model, fn).cost_analysis()["flops"]


# Fused weights are joined with zeros: [ΔQ 0] + [0 ΔV], where one by hand makes two thin products.
PADDED = {"fused_qv": 1.15}


@pytest.mark.parametrize("model", HAND_WRITTEN, ids=repr)
def test_no_more_flops_than_by_hand(model):
    most = PADDED.get(repr(model), 1.01) * flops(model, model.by_hand)
    assert flops(model, lora.wrap(model.plain, dense="error")) <= most


@pytest.mark.parametrize("model", HAND_WRITTEN, ids=repr)
def test_far_fewer_flops_than_adding_up(model):
    """Guards the guard: the measure does see the difference that a dense dW makes."""

    def add_up_then_apply(params, factors, x):
        return model.plain(lora.merge(params, factors), x)

    assert flops(model, add_up_then_apply) > 1.1 * flops(model, model.by_hand)


@pytest.mark.parametrize("model", HAND_WRITTEN, ids=repr)
def test_same_step_as_by_hand(model):
    drawn = materials(model.case)
    arguments = (drawn.factors[0], drawn.params, drawn.xs[0])
    ours = compiled_step(model, lora.wrap(model.plain))(*arguments)
    theirs = compiled_step(model, model.by_hand)(*arguments)
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-3 * max(1, np.abs(want).max()))
