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


@pytest.mark.parametrize("rows", [2, 64])
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.bfloat16])
def test_a_weight_narrower_than_the_data_takes_no_gain(rows, dtype):
    """In an 8-bit weight W·g would overflow, in one of 16 bits be rounded."""
    params = {"w": (300 + jnp.arange(16.0).reshape(4, 4)).astype(dtype)}
    node = lora.init(jax.random.key(0), params, [lora.IA3("w")])["w"]
    factors = {"w": dataclasses.replace(node, gain=jnp.linspace(1.9, 2.1, 4))}
    x = jnp.ones((rows, 4))

    def model(params, x):
        numbers = (((1,), (0,)), ((), ()))
        return jax.lax.dot_general(x, params["w"], numbers, preferred_element_type=jnp.float32)

    gradient = jax.grad(lambda x: lora.wrap(model)(params, factors, x).sum())(x)
    by_hand = params["w"].astype(jnp.float32) @ factors["w"].gain
    np.testing.assert_allclose(gradient, np.tile(by_hand, (rows, 1)), rtol=1e-6)


def test_an_infinite_result_spoils_no_derivative_in_x():
    """A gain that is not differentiated has no share in the tangent, not 0 times the result."""
    params = {"w": jnp.ones((2, 2))}
    factors = lora.init(jax.random.key(0), params, [lora.IA3("w")])
    x = jnp.array([[jnp.inf, 1.0], [1.0, 1.0]])
    apply = lora.wrap(lambda params, x: x @ params["w"])
    _, change = jax.jvp(lambda x: apply(params, factors, x), (x,), (jnp.ones_like(x),))
    np.testing.assert_array_equal(change, 2.0)


def test_what_is_kept_for_a_gain_is_as_wide_as_the_data(getkey):
    params = {"w": jax.random.normal(getkey(), (INPUTS, OUTPUTS), jnp.bfloat16)}
    factors = lora.init(getkey(), params, [lora.IA3("w")])
    x = jax.random.normal(getkey(), (MANY, INPUTS), jnp.bfloat16)
    apply = lora.wrap(lambda params, x: x @ params["w"])
    _, pullback = jax.vjp(lambda factors: apply(params, factors, x), factors)
    large = [leaf for leaf in jax.tree.leaves(pullback) if leaf.shape == (MANY, OUTPUTS)]
    assert [leaf.dtype for leaf in large] == [jnp.bfloat16]


@pytest.mark.parametrize("kind", [lora.LoRA, lora.DoRA])
def test_factors_of_16_bits_are_not_rounded_when_scale_and_gain_go_into_them(kind, getkey):
    params = {"w": 1e-6 * jax.random.normal(getkey(), (64, 48))}  # the low-rank term is all of it
    factors = lora.init(getkey(), params, [kind("w", rank=2, alpha=3, dtype=jnp.bfloat16)])
    b = jax.random.normal(getkey(), (2, 48), jnp.bfloat16)
    factors = {"w": dataclasses.replace(factors["w"], b=b)}
    apply = lora.wrap(lambda params, x: x @ params["w"])
    answer, wanted = apply(params, factors, jnp.eye(64)), lora.merge(params, factors)["w"]
    np.testing.assert_allclose(answer, wanted, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "IA3"])
def test_a_batch_of_unknown_size_is_exported(name, getkey):
    settings = {} if name == "IA3" else {"rank": 2, "alpha": 3}
    params = {"w": jax.random.normal(getkey(), (INPUTS, OUTPUTS))}
    factors = lora.init(getkey(), params, [getattr(lora, name)("w", **settings)])
    treedef = jax.tree.structure(factors)
    arrays = [a + 0.1 for a in jax.tree.leaves(factors)]

    def loss(arrays, x):
        apply = lora.wrap(lambda params, x: x @ params["w"])
        return jnp.square(apply(params, jax.tree.unflatten(treedef, arrays), x)).sum()

    step = jax.jit(jax.value_and_grad(loss))
    (size,) = jax.export.symbolic_shape("rows")
    exported = jax.export.export(step)(arrays, jax.ShapeDtypeStruct((size, INPUTS), jnp.float32))
    x = jax.random.normal(getkey(), (FEW, INPUTS))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        exported.call(arrays, x),
        step(arrays, x),
    )
