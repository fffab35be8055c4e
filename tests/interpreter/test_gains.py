"""A product with a gain for each output: its derivatives, what they form and what is kept for them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lora
from tests.battery.taint import sub_jaxprs

FEW, MANY, INPUTS, OUTPUTS = 3, 32, 6, 10  # rows: a result smaller than the weight, or larger


def layer(params, x):
    return jnp.tanh(x @ params["w"])


def scaled_layer(params, x):
    """Its weight depends on what is differentiated, too."""
    return jnp.tanh(x @ (params["w"] * x[0][:, None]))


def adapted(gain, params, x, layer=layer):
    """The sum of `layer`'s results, its weight's outputs multiplied by the gain."""
    node = lora.init(jax.random.key(0), params, [lora.IA3("w")])["w"]
    factors = {"w": dataclasses.replace(node, gain=gain)}
    return lora.wrap(layer, dense="error")(params, factors, x).sum()


@pytest.fixture(params=[FEW, MANY])
def operands(request, getkey):
    """(gain, params, x)."""
    params = {"w": jax.random.normal(getkey(), (INPUTS, OUTPUTS))}
    x = jax.random.normal(getkey(), (request.param, INPUTS))
    return jax.random.normal(getkey(), (OUTPUTS,)), params, x


@pytest.mark.parametrize("layer", [layer, scaled_layer])
def test_derivatives_of_derivatives(operands, layer):
    gain, params, x = operands

    def by_hand(gain, x):
        return layer({"w": params["w"] * gain[None]}, x).sum()

    def derivatives(fn):
        gradient = jax.grad(fn, argnums=(0, 1))
        direction = jnp.cos(gain), jnp.sin(x)
        return jax.jit(lambda *operands: jax.jvp(gradient, operands, direction))(gain, x)

    got = derivatives(lambda gain, x: adapted(gain, params, x, layer))
    for ours, theirs in zip(
        jax.tree.leaves(got), jax.tree.leaves(derivatives(by_hand)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_smaller_of_weight_and_cotangent_is_multiplied(operands):
    gain, params, x = operands
    value, pullback = jax.vjp(lambda x: adapted(gain, params, x), x)
    found = products(jax.make_jaxpr(pullback)(jnp.ones_like(value)).jaxpr)
    of_weight, of_cotangent = found.count((INPUTS, OUTPUTS)), found.count((len(x), OUTPUTS))
    tanh = products(jax.make_jaxpr(jax.vjp(jnp.tanh, x)[1])(x).jaxpr).count(x.shape)
    assert of_weight == (len(x) == MANY)
    assert of_cotangent == tanh + (len(x) == FEW)


def test_the_gain_is_kept_as_it_is(operands):
    gain, params, x = operands
    _, pullback = jax.vjp(lambda gain, x: adapted(gain, params, x), gain, x)
    large = [leaf for leaf in jax.tree.leaves(pullback) if leaf.shape == (len(x), OUTPUTS)]
    tanh = jax.tree.leaves(jax.vjp(jnp.tanh, x)[1])
    assert len(large) == len(tanh) + 1  # x·W, for the gain's own gradient


def products(jaxpr):
    """The shapes of all elementwise products, those of inner jaxprs included."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "mul":
            found.append(eqn.outvars[0].aval.shape)
        for inner in sub_jaxprs(eqn.params):
            found += products(inner)
    return found
