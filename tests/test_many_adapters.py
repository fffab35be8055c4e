"""Many adapters trained in one step over one frozen base are what they would be alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_fn as lora
from benchmarks import flops

VOCABULARY, WIDTH, CLASSES, STEPS = 11, 16, 5, 6


@pytest.fixture
def params(getkey):
    shapes = {"embed": (VOCABULARY, WIDTH), "w": (3, WIDTH, WIDTH), "head": (WIDTH, CLASSES)}
    return {name: jax.random.normal(getkey(), shape) / 2 for name, shape in shapes.items()}


def model(params, tokens):
    """A lookup, three scanned layers under remat, a head."""
    layer = jax.checkpoint(lambda x, w: (x + jnp.tanh(x @ w), None))
    x, _ = jax.lax.scan(layer, params["embed"][tokens], params["w"])
    return x.mean(1) @ params["head"]


apply = lora.wrap(model, dense="error")


def make(getkey, params, rank, alpha):
    axes = lora.infer_axes(model, params, jnp.zeros((1, 2), jnp.int32))
    rules = [lora.LoRA("embed|w", rank=rank, alpha=alpha), lora.Full("head")]
    return lora.init(getkey(), params, rules, axes=axes)


def loss_of(factors, params, tokens, labels):
    logits = apply(params, factors, tokens)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def data_of(getkey, adapters):
    """A batch of its own for each adapter and step: (adapters, steps, batch, …)."""
    tokens = jax.random.randint(getkey(), (adapters, STEPS, 8, 4), 0, VOCABULARY)
    return tokens, tokens[..., 0] % CLASSES


def train(factors, rate, params, tokens, labels, loss_of=loss_of):
    """The factors after the last step, and the losses; Adam at a rate that may be traced."""
    tx = lora.freeze(optax.inject_hyperparams(optax.adamw)(learning_rate=rate))

    def step(carry, batch):
        factors, state = carry
        value, grads = jax.value_and_grad(loss_of)(factors, params, *batch)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, state = tx.update(grads, state, factors)
        return (optax.apply_updates(factors, updates), state), value

    state = tx.init(factors)
    (factors, _), losses = jax.lax.scan(step, (factors, state), (tokens, labels))
    return factors, losses


def test_each_learns_what_it_learns_alone(getkey, params):
    """With data, a learning rate and a rank of its own."""
    ranks, rates = (3, 1), jnp.array([1e-2, 3e-2])
    each = [make(getkey, params, rank, 1.5 * rank) for rank in ranks]
    tokens, labels = data_of(getkey, 2)
    together = jax.jit(jax.vmap(train, in_axes=(0, 0, None, 0, 0)))
    factors, losses = together(lora.stack(each), rates, params, tokens, labels)
    assert losses.shape == (2, STEPS)
    for i, alone in enumerate(each):
        wanted, wanted_losses = jax.jit(train)(alone, rates[i], params, tokens[i], labels[i])
        np.testing.assert_allclose(losses[i], wanted_losses, rtol=1e-5)
        got = lora.take(factors, i)
        merged, alone_merged = lora.merge(params, got), lora.merge(params, wanted)
        for name in params:
            assert np.abs(merged[name] - params[name]).max() > 1e-3  # it moved
            np.testing.assert_allclose(merged[name], alone_merged[name], atol=1e-4)
        for name in ("embed", "w"):  # what a smaller rank was padded with stays zero
            assert not got[name].a[..., ranks[i] :].any()
            assert not got[name].b[..., ranks[i] :, :].any()


def scaled(factors, scale):
    """The factors at a scale that is an array: B times it, as the loss sees it."""
    return {
        name: dataclasses.replace(node, b=node.b * scale) if name != "head" else node
        for name, node in factors.items()
    }


def test_scales_of_their_own_are_multiplied_inside_the_loss(getkey, params):
    """One alpha at several ranks: Adam then moves B as it does in a run alone."""
    alpha, ranks = 6.0, (2, 1)
    tokens, labels = data_of(getkey, 2)
    rate = jnp.asarray(1e-2)
    key = getkey()
    fresh = lambda rank, alpha: make(lambda: key, params, rank, alpha)
    stacked = lora.stack([fresh(rank, None) for rank in ranks])
    assert stacked["w"].scale == 1.0

    def train_scaled(factors, scale, tokens, labels):
        loss = lambda factors, *rest: loss_of(scaled(factors, scale), *rest)
        return train(factors, rate, params, tokens, labels, loss)

    scales = alpha / jnp.array(ranks, jnp.float32)
    _, losses = jax.jit(jax.vmap(train_scaled))(stacked, scales, tokens, labels)
    for i, rank in enumerate(ranks):
        _, wanted = jax.jit(train)(fresh(rank, alpha), rate, params, tokens[i], labels[i])
        np.testing.assert_allclose(losses[i], wanted, rtol=1e-5)


def products(jaxpr, shape):
    """How many products have an operand of a shape, in a jaxpr and all that it calls."""
    found = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found += shape in [v.aval.shape for v in eqn.invars]
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=has_equations):
            if has_equations(value):
                found += products(getattr(value, "jaxpr", value), shape)
    return found


def has_equations(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def shapes_of(jaxpr):
    """The shapes of everything that is computed."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars if hasattr(v.aval, "shape"))
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=has_equations):
            if has_equations(value):
                yield from shapes_of(getattr(value, "jaxpr", value))


def test_a_step_multiplies_with_the_base_once_on_the_joint_batch(getkey, params):
    """As often as a step of one adapter does, and with no copy of the base for each of them."""
    n = 5
    stacked = lora.stack([make(getkey, params, rank, 3 * rank) for rank in (2, 4, 1, 2, 3)])
    tokens = jnp.ones((n, 8, 4), jnp.int32)
    labels = jnp.ones((n, 8), jnp.int32)
    step = jax.value_and_grad(loss_of)
    many = jax.make_jaxpr(jax.vmap(step, in_axes=(0, None, 0, 0)))(stacked, params, tokens, labels)
    one = jax.make_jaxpr(step)(lora.take(stacked, 0), params, tokens[0], labels[0])
    base = (WIDTH, WIDTH)
    assert products(many.jaxpr, base) == products(one.jaxpr, base) > 0
    copies = {(n, *base), (n, 3, *base), (n, VOCABULARY, WIDTH)}
    assert not copies.intersection(shapes_of(many.jaxpr))


@pytest.mark.optimized
def test_a_step_costs_the_joint_batch_and_the_factors(getkey):
    """FLOPs of eight adapters: less than of eight runs' steps, and of one run on all the data."""
    n, width, rank = 8, 128, 4
    params = {"w": jax.random.normal(getkey(), (width, width))}
    loss = lambda f, x: jnp.square(lora.wrap(lambda p, x: x @ p["w"])(params, f, x)).sum()
    each = [lora.init(getkey(), params, [lora.LoRA("w", rank=rank, alpha=3)]) for _ in range(n)]

    def cost(function, *operands):
        return flops.count(jax.jit(function).lower(*operands).compile().as_text())

    xs = jnp.ones((n, 32, width))
    together = cost(jax.vmap(jax.grad(loss)), lora.stack(each), xs)
    alone = cost(jax.grad(loss), each[0], xs[0])
    joint = cost(jax.grad(loss), each[0], xs.reshape(n * 32, width))
    assert together <= 1.01 * n * alone
    assert together <= 1.01 * joint
    assert 2 * n * 32 * width * width < together
