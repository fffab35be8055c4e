"""LoftQ against Algorithm 1 of the paper, written in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lora

NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
])  # fmt: skip
NOTHING = {"w": None}


def nf4(w, block):
    """Quantised along dim 0 and dequantised again, in float64: (in, out) to (in, out)."""
    blocks = w.reshape(-1, block, w.shape[1])
    scale = np.abs(blocks).max(1, keepdims=True)
    codes = np.abs(blocks[..., None] / scale[..., None] - NF4).argmin(-1)
    return (NF4[codes] * scale).reshape(w.shape)


def algorithm_1(w, rank, block, steps):
    """(Q, A·B) of one matrix."""
    low_rank = np.zeros_like(w)
    for _ in range(steps):
        q = nf4(w - low_rank, block)
        u, s, vt = np.linalg.svd(w - q, full_matrices=False)
        low_rank = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return q, low_rank


@pytest.fixture
def stack():
    """(layers, in, out), of a scale of its own each."""
    rng = np.random.default_rng(0)
    return {"w": jnp.asarray(rng.normal(size=(3, 32, 24)) * [[[1]], [[2]], [[0.1]]], jnp.float32)}


AXES = {"w": lora.Axes(batch=(0,), contract=(1,), out=(2,))}


@pytest.mark.parametrize("steps", [1, 3])
def test_is_algorithm_1_of_each_layer(stack, steps):
    rule = lora.LoRA("w", rank=4, alpha=12, init="loftq")
    base, factors = lora.loftq(jax.random.key(0), stack, rule, axes=AXES, block=16, steps=steps)
    q = lora.merge(base, NOTHING)["w"]
    node = factors["w"]
    low_rank = 3.0 * np.einsum("lir,lro->lio", node.a, node.b)
    for layer, w in enumerate(np.asarray(stack["w"], np.float64)):
        wanted_q, wanted = algorithm_1(w, 4, 16, steps)
        np.testing.assert_allclose(q[layer], wanted_q, atol=2e-4)
        np.testing.assert_allclose(low_rank[layer], wanted, atol=2e-3)


def test_starts_nearer_and_further_steps_help(stack):
    def distance(steps):
        rule = lora.LoRA("w", rank=6, alpha=3, init="loftq")
        base, factors = lora.loftq(jax.random.key(0), stack, rule, axes=AXES, block=16, steps=steps)
        merged = lora.merge(base, factors)["w"]
        return [float(jnp.linalg.norm((merged - stack["w"])[layer])) for layer in range(3)]

    alone = lora.merge(lora.quantize(stack, "w", block=16), NOTHING)["w"]
    alone = [float(jnp.linalg.norm((alone - stack["w"])[layer])) for layer in range(3)]
    once, often = distance(1), distance(5)
    assert all(near < 0.8 * far for near, far in zip(once, alone, strict=True))
    assert sum(often) < sum(once)


def test_the_function_computes_what_the_merged_one_computes(stack):
    def apply(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w @ w.T), None), x, params["w"])[0]

    rule = lora.LoRA("w", rank=4, alpha=12, init="loftq")
    base, factors = lora.loftq(jax.random.key(0), stack, rule, axes=AXES, block=16)
    x = jnp.ones((2, 32)) / 8
    wanted = apply(lora.merge(base, factors), x)
    np.testing.assert_allclose(lora.wrap(apply)(base, factors, x), wanted, atol=1e-5)
    trained = jax.tree.leaves(lora.trainable_mask(factors))
    assert trained == [True, True]


def test_dora_starts_at_the_same_weight():
    w = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(32, 24)), jnp.float32)}
    made = [
        lora.loftq(jax.random.key(0), w, kind("w", rank=4, alpha=8, init="loftq"), block=16)
        for kind in (lora.LoRA, lora.DoRA)
    ]
    low_rank, dora = (lora.merge(*pair)["w"] for pair in made)
    np.testing.assert_allclose(low_rank, dora, atol=1e-5)
    np.testing.assert_allclose(
        made[1][1]["w"].magnitude, np.linalg.norm(low_rank, axis=0), rtol=1e-5
    )


def test_other_rules_do_what_they_do_in_init():
    params = {"w": jnp.ones((32, 8)), "head": jnp.ones((8, 3)), "bias": jnp.zeros(3)}
    rules = [lora.LoRA("w", rank=2, init="loftq"), lora.LoRA("head", rank=1), lora.Full("bias")]
    base, factors = lora.loftq(jax.random.key(0), params, rules, block=8, dtype="int8")
    assert base["head"] is params["head"]
    alone = lora.init(jax.random.key(0), params, rules[1:])
    assert jax.tree.structure(factors["head"]) == jax.tree.structure(alone["head"])
    np.testing.assert_array_equal(factors["head"].a, alone["head"].a)
    assert factors["bias"].delta.shape == (3,)


def test_small_float16_weights(getkey):
    w = (0.02 * jax.random.normal(getkey(), (256, 64))).astype(jnp.float16)
    rule = lora.LoRA("w", rank=2, init="loftq")
    base, factors = lora.loftq(getkey(), {"w": w}, rule, dtype=jnp.int8)
    assert base["w"].dtype == jnp.float16
    error = lora.quantization_error({"w": w}, base)["w"]
    assert error < 0.01
    merged = lora.merge(base, factors)["w"]
    assert jnp.linalg.norm((merged - w).astype(jnp.float32)) < 0.01 * jnp.linalg.norm(
        w.astype(jnp.float32)
    )


def test_works_under_jit(stack):
    rule = lora.LoRA("w", rank=4, alpha=12, init="loftq")

    def make(key, params):
        return lora.loftq(key, params, rule, axes=AXES, block=16)

    eager, compiled = make(jax.random.key(0), stack), jax.jit(make)(jax.random.key(0), stack)
    assert jax.tree.structure(eager) == jax.tree.structure(compiled)
    np.testing.assert_allclose(lora.merge(*eager)["w"], lora.merge(*compiled)["w"], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 is below 1; wanted at least 1."),
        ({"steps": 1.5}, "steps=1.5; wanted an integer."),
        ({"block": 0}, "block=0; wanted an integer of at least 1, such as 64."),
        ({"dtype": "fp4"}, "dtype='fp4' is unknown; wanted one of"),
        ({"block": 5}, "block=5 divides no dim of 'w' of shape [3, 32, 24]."),
    ],
)
def test_refuses(stack, options, message):
    rule = lora.LoRA("w", rank=4, init="loftq")
    with pytest.raises(lora.LoraError) as caught:
        lora.loftq(jax.random.key(0), stack, rule, axes=AXES, **options)
    assert message in str(caught.value)


def test_init_names_loftq(stack):
    with pytest.raises(lora.LoraError, match=r"wanted base, factors = lora\.loftq\(key, params"):
        lora.init(jax.random.key(0), stack, lora.LoRA("w", init="loftq"), axes=AXES)


def test_wants_a_rule_that_says_so(stack):
    with pytest.raises(lora.LoraError, match="no rule has init='loftq'"):
        lora.loftq(jax.random.key(0), stack, lora.LoRA("w"), axes=AXES)
