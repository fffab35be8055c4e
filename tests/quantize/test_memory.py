"""Between the forward and the backward pass the codes are kept, and no floating weight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_fn as lora
from benchmarks.model import Config, Transformer
from lorax_fn.flops import count_flops

pytestmark = pytest.mark.optimized

WIDTH, LAYERS = 256, 3
MATRICES = r".*/(query|key|value|out|up|down|head)/kernel|.*/embedding"
KERNELS = r".*/(query|key|value|out|up|down)/kernel"
LARGEST = 4 * WIDTH * WIDTH * 4  # bytes of one up or down kernel
STRUCTURES = ["plain", "scan", "remat"]


@functools.cache
def model(structure):
    module = Transformer(Config(structure=structure, layers=LAYERS, width=WIDTH))
    tokens = jnp.arange(16).reshape(2, 8)
    params = module.init(jax.random.key(0), tokens)
    axes = lora.infer_axes(module.apply, params, tokens)
    return module.apply, params, axes, tokens


def base_and_factors(structure, dtype):
    _, params, axes, _ = model(structure)
    base = params if dtype is None else lora.quantize(params, MATRICES, dtype=dtype)
    return base, lora.init(jax.random.key(0), base, lora.LoRA(KERNELS, rank=2, alpha=3), axes=axes)


def step_of(structure):
    wrapped = lora.wrap(model(structure)[0], dense="error")

    def step(base, factors, tokens):
        def loss(factors):
            logits = wrapped(base, factors, tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

        return jax.value_and_grad(loss)(factors)

    return step


@functools.cache
def compiled(structure, dtype):
    operands = (*base_and_factors(structure, dtype), model(structure)[-1])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.jit(step_of(structure)).lower(*operands).compile()


def temporaries(structure, dtype):
    return compiled(structure, dtype).memory_analysis().temp_size_in_bytes


def dense_bytes(structure):
    """Of all matrices that are quantised, as floating arrays."""
    base, _ = base_and_factors(structure, "nf4")
    quantised = lora.quantization_error(model(structure)[1], base)
    leaves = jax.tree_util.tree_leaves_with_path(model(structure)[1])
    paths = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return sum(paths[path].nbytes for path in quantised)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_step_takes_two_weights_more_than_on_a_floating_base_and_not_all(structure):
    """At a time one weight is there, and what it is transposed to; XLA:CPU unpacks 4 bits to 8."""
    more = temporaries(structure, "nf4") - temporaries(structure, None)
    unpacked = dense_bytes(structure) // 4 if structure == "scan" else 0
    assert dense_bytes(structure) > 9 * LARGEST
    assert more <= 2 * LARGEST + unpacked


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_whole_step_needs_less(structure):
    def peak(dtype):
        memory = compiled(structure, dtype).memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes

    saved = peak(None) - peak("nf4")
    assert saved > 0.5 * dense_bytes(structure)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_product_is_computed_again(structure):
    def count(dtype):
        operands = (*base_and_factors(structure, dtype), model(structure)[-1])
        return count_flops(jax.make_jaxpr(step_of(structure))(*operands))

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert count("nf4") == count(None)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_the_pullback_keeps(structure):
    """The leaves of a pullback are what JAX keeps for it."""
    apply, _, _, tokens = model(structure)
    wrapped = lora.wrap(apply, dense="error")

    def kept(dtype):
        base, factors = base_and_factors(structure, dtype)
        _, pullback = jax.vjp(lambda factors: wrapped(base, factors, tokens), factors)
        return jax.tree.leaves(pullback)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        floating, codes = kept(None), kept("nf4")
    assert any(leaf.size >= WIDTH * WIDTH and leaf.dtype == jnp.float32 for leaf in floating)
    assert not any(leaf.size >= WIDTH * WIDTH and leaf.dtype == jnp.float32 for leaf in codes)
    assert sum(leaf.size for leaf in codes if leaf.dtype == jnp.uint4) >= WIDTH * WIDTH


def test_the_check_sees_a_weight_that_is_dequantised_too_soon():
    """Guards the guard: the same model on params dequantised outside of it."""
    apply, params, _, tokens = model("plain")
    base, factors = base_and_factors("plain", "int8")
    wrapped = lora.wrap(apply, dense="error")
    nothing = jax.tree.map(lambda _: None, params)

    def loss(factors, base):
        return jnp.square(wrapped(lora.merge(base, nothing), factors, tokens)).mean()

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        soon = jax.jit(jax.grad(loss)).lower(factors, base).compile()
    more = soon.memory_analysis().temp_size_in_bytes - temporaries("plain", None)
    assert more > 4 * LARGEST


def test_rows_alone_are_dequantised_of_an_embedding():
    table = {"table": jax.random.normal(jax.random.key(0), (4096, 128))}
    for block in (64, 128):  # along the vocabulary, which both divide
        base = lora.quantize(table, "table", dtype="int8", block=block)
        wrapped = lora.wrap(lambda params, ids: params["table"][ids], dense="error")
        ids = jnp.array([[5, 4095, 17]])
        look = jax.jit(lambda base, ids, wrapped=wrapped: wrapped(base, {"table": None}, ids))
        memory = look.lower(base, ids).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 64 * 1024
        wanted = lora.merge(base, {"table": None})["table"][ids]
        np.testing.assert_array_equal(look(base, ids), wanted)


def test_policies_of_checkpoint_see_the_product():
    """`dots_saveable` keeps x·W, and not W."""
    params = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    base = lora.quantize(params, "w", dtype="int8")
    wrapped = lora.wrap(lambda params, x: jnp.sin(x @ params["w"]))
    x = jnp.ones((8, 64))

    _, pullback = jax.vjp(
        jax.checkpoint(
            lambda x: wrapped(base, {"w": None}, x), policy=jax.checkpoint_policies.dots_saveable
        ),
        x,
    )
    kept = [leaf.shape for leaf in jax.tree.leaves(pullback) if leaf.dtype == jnp.float32]
    assert (8, 64) in kept
    assert (64, 64) not in kept
