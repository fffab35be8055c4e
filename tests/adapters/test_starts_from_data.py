"""EVA, CorDA and LoRA-GA against their papers' formulas, in numpy, on collected inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lorax_fn as lora
from tests.battery.taint import sub_jaxprs

RANK, ALPHA = 3, 7.5
SCALE = ALPHA / RANK
LOOKING = ["eva", "corda", "corda_kpm", "lora_ga"]


def start(init, apply_fn, params, batches, rank=RANK, targets="w", **options):
    rules = [lora.LoRA(targets, rank=rank, alpha=ALPHA * rank / RANK, init=init)]
    return lora.init(
        jax.random.key(3),
        params,
        rules,
        apply_fn=apply_fn,
        batches=batches,
        progress=False,
        **options,
    )


def skewed(key, *shape):
    """Data whose directions differ in size, as activations' do."""
    return falling(jax.random.normal(key, shape), 0.5)


def falling(x, base):
    """Column i of x times the i-th power of base."""
    powers = base ** np.arange(x.shape[-1])
    return x * jnp.asarray(powers.reshape((1,) * (x.ndim - 1) + (-1,)), x.dtype)


def directions(inputs, rank):
    """The leading right singular vectors of all inputs."""
    return np.linalg.svd(np.asarray(inputs, np.float64), full_matrices=False)[2][:rank].T


def assert_same_columns(got, wanted, atol=1e-3):
    """Equal, each up to its sign."""
    inner = np.asarray(got, np.float64).T @ wanted
    np.testing.assert_allclose(np.abs(inner), np.eye(inner.shape[0]), atol=atol)


def linear(params, x):
    return x @ params["w"]


@pytest.fixture
def data(getkey):
    """A matrix and two batches of its inputs."""
    w = jax.random.normal(getkey(), (8, 7))
    return {"w": w}, [(skewed(getkey(), 5, 4, 8),), (skewed(getkey(), 6, 8),)]


def all_rows(batches):
    return np.concatenate([np.reshape(x, (-1, x.shape[-1])) for (x,) in batches])


def squares(params, x):
    """A loss whose gradient is no multiple of the inputs."""
    return jnp.sum(falling(jnp.tanh(x @ params["w"]) ** 2, 0.7))


# ------------------------------------------------------------------------------------------
# The formulas


def test_eva_takes_the_inputs_leading_directions(data):
    params, batches = data
    node = start("eva", linear, params, batches)["w"]
    assert_same_columns(node.a, directions(all_rows(batches), RANK))
    assert node.b.shape == (RANK, 7)
    assert not node.b.any()
    assert node.start is None


def test_eva_finds_few_directions_among_many(getkey):
    """13 columns for 300 dims, within three passes over the batches."""
    noise, x = jax.random.normal(getkey(), (2, 400, 300))
    x = noise + falling(20 * x, 0.8)
    params = {"w": jax.random.normal(getkey(), (300, 7))}
    node = start("eva", linear, params, [x[:200], x[200:]])["w"]
    assert_same_columns(node.a, directions(x, RANK))


def test_eva_is_not_blinded_by_a_massive_activation(getkey):
    """One input a thousand times the others: in a float32 covariance it would drown them."""
    x = jax.random.normal(getkey(), (500, 20)) * jnp.array([[3e3, 4.0, 2.0, *[0.1] * 17]])
    params = {"w": jax.random.normal(getkey(), (20, 7))}
    node = start("eva", linear, params, [x])["w"]
    assert_same_columns(node.a, directions(x, RANK), atol=1e-2)


def corda(w, rows, chosen):
    """s·A·B, in PyTorch's layout as the paper has it."""
    c = rows.T @ rows
    c = c / np.trace(c) * len(c)
    c += 0.01 * np.eye(len(c))
    u, s, vt = np.linalg.svd(w.T @ c, full_matrices=False)
    return ((u[:, chosen] * s[chosen]) @ (vt[chosen] @ np.linalg.inv(c))).T


@pytest.mark.parametrize(
    ("init", "chosen"), [("corda", slice(0, RANK)), ("corda_kpm", slice(7 - RANK, 7))]
)
def test_corda_takes_a_part_of_the_weight(data, init, chosen):
    params, batches = data
    node = start(init, linear, params, batches)["w"]
    wanted = corda(np.asarray(params["w"], np.float64), all_rows(batches), chosen)
    np.testing.assert_allclose(SCALE * node.a @ node.b, wanted, atol=2e-4)


def test_lora_ga_takes_the_gradients_directions(data):
    params, batches = data
    node = start("lora_ga", squares, params, batches)["w"]
    gradient = sum(jax.grad(squares)(params, *batch)["w"] for batch in batches)
    u, _, vt = np.linalg.svd(np.asarray(gradient, np.float64))
    size = 7**0.25 / 4  # the fourth root of out, by the root of gamma = 16
    assert_same_columns(node.a / size, u[:, :RANK])
    assert_same_columns(node.b.T / size, vt[RANK : 2 * RANK].T)


def test_lora_ga_finds_a_large_gradients_directions(getkey):
    """16 columns for 200 × 100, where singular values fall off as those of gradients do."""
    w, x = jax.random.normal(getkey(), (200, 100)) / 14, jax.random.normal(getkey(), (300, 200))
    x = falling(x, 0.8)

    def loss(params, x):
        return jnp.sum(falling(jnp.sin(3 * x @ params["w"]), 0.8))

    node = start("lora_ga", loss, {"w": w}, [x])["w"]
    u, _, vt = np.linalg.svd(np.asarray(jax.grad(loss)({"w": w}, x)["w"], np.float64))
    size = 100**0.25 / 4
    assert_same_columns(node.a / size, u[:, :RANK], atol=2e-2)
    assert_same_columns(node.b.T / size, vt[RANK : 2 * RANK].T, atol=2e-2)


# ------------------------------------------------------------------------------------------
# Wherever a weight is used


def test_layers_of_a_scan_see_their_own_inputs(getkey):
    stack = jax.random.normal(getkey(), (4, 8, 8)) / 3
    x = skewed(getkey(), 50, 8)

    @jax.checkpoint
    def layer(x, w):
        return falling(jnp.tanh(x @ w), 0.7), x

    def scanned(params, x):
        return lax.scan(layer, x, params["w"])[0]

    axes = lora.infer_axes(scanned, {"w": stack}, x)
    node = start("eva", scanned, {"w": stack}, [x], axes=axes)["w"]
    _, inputs = lax.scan(layer, x, stack)
    for a, rows in zip(node.a, inputs, strict=True):
        assert_same_columns(a, directions(rows, RANK))


def test_a_convolution_sees_patches(getkey):
    kernel = jax.random.normal(getkey(), (3, 2, 5))  # width, in, out
    x = skewed(getkey(), 6, 9, 2)

    def conv(params, x):
        return lax.conv_general_dilated(
            x, params["w"], (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )

    axes = lora.infer_axes(conv, {"w": kernel}, x)
    node = start("eva", conv, {"w": kernel}, [x], axes=axes)["w"]
    patches = np.stack([x[:, i : i + 3] for i in range(0, 7, 2)], 1).reshape(-1, 6)
    assert_same_columns(node.a.reshape(6, RANK), directions(patches, RANK))


def test_experts_see_their_own_rows(getkey):
    experts = jax.random.normal(getkey(), (2, 8, 5))
    x = skewed(getkey(), 30, 8)
    sizes = jnp.array([18, 12])

    def routed(params, x):
        return lax.ragged_dot(x, params["w"], sizes)

    axes = lora.infer_axes(routed, {"w": experts}, x)
    node = start("eva", routed, {"w": experts}, [x], axes=axes)["w"]
    for a, rows in zip(node.a, (x[:18], x[18:]), strict=True):
        assert_same_columns(a, directions(rows, RANK))


def test_several_out_and_contract_dims(getkey):
    params = {"w": jax.random.normal(getkey(), (2, 4, 3, 2))}  # out, contract, out, contract

    def apply(params, x):
        return jnp.einsum("nij,oipj->nop", x, params["w"])

    x = skewed(getkey(), 40, 4, 2)
    axes = lora.infer_axes(apply, params, x)
    for init in ("eva", "corda", "lora_ga"):
        loss = (lambda p, x: jnp.sum(apply(p, x) ** 2)) if init == "lora_ga" else apply
        node = start(init, loss, params, [x], axes=axes)["w"]
        assert node.a.shape == (4, 2, RANK)
        assert node.b.shape == (RANK, 2, 3)
    flat = np.reshape(x, (40, 8))
    eva = start("eva", apply, params, [x], axes=axes)["w"]
    assert_same_columns(eva.a.reshape(8, RANK), directions(flat, RANK))


def test_rules_of_several_kinds_in_one_go(getkey):
    """A later layer's inputs, an earlier layer's gradient, and a rule that looks at nothing."""
    params = {name: jax.random.normal(getkey(), (8, 8)) / 3 for name in ("ga", "eva", "drawn")}
    x = skewed(getkey(), 40, 8)

    def hidden(params, x):
        return jnp.tanh(x @ params["ga"])

    def loss(params, x):
        return jnp.sum((jnp.tanh(hidden(params, x) @ params["eva"]) @ params["drawn"]) ** 2)

    rules = [
        lora.LoRA("ga", rank=2, alpha=3, init="lora_ga"),
        lora.DoRA("eva", rank=RANK, alpha=ALPHA, init="eva"),
        lora.LoRA("drawn", rank=2, alpha=3),
    ]
    key = jax.random.key(5)
    factors = lora.init(key, params, rules, apply_fn=loss, batches=[x, x], progress=False)
    assert_same_columns(factors["eva"].a, directions(hidden(params, x), RANK))
    u = np.linalg.svd(np.asarray(jax.grad(loss)(params, x)["ga"], np.float64))[0]
    assert_same_columns(factors["ga"].a / (8**0.25 / 4), u[:, :2])
    drawn = lora.init(key, {"drawn": params["drawn"]}, rules[2:])
    np.testing.assert_array_equal(factors["drawn"].a, drawn["drawn"].a)
    np.testing.assert_allclose(lora.wrap(loss)(params, factors, x), loss(params, x), rtol=1e-6)


# ------------------------------------------------------------------------------------------
# What holds for all


@pytest.mark.parametrize("init", LOOKING)
def test_training_starts_at_the_base(data, init):
    params, batches = data
    factors = start(init, squares, params, batches)
    np.testing.assert_array_equal(lora.merge(params, factors)["w"], params["w"])
    got = lora.wrap(linear)(params, factors, batches[0][0])
    np.testing.assert_array_equal(got, linear(params, batches[0][0]))
    assert lora.trainable_mask(factors)["w"].a
    assert lora.trainable_mask(factors)["w"].start in (None, (False, False))


@pytest.mark.parametrize("init", LOOKING)
def test_starts_under_jit_as_outside(data, init):
    params, batches = data
    outside = start(init, squares, params, batches)["w"]
    inside = jax.jit(lambda p, b: start(init, squares, p, b))(params, batches)["w"]
    np.testing.assert_allclose(inside.a @ inside.b, outside.a @ outside.b, atol=1e-4)
    abstract = jax.eval_shape(lambda p, b: start(init, squares, p, b), params, batches)["w"]
    assert (abstract.a.shape, abstract.b.shape) == ((8, RANK), (RANK, 7))


def test_other_arguments_stay_what_they_are(data):
    """Strings, bools and numbers are static, and 1 is not True."""
    params, batches = data
    seen = []

    def apply(params, x, mode, train, n):
        seen.append((mode, train, n))
        return x @ params["w"] if train is True else None

    (x,) = batches[0]
    start("eva", apply, params, [(x, "mean", True, 1)])
    assert set(seen) == {("mean", True, 1)}


def test_no_dense_gradient_is_formed():
    """LoRA-GA sees ∂L/∂W only times a few vectors."""
    x = jnp.ones((50, 300))

    def loss(params, x):
        return jnp.sum(jnp.tanh(x @ params["w"]) ** 2)

    jaxpr = jax.make_jaxpr(lambda w: start("lora_ga", loss, {"w": w}, [x])["w"].a)
    products = _products(jaxpr(jnp.ones((300, 200))).jaxpr)
    assert (2 * RANK + 10, 300) in products
    assert (200, 300) not in products


def _products(jaxpr):
    """The lengths, sorted, of all matrix products, those of inner jaxprs included."""
    shapes = set()
    for eqn in jaxpr.eqns:
        if "dot" in eqn.primitive.name:
            shapes |= {tuple(sorted(n for n in v.aval.shape if n > 1)) for v in eqn.outvars}
        for inner in sub_jaxprs(eqn.params):
            shapes |= _products(inner)
    return shapes


def test_a_progress_bar_is_shown_unless_unwanted(data, capsys):
    params, batches = data
    rules = [lora.LoRA("w", rank=2, init="eva")]
    lora.init(jax.random.key(0), params, rules, apply_fn=linear, batches=batches)
    assert "6/6" in capsys.readouterr().err
    start("eva", linear, params, batches)
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------
# Bad input


def message_of(init, apply_fn, params, batches, **options):
    with pytest.raises(lora.LoraError) as caught:
        start(init, apply_fn, params, batches, **options)
    return str(caught.value)


@pytest.mark.parametrize("init", LOOKING)
def test_without_batches(data, init):
    message = message_of(init, None, data[0], None)
    assert f"init='{init}' looks at data" in message
    name = "loss_fn" if init == "lora_ga" else "apply_fn"
    assert f"apply_fn={name}, batches=[(x,), …]" in message


def test_half_of_what_is_needed(data):
    params, batches = data
    assert "batches is missing" in message_of("eva", linear, params, None)
    assert "apply_fn is missing" in message_of("eva", None, params, batches)
    assert "batches are empty" in message_of("eva", linear, params, [])
    assert "batches=[x]" in message_of("eva", linear, params, batches[0][0])
    assert "apply_fn is of type int" in message_of("eva", 3, params, batches)


def test_batches_that_nothing_looks_at(data):
    assert "no rule looks at data" in message_of("kaiming", linear, *data)


def test_lora_ga_of_something_that_is_no_loss(data):
    message = message_of("lora_ga", linear, *data)
    assert "(5, 4, 7)" in message
    assert "one floating scalar" in message


def test_lora_ga_of_a_rank_that_leaves_b_no_vectors(data):
    message = message_of("lora_ga", squares, *data, rank=4)
    assert "rank=4 is above 3" in message
    assert "'w'" in message


def test_a_weight_that_sees_nothing(getkey):
    params = {"w": jax.random.normal(getkey(), (9, 5))}
    ids = jnp.array([1, 4, 7])
    message = message_of("eva", lambda p, ids: p["w"][ids], params, [ids])
    assert "'w' sees nothing of the batches" in message
    assert "looked up" in message


def test_batches_that_are_not_finite(data):
    params, batches = data
    spoilt = [(x.at[0, 0].set(jnp.nan),) for (x,) in batches]
    assert "'w' sees of the batches is not finite" in message_of("eva", linear, params, spoilt)


def test_a_result_that_cannot_be_differentiated(data):
    message = message_of("eva", lambda p, x: jnp.argmax(x @ p["w"], -1), *data)
    assert "returns no floating array" in message


def test_abstract_params(data):
    params = {"w": jax.ShapeDtypeStruct((8, 7), jnp.float32)}
    assert "params are abstract" in message_of("eva", linear, params, data[1])


def test_an_expert_that_sees_nothing_starts_finite(getkey):
    params = {"w": jax.random.normal(getkey(), (2, 8, 5))}
    x = skewed(getkey(), 2, 30, 8).at[1].set(0)
    apply = lambda p, x: jnp.einsum("end,edf->enf", x, p["w"])
    axes = lora.infer_axes(apply, params, x)
    for init in ("eva", "corda", "corda_kpm"):
        node = start(init, apply, params, [x], axes=axes)["w"]
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(node))


def test_a_batch_that_is_a_list_is_one_argument_and_the_error_says_so(data):
    params, batches = data
    pair = [batches[0][0], jnp.ones(())]
    with pytest.raises(TypeError) as caught:
        start("eva", lambda p, x, y: x @ p["w"] * y, params, [pair])
    assert "a batch of 1: list. A tuple is spread" in " ".join(caught.value.__notes__)
