"""`init`: structure, keys, shapes, scales and dtypes of fresh factors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lora


def stacked(params, x):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, params["stack"])[0] @ params["w"]


@pytest.fixture
def params(getkey):
    return {
        "stack": jax.random.normal(getkey(), (3, 256, 256)),
        "w": jax.random.normal(getkey(), (256, 64)),
        "b": jnp.ones(64),
    }


@pytest.fixture
def axes(params):
    return lora.infer_axes(stacked, params, jnp.ones((2, 256)))


def test_shapes_and_structure(params, axes):
    factors = lora.init(jax.random.key(0), params, [lora.LoRA(["stack", "w"], rank=4)], axes=axes)
    assert factors["b"] is None
    assert (factors["stack"].a.shape, factors["stack"].b.shape) == ((3, 256, 4), (3, 4, 256))
    assert (factors["w"].a.shape, factors["w"].b.shape) == ((256, 4), (4, 64))
    is_none = lambda node: node is None or hasattr(node, "axes")
    flat = jax.tree.structure(jax.tree.map(lambda _: 0, factors, is_leaf=is_none))
    assert flat == jax.tree.structure(params)


def test_b_is_zero_and_a_is_kaiming_uniform_with_contracted_fan_in(params, axes):
    factors = lora.init(jax.random.key(0), params, [lora.LoRA(["stack"], rank=8)], axes=axes)
    a = np.asarray(factors["stack"].a)
    assert not factors["stack"].b.any()
    assert np.abs(a).max() <= 1 / 16  # 1/√256: neither layers nor rank count into the fan-in
    np.testing.assert_allclose(a.std(), 1 / 16 / np.sqrt(3), rtol=0.05)
    assert not np.allclose(a[0], a[1])


def test_a_rule_more_changes_no_other_draw(params, axes):
    key = jax.random.key(0)
    one = lora.init(key, params, [lora.LoRA(["w"], rank=4)], axes=axes)
    two = lora.init(key, params, [lora.LoRA(["w", "stack"], rank=4)], axes=axes)
    np.testing.assert_array_equal(one["w"].a, two["w"].a)


def test_first_matching_rule_wins(params, axes):
    rules = [lora.Frozen("w"), lora.LoRA(r"stack|w", rank=2, alpha=6), lora.Full("b")]
    factors = lora.init(jax.random.key(0), params, rules, axes=axes)
    assert factors["w"] is None
    assert factors["stack"].rank == 2
    assert factors["b"].delta.shape == (64,)


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"rank": 4}, 1.0),
        ({"rank": 4, "alpha": 10}, 2.5),
        ({"rank": 4, "alpha": 10, "rslora": True}, 5.0),
    ],
)
def test_scale(params, axes, options, scale):
    factors = lora.init(jax.random.key(0), params, [lora.LoRA("w", **options)], axes=axes)
    assert factors["w"].scale == scale


def test_under_jit_and_eval_shape_and_on_abstract_params(params, axes):
    rules = [lora.LoRA(["stack", "w"], rank=4)]
    key = jax.random.key(0)
    eager = lora.init(key, params, rules, axes=axes)
    jitted = jax.jit(lambda key, params: lora.init(key, params, rules, axes=axes))(key, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), jitted, eager)
    abstract = jax.eval_shape(lambda: params)
    shapes = jax.eval_shape(lambda: lora.init(key, abstract, rules, axes=axes))
    jax.tree.map(lambda s, leaf: np.testing.assert_equal(s.shape, leaf.shape), shapes, eager)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal", nn.initializers.normal(0.5)])
def test_initialisers_fill_a(params, axes, init):
    rule = lora.LoRA(["stack"], rank=4, init=init)
    a = np.asarray(lora.init(jax.random.key(0), params, [rule], axes=axes)["stack"].a)
    spread = {"kaiming": 1 / 16 / np.sqrt(3), "gaussian": 1 / 4, "orthogonal": 1 / 16}
    wanted = spread[init] if isinstance(init, str) else 0.5
    np.testing.assert_allclose(a.std(), wanted, rtol=0.1)


def test_factors_are_float32_beside_a_half_precision_base(params):
    half = {"w": params["w"].astype(jnp.bfloat16)}
    assert lora.init(jax.random.key(0), half, [lora.LoRA("w", rank=4)])["w"].a.dtype == jnp.float32
    rule = lora.LoRA("w", rank=4, dtype=jnp.bfloat16)
    assert lora.init(jax.random.key(0), half, [rule])["w"].b.dtype == jnp.bfloat16


def test_old_style_keys_work(params, axes):
    key = jax.random.PRNGKey(3)
    factors = lora.init(key, params, [lora.LoRA("w", rank=4)], axes=axes)
    typed = lora.init(jax.random.key(3), params, [lora.LoRA("w", rank=4)], axes=axes)
    np.testing.assert_array_equal(factors["w"].a, typed["w"].a)


def test_a_name_that_selects_nothing_is_warned_of(params, axes):
    with pytest.warns(
        UserWarning, match=r"the name 'stakc' matches nothing. Nearest paths: 'stack'"
    ):
        lora.init(jax.random.key(0), params, [lora.LoRA(["w", "stakc"], rank=2)], axes=axes)
