"""Real weights that meet complex data: an FFT's result, say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lora

KINDS = {
    "LoRA": lora.LoRA("w", rank=2, alpha=3),
    "DoRA": lora.DoRA("w", rank=2, alpha=3),
    "IA3": lora.IA3("w"),
    "LoKr": lora.LoKr("w", rank=2, alpha=3, factor=2),
    "LoHa": lora.LoHa("w", rank=2, alpha=3),
    "VeRA": lora.VeRA("w", rank=2),
}


@pytest.fixture(autouse=True)
def mixed_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_the_imaginary_part_is_kept(kind, getkey):
    params = {"w": jax.random.normal(getkey(), (4, 6))}
    x = jax.random.normal(getkey(), (3, 4))
    factors = lora.init(getkey(), params, [KINDS[kind]])
    factors = jax.tree.map(
        lambda a: a + 0.1 * jnp.cos(jnp.arange(a.size).reshape(a.shape)), factors
    )

    def model(params, x):
        return jnp.fft.fft(x) @ params["w"]

    answer = lora.wrap(model, dense="error")(params, factors, x)
    wanted = model(lora.merge(params, factors), x)
    assert np.abs(wanted.imag).max() > 0.1
    np.testing.assert_allclose(answer, wanted, rtol=1e-4, atol=1e-4)

    def loss(apply):
        return lambda x: jnp.square(jnp.abs(apply(x))).sum()

    np.testing.assert_allclose(
        jax.grad(loss(lambda x: lora.wrap(model)(params, factors, x)))(x),
        jax.grad(loss(lambda x: model(lora.merge(params, factors), x)))(x),
        rtol=1e-3,
        atol=1e-3,
    )


def test_a_rolled_weight_with_gains(getkey):
    """`jnp.roll` concatenates along a dimension that it gives as a numpy integer."""
    params = {"w": jax.random.normal(getkey(), (4, 6))}
    x = jax.random.normal(getkey(), (3, 4))
    factors = lora.init(getkey(), params, [lora.IA3("w")])
    factors = jax.tree.map(lambda gain: gain + jnp.arange(gain.size), factors)
    model = lambda params, x: x @ jnp.roll(params["w"], 2, axis=1)
    answer = lora.wrap(model)(params, factors, x)
    np.testing.assert_allclose(answer, model(lora.merge(params, factors), x), rtol=1e-4, atol=1e-4)
