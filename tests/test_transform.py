"""`wrap`, `merge`, `unmerge` as functions of whole trees; operations have their battery."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lorax_fn as lora


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, double=False):
        x = nn.tanh(nn.Dense(16, name="up")(x))
        x = nn.Dense(4, name="down")(x)
        return 2 * x if double else x


@pytest.fixture
def net(getkey, nonzero_factors):
    """(apply_fn, params, factors, x), the factors not at their start."""
    model, x = Net(), jax.random.normal(getkey(), (3, 8))
    params = model.init(getkey(), x)
    rules = [lora.LoRA(["kernel"], rank=2, alpha=6), lora.Full(r".*/down/bias")]
    factors = lora.init(getkey(), params, rules, axes=lora.infer_axes(model.apply, params, x))
    return model.apply, params, nonzero_factors(factors), x


def test_wrapped_at_init_is_the_base_bit_for_bit(net):
    apply_fn, params, _, x = net
    factors = lora.init(jax.random.key(0), params, [lora.LoRA(["kernel"], rank=2, alpha=6)])
    np.testing.assert_array_equal(
        lora.wrap(apply_fn)(params, factors, x), apply_fn(params, x), strict=True
    )


def test_wrapped_equals_merged(net):
    apply_fn, params, factors, x = net
    np.testing.assert_allclose(
        lora.wrap(apply_fn)(params, factors, x),
        apply_fn(lora.merge(params, factors), x),
        rtol=1e-5,
        atol=1e-6,
    )


def test_static_arguments_reach_the_function_as_they_are(net):
    apply_fn, params, factors, x = net
    seen = []

    def spy(params, x, flag, name, fn, nothing, *, double):
        seen.append((flag, name, fn, nothing, double))
        return {"y": apply_fn(params, x, double=double), "name": name}

    result = lora.wrap(spy)(params, factors, x, True, "a", abs, None, double=True)
    assert seen == [(True, "a", abs, None, True)]
    assert result["name"] == "a"
    np.testing.assert_allclose(
        result["y"], 2 * lora.wrap(apply_fn)(params, factors, x), rtol=1e-6, atol=1e-6
    )


def test_params_get_zero_gradients_and_no_dense_weight_gradient(net):
    apply_fn, params, factors, x = net
    wrapped = lora.wrap(apply_fn)

    def loss(params, factors):
        return (wrapped(params, factors, x) ** 2).sum()

    base_grads, grads = jax.grad(loss, argnums=(0, 1))(params, factors)
    assert all(not leaf.any() for leaf in jax.tree.leaves(base_grads))
    assert all(leaf.any() for leaf in jax.tree.leaves(grads))
    both = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, factors).compile()
    only = jax.jit(jax.grad(loss, argnums=1)).lower(params, factors).compile()
    assert both.cost_analysis()["flops"] == only.cost_analysis()["flops"]


def test_other_factors_do_not_recompile(net):
    apply_fn, params, factors, x = net
    step = jax.jit(lora.wrap(apply_fn))
    step(params, factors, x)
    step(params, jax.tree.map(lambda leaf: leaf + 1, factors), x)
    assert step._cache_size() == 1


def test_dense_policy_warns_raises_or_allows(net):
    _, params, factors, x = net

    def sines(params, x):
        return x @ jnp.sin(params["params"]["up"]["kernel"])

    with pytest.warns(lora.DenseWarning, match=r"'params/up/kernel' meets sin at .*test_transform"):
        expected = lora.wrap(sines)(params, factors, x)
    with pytest.raises(lora.LoraError, match="meets sin"):
        lora.wrap(sines, dense="error")(params, factors, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        allowed = lora.wrap(sines, dense="allow")(params, factors, x)
    np.testing.assert_array_equal(allowed, expected)
    np.testing.assert_allclose(allowed, sines(lora.merge(params, factors), x), rtol=1e-5, atol=1e-6)


def test_a_returned_weight_is_added_up_and_said_so(net):
    _, params, factors, x = net

    def leaks(params, x):
        return params["params"]["up"]["kernel"]

    with pytest.warns(lora.DenseWarning, match="'params/up/kernel' is returned"):
        leaked = lora.wrap(leaks)(params, factors, x)
    np.testing.assert_allclose(
        leaked, lora.merge(params, factors)["params"]["up"]["kernel"], rtol=1e-6
    )


def test_half_precision_merge_rounds_once(getkey, nonzero_factors):
    params = {"w": jax.random.normal(getkey(), (64, 32), jnp.bfloat16)}
    factors = nonzero_factors(lora.init(getkey(), params, [lora.LoRA("w", rank=4, alpha=10)]))
    merged = lora.merge(params, factors)["w"]
    a, b = (np.asarray(leaf, np.float64) for leaf in (factors["w"].a, factors["w"].b))
    exact = np.asarray(params["w"], np.float64) + 10 / 4 * a @ b
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged, jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16))


def test_unmerge_inverts_merge(net):
    _, params, factors, _ = net
    restored = lora.unmerge(lora.merge(params, factors), factors)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), restored, params)


def test_merge_leaves_the_base_and_untouched_leaves_alone(net):
    _, params, factors, _ = net
    before = jax.tree.map(np.array, params)
    merged = lora.merge(params, factors)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert merged["params"]["up"]["bias"] is params["params"]["up"]["bias"]


def test_merge_keeps_the_sharding_and_gathers_nothing(getkey, nonzero_factors):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "model"))
    params = {"w": jax.device_put(jax.random.normal(getkey(), (16, 64)), sharding)}
    factors = nonzero_factors(lora.init(getkey(), params, [lora.LoRA("w", rank=2, alpha=6)]))
    assert lora.merge(params, factors)["w"].sharding == sharding
    compiled = jax.jit(lora.merge, out_shardings={"w": sharding}).lower(params, factors).compile()
    assert "all-gather" not in compiled.as_text()


def test_check_finite_names_the_leaf(net):
    _, params, factors, _ = net
    broken = jax.tree.map(lambda leaf: leaf * jnp.inf, factors)
    with pytest.raises(lora.LoraError, match="params/down/bias"):
        lora.merge(params, broken, check_finite=True)


def test_dropout_acts_with_a_key_and_on_the_low_rank_branch_only(getkey, nonzero_factors):
    params, x = {"w": jnp.eye(512)}, jnp.ones((1, 512))
    rule = lora.LoRA("w", rank=2, alpha=6, dropout=0.25)
    factors = nonzero_factors(lora.init(getkey(), params, [rule]))
    wrapped = lora.wrap(lambda params, x: x @ params["w"])
    plain, key = wrapped(params, factors, x), getkey()
    dropped = wrapped(params, factors, x, lora_key=key)
    np.testing.assert_array_equal(wrapped(params, factors, x, lora_key=key), dropped)
    assert not np.allclose(dropped, plain)
    # With A = x-independent ones the branch is (kept / 0.75 / n): its mean over keys is plain's.
    keys = jax.random.split(getkey(), 2000)
    mean = jax.vmap(lambda k: wrapped(params, factors, x, lora_key=k))(keys).mean(0)
    np.testing.assert_allclose(mean, plain, atol=0.05 * np.abs(plain - x).max())
    zero_branch = jax.tree.map(jnp.zeros_like, factors)
    np.testing.assert_array_equal(wrapped(params, zero_branch, x, lora_key=key), x)


def test_dropout_masks_differ_by_step_of_a_scan(getkey):
    params, xs = {"w": jnp.zeros((64, 1))}, jnp.ones((5, 1, 64))

    def over_time(params, xs):
        return jax.lax.scan(lambda carry, x: (carry, x @ params["w"]), 0, xs)[1]

    factors = lora.init(getkey(), params, [lora.LoRA("w", rank=1, alpha=3, dropout=0.5)])
    factors = jax.tree.map(jnp.ones_like, factors)
    wrapped = jax.jit(lora.wrap(over_time, dense="error"))
    kept = wrapped(params, factors, xs, lora_key=getkey())  # 3 · (what is kept of 64) · 2
    assert len(np.unique(kept)) > 1
    assert abs(kept.mean() / (3 * 64) - 1) < 0.2


def test_dropout_masks_differ_by_layer_of_a_scan_and_by_weight(getkey):
    def apply_fn(params, x):
        def layer(carry, w):
            return carry, x @ w

        return jax.lax.scan(layer, 0.0, params["stack"])[1], x @ params["other"]

    params = {"stack": jnp.zeros((2, 64, 64)), "other": jnp.zeros((64, 64))}
    x = jnp.ones((64,))
    axes = lora.infer_axes(apply_fn, params, x)
    rule = lora.LoRA(["stack", "other"], rank=1, alpha=3, dropout=0.5)
    factors = lora.init(getkey(), params, [rule], axes=axes)
    ones = jax.tree.map(jnp.ones_like, factors)
    # Every entry of the branch is the number of inputs kept, times 2 · alpha: three masks.
    layers, other = jax.jit(lora.wrap(apply_fn))(params, ones, x, lora_key=getkey())
    counts = {float(y[0]) for y in (*layers, other)}
    assert len(counts) == 3


def test_merge_keeps_a_dtype_that_jax_has_disabled():
    params = {"w": np.ones((3, 2))}
    assert params["w"].dtype == np.float64
    factors = lora.init(jax.random.key(0), params, [lora.LoRA("w", rank=1, alpha=2)])
    merged = lora.merge(params, factors)
    assert merged["w"].dtype == np.float64
    np.testing.assert_array_equal(lora.unmerge(merged, factors)["w"], params["w"])
