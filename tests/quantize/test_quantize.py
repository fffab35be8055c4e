"""`quantize`: what it makes, what takes it as params, what it refuses."""

import sys

import equinox as eqx
import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lorax_fn as lora
from tests.battery.materials import assert_close

DTYPES = ["nf4", "int4", "int8", "float8_e4m3"]
# Of normally distributed weights in blocks of 64; the error of one rounding in each format.
ERRORS = {"nf4": 0.092, "int4": 0.103, "int8": 0.006, "float8_e4m3": 0.025}
# Of the largest magnitude of a block: half of the widest step between neighbouring values.
BOUNDS = {"nf4": 0.152, "int4": 0.07, "int8": 0.0041, "float8_e4m3": 0.036}


@pytest.fixture
def params(getkey):
    return {
        "layer": {
            "kernel": jax.random.normal(getkey(), (128, 192)) / 16,
            "bias": jax.random.normal(getkey(), (192,)),
        },
        "embedding": jax.random.normal(getkey(), (50, 128)),
        "count": jnp.arange(6).reshape(2, 3),
    }


def apply(params, ids):
    hidden = params["embedding"][ids] @ params["layer"]["kernel"] + params["layer"]["bias"][None]
    return jnp.tanh(hidden[..., :128]) @ params["embedding"].T  # (tokens, 50)


RULES = [lora.LoRA(r".*/kernel", rank=4, alpha=8), lora.LoRA("embedding", rank=3, alpha=5)]


def nothing(params):
    return jax.tree.map(lambda _: None, params)


def floating(base, params):
    return lora.merge(base, nothing(params))


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_of_each_type_is_that_of_its_rounding(params, dtype):
    base = lora.quantize(params, r"layer/kernel|embedding", dtype=dtype)
    errors = lora.quantization_error(params, base)
    assert list(errors) == ["embedding", "layer/kernel"]
    for error in errors.values():
        assert error == pytest.approx(ERRORS[dtype], rel=0.1)
    w, q = np.asarray(params["layer"]["kernel"]), floating(base, params)["layer"]["kernel"]
    blocks = w.reshape(2, 64, 192)
    largest = np.abs(blocks).max(1, keepdims=True)
    assert (np.abs(blocks - q.reshape(2, 64, 192)) <= BOUNDS[dtype] * largest).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_float16_weights_lose_no_more_than_wide_ones(dtype, getkey):
    """A block's scale is 0.0004 in int8: far below what float16 squares to."""
    params = {"w": (0.02 * jax.random.normal(getkey(), (256, 64))).astype(jnp.float16)}
    base = lora.quantize(params, "w", dtype=dtype)
    assert base["w"].dtype == floating(base, params)["w"].dtype == jnp.float16
    assert lora.quantization_error(params, base)["w"] == pytest.approx(ERRORS[dtype], rel=0.1)


def test_only_the_targets_change_and_nothing_is_mutated(params):
    before = jax.tree.map(np.array, params)
    base = lora.quantize(params, ["layer"], dtype="nf4")
    assert base["embedding"] is params["embedding"]
    assert base["layer"]["bias"] is params["layer"]["bias"]
    jax.tree.map(np.testing.assert_array_equal, params, before)
    kernel = base["layer"]["kernel"]
    assert (kernel.shape, kernel.dtype, kernel.qtype) == ((128, 192), jnp.float32, "nf4")


@pytest.mark.parametrize(
    "targets",
    [
        r"layer/kernel",
        ["layer"],
        lambda path, leaf: path.endswith("kernel") and leaf.ndim == 2,
    ],
)
def test_targets_take_every_form(params, targets):
    assert list(lora.quantization_error(params, lora.quantize(params, targets))) == ["layer/kernel"]


def test_exclude_leaves_out(params):
    base = lora.quantize(params, ["layer", "embedding"], exclude=["embedding"])
    assert list(lora.quantization_error(params, base)) == ["layer/kernel"]


@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((128, 192), (2, 192)),
        ((50, 128), (50, 2)),  # an embedding whose rows 64 does not divide
        ((3, 128, 192), (3, 2, 192)),  # layers
        ((128, 12, 64), (128, 12, 1)),  # DenseGeneral: heads are too few
        ((128, 12, 32), (2, 12, 32)),
        ((3, 3, 64, 10), (3, 3, 1, 10)),  # a convolution
    ],
)
def test_blocks_run_along_the_last_dim_but_one_that_they_divide(shape, scales):
    base = lora.quantize({"w": jnp.ones(shape)}, ["w"], dtype="int8")
    assert base["w"].scale.shape == scales


def test_four_bits_take_four_bits(params):
    base = lora.quantize(params, ["layer"], dtype="nf4")
    compiled = jax.jit(lambda p: p, keep_unused=True).lower(base["layer"]["kernel"]).compile()
    codes, scales = 128 * 192 // 2, 2 * 192 * 4
    assert compiled.memory_analysis().argument_size_in_bytes == codes + scales


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapted_and_differentiated_as_the_dequantised_base(params, dtype, nonzero_factors):
    base = lora.quantize(params, r"layer/kernel|embedding", dtype=dtype)
    ids = jnp.array([3, 1, 49, 3])
    axes = lora.infer_axes(apply, base, ids)
    assert axes["layer"]["kernel"] == lora.Axes(contract=(0,), out=(1,))
    factors = nonzero_factors(lora.init(jax.random.key(0), base, RULES, axes=axes))
    wrapped = lora.wrap(apply, dense="error")

    def loss(factors, base):
        return jnp.square(wrapped(base, factors, ids)).mean()

    step = jax.jit(jax.value_and_grad(loss))
    assert_close(step(factors, base), step(factors, floating(base, params)), 1e-5)


def test_linearize_and_hessian(getkey):
    params = {"w": jax.random.normal(getkey(), (8, 6))}
    base = lora.quantize(params, "w", block=4)
    factors = lora.init(getkey(), base, lora.LoRA("w", rank=1, alpha=2))
    flat, unravel = jax.flatten_util.ravel_pytree(factors)
    flat = flat + 0.5
    direction = jnp.sin(jnp.arange(flat.size, dtype=flat.dtype))
    wrapped = lora.wrap(lambda params, x: jnp.tanh(x @ params["w"]) @ params["w"].T)

    def loss(base):
        return lambda flat: wrapped(base, unravel(flat), jnp.ones((2, 8)) / 4).var()

    alike = floating(base, params)
    got, wanted = (jax.hessian(loss(tree))(flat) for tree in (base, alike))
    assert_close(got, wanted, 1e-5)
    value, linear = jax.linearize(loss(base), flat)
    assert_close((value, linear(direction)), jax.jvp(loss(alike), (flat,), (direction,)), 1e-5)


def test_vmap_over_data_and_over_factors(params, nonzero_factors):
    base = lora.quantize(params, r"layer/kernel|embedding")
    ids = jnp.array([[3, 1], [7, 49]])
    axes = lora.infer_axes(apply, base, ids[0])
    each = [
        nonzero_factors(lora.init(jax.random.key(seed), base, RULES, axes=axes)) for seed in (0, 1)
    ]
    wrapped = lora.wrap(apply)
    stacked = lora.stack(each)
    got = jax.vmap(lambda f, x: jax.grad(lambda f: wrapped(base, f, x).sum())(f))(stacked, ids)
    for i in range(2):
        wanted = jax.grad(lambda f, i=i: wrapped(base, f, ids[i]).sum())(each[i])
        assert_close(lora.take(got, i), wanted, 1e-5)


def test_merge_gives_floating_leaves_and_requantises_with_a_known_error(params, nonzero_factors):
    base = lora.quantize(params, r"layer/kernel|embedding", dtype="int8")
    ids = jnp.array([3, 1])
    axes = lora.infer_axes(apply, base, ids)
    factors = nonzero_factors(lora.init(jax.random.key(0), base, RULES[:1], axes=axes))
    merged = lora.merge(base, factors)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(
        apply(merged, ids), lora.wrap(apply)(base, factors, ids), rtol=1e-4, atol=1e-4
    )
    back = lora.unmerge(merged, factors)["layer"]["kernel"]
    np.testing.assert_allclose(back, floating(base, params)["layer"]["kernel"], atol=1e-5)
    again = lora.quantize(merged, r"layer/kernel|embedding", dtype="int8")
    errors = lora.quantization_error(merged, again)
    assert errors["layer/kernel"] == pytest.approx(0.006, rel=0.2)
    assert errors["embedding"] < 0.006


def test_merge_in_half_precision_keeps_the_dtype(params):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    base = lora.quantize(half, ["layer"], dtype="nf4")
    assert base["layer"]["kernel"].dtype == jnp.bfloat16
    factors = lora.init(jax.random.key(0), base, RULES[:1])
    assert lora.merge(base, factors)["layer"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "rule",
    [
        lora.LoRA("w", rank=2, alpha=3, init="pissa"),
        lora.DoRA("w", rank=2, alpha=3),
        lora.VeRA("w", rank=3),
        lora.LoHa("w", rank=2, alpha=3),
        lora.LoKr("w", rank=2, alpha=3),
        lora.IA3("w"),
        lora.AdaLoRA("w", rank=2, alpha=3),
        lora.Full("w"),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_every_kind_on_a_quantised_leaf(rule, getkey):
    params = {"w": jax.random.normal(getkey(), (16, 12))}
    base = lora.quantize(params, "w", dtype="int8", block=8)
    x = jax.random.normal(getkey(), (3, 16))
    factors, alike = (
        lora.init(jax.random.key(0), tree, rule) for tree in (base, floating(base, params))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), factors, alike)
    moved = jax.tree.map(lambda a, on: a + 0.1 * on, factors, lora.trainable_mask(factors))

    def step(base):
        function = lora.wrap(lambda params, x: x @ params["w"], dense="error")
        return jax.value_and_grad(lambda f: jnp.square(function(base, f, x)).sum())(moved)

    got, wanted = step(base), step(floating(base, params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, wanted)


def test_starts_from_data_see_a_quantised_base(params):
    base = lora.quantize(params, ["layer"], dtype="int8")
    rules = [lora.LoRA(["layer"], rank=2, alpha=4, init="corda")]
    options = {"apply_fn": apply, "batches": [(jnp.array([3, 1, 5]),)], "progress": False}
    axes = lora.infer_axes(apply, base, jnp.array([1]))
    got, wanted = (
        lora.init(jax.random.key(0), tree, rules, axes=axes, **options)["layer"]["kernel"]
        for tree in (base, floating(base, params))
    )
    np.testing.assert_allclose(got.a @ got.b, wanted.a @ wanted.b, atol=1e-4)


def test_inspect_shows_the_floating_shape_and_the_type(params):
    base = lora.quantize(params, r"layer/kernel|embedding")
    ids = jnp.array([3, 1])
    axes = lora.infer_axes(apply, base, ids)
    factors = lora.init(jax.random.key(0), base, RULES[:1], axes=axes)
    report, alike = (lora.inspect(apply, tree, factors, ids) for tree in (base, params))
    [row] = report.rows
    assert (row.path, row.shape, row.quantized) == ("layer/kernel", (128, 192), "nf4")
    assert "128×192 nf4" in str(report)
    assert report.totals == alike.totals
    assert report.dense == []
    assert alike.rows[0].quantized is None


def test_inspect_and_wrap_agree_on_what_is_added_up(params):
    def fold(params, x):
        return x @ jnp.sin(params["layer"]["kernel"])

    base = lora.quantize(params, ["layer"])
    factors = lora.init(jax.random.key(0), base, RULES[:1])
    x = jnp.ones((2, 128))
    assert lora.inspect(fold, base, factors, x).dense == ["layer/kernel"]
    with pytest.warns(lora.DenseWarning, match="meets sin"):
        lora.wrap(fold)(base, factors, x)


def test_a_leaf_without_adapter_meets_any_operation_and_is_not_kept(params):
    def fold(params, x):
        return (x @ jnp.sin(params["layer"]["kernel"])).sum()

    base = lora.quantize(params, ["layer"], dtype="int8")
    wrapped = lora.wrap(fold, dense="error")
    value, pullback = jax.vjp(lambda x: wrapped(base, nothing(params), x), jnp.ones((2, 128)))
    np.testing.assert_allclose(value, fold(floating(base, params), jnp.ones((2, 128))), rtol=1e-5)
    kept = [leaf for leaf in jax.tree.leaves(pullback) if leaf.dtype == jnp.float32]
    assert pullback(jnp.ones(()))[0].shape == (2, 128)
    assert len([leaf for leaf in kept if leaf.size == 128 * 192]) <= 1  # sin(W), the user's own


def test_where_a_leaf_has_to_be_dequantised_for_good_it_says_so(params):
    @jax.custom_vjp
    def own(w, x):
        return x @ w

    own.defvjp(lambda w, x: (x @ w, w), lambda w, g: (jnp.zeros_like(w), g @ w.T))
    base = lora.quantize(params, ["layer"])
    wrapped = lora.wrap(lambda p, x: own(p["layer"]["kernel"], x))
    with pytest.warns(lora.DenseWarning, match="is dequantised there, and kept so"):
        wrapped(base, nothing(params), jnp.ones((2, 128)))


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(jnp.int8, "int8"), (jnp.dtype("int4"), "int4"), (jnp.float8_e4m3fn, "float8_e4m3")],
    ids=str,
)
def test_a_type_is_given_by_its_name_or_as_a_dtype(params, dtype, name):
    base = lora.quantize(params, ["layer"], dtype=dtype)["layer"]["kernel"]
    named = lora.quantize(params, ["layer"], dtype=name)["layer"]["kernel"]
    assert base.qvalue.dtype == named.qvalue.dtype
    np.testing.assert_array_equal(base.scale, named.scale)


def test_shapes_alone_are_quantised_as_by_eval_shape(params):
    shapes = jax.eval_shape(lambda params: params, params)
    base = lora.quantize(shapes, ["layer"])
    wanted = jax.eval_shape(lambda params: lora.quantize(params, ["layer"]), params)
    assert jax.tree.structure(base) == jax.tree.structure(wanted)
    assert jax.tree.leaves(base) == jax.tree.leaves(wanted)


def test_init_and_quantize_under_jit_and_abstractly(params):
    def make(key, params):
        base = lora.quantize(params, ["layer"])
        return base, lora.init(key, base, [lora.LoRA(["layer"], rank=2)])

    base, factors = jax.jit(make)(jax.random.key(0), params)
    shapes = jax.eval_shape(make, jax.random.key(0), params)
    assert jax.tree.structure(shapes) == jax.tree.structure((base, factors))
    again = jax.eval_shape(
        lambda key: lora.init(key, shapes[0], [lora.LoRA(["layer"], rank=2)]), jax.random.key(0)
    )
    assert again["layer"]["kernel"].a.shape == (128, 2)
    report = lora.inspect(
        lambda p, x: x @ p["layer"]["kernel"], *shapes, jax.ShapeDtypeStruct((2, 128), jnp.float32)
    )
    assert report.rows[0].quantized == "nf4"


def test_training_learns_and_leaves_the_base_alone(params):
    base = lora.quantize(params, r"layer/kernel|embedding")
    before = jax.tree.map(np.array, base)
    ids, labels = jnp.arange(8), jnp.arange(8)
    axes = lora.infer_axes(apply, base, ids)
    factors = lora.init(jax.random.key(0), base, RULES, axes=axes)
    tx = lora.freeze(optax.adam(2e-2))
    wrapped = lora.wrap(apply)

    def loss(factors):
        logits = wrapped(base, factors, ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(factors, state):
        value, grads = jax.value_and_grad(loss)(factors)
        updates, state = tx.update(grads, state, factors)
        return optax.apply_updates(factors, updates), state, value

    losses = []
    with jax.numpy_dtype_promotion("standard"):  # optax counts on it
        state = tx.init(factors)
        for _ in range(30):
            factors, state, value = step(factors, state)
            losses.append(float(value))
    assert losses[-1] < 0.1 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, base, before)


def test_linen_boxes_nnx_states_and_equinox_modules(getkey):
    x = jnp.ones((2, 64))
    rules = lora.LoRA(r".*kernel|weight", rank=2)

    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            return nn.Dense(64, kernel_init=init)(x)

    graph, state = nnx.split(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
    module, static = eqx.partition(eqx.nn.Linear(64, 64, key=getkey()), eqx.is_array)
    cases = {
        "params/Dense_0/kernel": (Boxed().apply, Boxed().init(getkey(), x)),
        "kernel": (lambda state, x: nnx.merge(graph, state)(x), state),
        "weight": (lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x), module),
    }
    for path, (function, params) in cases.items():
        base = lora.quantize(params, r".*kernel|weight", dtype="int8")
        assert list(lora.quantization_error(params, base)) == [path]
        axes = lora.infer_axes(function, base, x)
        factors = lora.init(jax.random.key(0), base, rules, axes=axes)
        got = lora.wrap(function, dense="error")(base, factors, x)
        np.testing.assert_allclose(got, function(lora.merge(base, factors), x), atol=1e-5)


# ------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("error", "targets", "options", "message"),
    [
        (lora.LoraError, ["layer"], {"dtype": "fp4"}, "dtype='fp4' is unknown; wanted one of ['nf4', 'int4', 'int8', 'float8_e4m3']."),
        (lora.LoraError, ["layer"], {"dtype": jnp.int16}, "is unknown; wanted one of ['nf4'"),
        (lora.LoraError, ["layer"], {"dtype": None}, "dtype=None is unknown; wanted one of ['nf4'"),
        (lora.LoraError, ["layer"], {"block": 7}, "block=7 divides no dim of 'layer/kernel' of shape [128, 192]. Choose a block that does, or exclude the leaf."),
        (lora.LoraError, ["layer"], {"block": 0}, "block=0; wanted an integer of at least 1, such as 64."),
        (lora.LoraError, ["layer"], {"block": 64.0}, "block=64.0; wanted an integer"),
        (lora.LoraError, ["layer"], {"block": True}, "block=True; wanted an integer"),
        (lora.TargetError, ["layers"], {}, "quantize(the name 'layers') matches none of the 4 leaves. Nearest paths: 'layer/"),
        (lora.TargetError, r".*/kernel", {"exclude": ["layer"]}, "without the name 'layer' matches none"),
        (lora.TargetError, r"layer/bias", {}, "'layer/bias' has shape [192]; quantize wants at least two dims"),
        (lora.TargetError, r"count", {}, "'count' has dtype int32; quantize wants real floating weights"),
    ],
)  # fmt: skip
def test_refuses(params, error, targets, options, message):
    with pytest.raises(error) as caught:
        lora.quantize(params, targets, **options)
    assert message in str(caught.value)


def test_refuses_what_is_quantised_already(params):
    base = lora.quantize(params, ["layer"], dtype="int4")
    with pytest.raises(
        lora.LoraError, match="'layer/kernel' is quantised already, as int4; wanted"
    ):
        lora.quantize(base, ["layer"])


def test_error_wants_the_params_it_was_made_of(params):
    base = lora.quantize(params, ["layer"])
    with pytest.raises(lora.StructureError, match="params have nothing at 'layer/kernel'"):
        lora.quantization_error({"layer": {}}, base)
    with pytest.raises(lora.StructureError, match=r"params have \[2, 2\] at 'layer/kernel'"):
        lora.quantization_error({"layer": {"kernel": jnp.ones((2, 2))}}, base)


def test_factors_that_do_not_fit_are_refused_by_path(params):
    base = lora.quantize(params, ["layer"])
    factors = nothing(params)
    factors["layer"]["kernel"] = lora.init(
        jax.random.key(0), {"w": jnp.ones((4, 4))}, lora.LoRA("w", rank=1)
    )["w"]
    with pytest.raises(lora.StructureError, match="factors at 'layer/kernel' have"):
        lora.wrap(apply)(base, factors, jnp.array([1]))


def test_without_qwix_it_says_what_to_install(params, monkeypatch):
    base = lora.quantize(params, ["layer"])
    monkeypatch.setitem(sys.modules, "qwix", None)
    message = r"'layer/kernel' is .*qwix is not installed; wanted the extra: pip install 'lorax-fn"
    for call in (
        lambda: lora.quantize(params, ["layer"]),
        lambda: lora.wrap(apply)(base, nothing(params), jnp.array([1])),
        lambda: lora.merge(base, nothing(params)),
        lambda: lora.quantization_error(params, base),
    ):
        with pytest.raises(lora.LoraError, match=message):
            call()
