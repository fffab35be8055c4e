"""Plain functions on lists and dicts of arrays: loops, routing, fused kernels, inner gradients."""

import jax
import jax.numpy as jnp

from .harness import Model, ModelCase, random_params

WIDTH, LENGTH, BATCH = 8, 5, 2
X = jax.random.normal(jax.random.key(13), (BATCH, LENGTH, WIDTH))


def arrays(*shapes):
    return random_params([jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])


def mlp(params, x):
    """A list of matrices, the last one applied from the left."""
    for weight in params[:-1]:
        x = jnp.tanh(x @ weight)
    return params[-1] @ jnp.swapaxes(x, -1, -2)


def rotated(params, x):
    """A fused q/k/v kernel: split, halves swapped (as for rotary embeddings), joined, applied."""
    query, key, value = jnp.split(params["qkv"], 3, axis=1)
    swapped = jnp.concatenate([query[:, WIDTH // 2 :], query[:, : WIDTH // 2]], axis=1)
    fused = jnp.concatenate([swapped, 0.5 * key, -value], axis=1)
    q, k, v = jnp.split(x @ fused, 3, axis=-1)
    return jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2)) @ v @ params["out"].T


def loop_over_stack(params, x):
    """`fori_loop` that indexes the layer stack."""
    return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ params["layers"][i]), x)


def switch_experts(params, x, experts):
    """Experts as branches of a `lax.switch` that close over their weights, example by example."""
    branches = [lambda x, w=w: jnp.tanh(x @ w) for w in params]
    return jax.lax.map(lambda pair: jax.lax.switch(pair[0], branches, pair[1]), (experts, x))


def routed_by_index(params, x, experts):
    """Each example fetches the matrix of its own expert."""
    return jnp.einsum("bld,bdf->blf", x, params["experts"][experts])


def mapped_experts(params, x):
    """All experts by `lax.map`, each under `jax.checkpoint`, mixed by a learned router."""
    expert = jax.checkpoint(lambda w: jax.nn.silu(x @ w[0]) @ w[1])
    outputs = jax.lax.map(expert, (params["up"], params["down"]))  # (E, B, L, D)
    return jnp.einsum("eblf,ble->blf", outputs, jax.nn.softmax(x @ params["router"]))


def state_space(params, x):
    """A diagonal linear recurrence by `associative_scan`, with input-dependent decay (as Mamba)."""
    u = x @ params["in_proj"]
    decay = jax.nn.sigmoid(x @ params["decay_proj"])
    _, states = jax.lax.associative_scan(
        lambda left, right: (left[0] * right[0], right[0] * left[1] + right[1]),
        (decay, (1 - decay) * u),
        axis=1,
    )
    return (states * jax.nn.silu(x @ params["gate_proj"])) @ params["out_proj"]


def with_inner_grad(params, x):
    """A force field: the output is a gradient with respect to the input, taken inside."""

    def energy(x):
        return jnp.sum(jnp.tanh(x @ params["first"]) @ params["second"])

    return jax.grad(energy)(x)


def stack_of(**shapes):
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return random_params(shapes)


SSM = dict.fromkeys(("in_proj", "decay_proj", "gate_proj"), (WIDTH, 12)) | {"out_proj": (12, WIDTH)}
CASES = [
    ModelCase(
        "list of matrices", lambda: Model(mlp, arrays((8, 12), (12, 12), (3, 12)), [X]), r"\d", 3
    ),
    ModelCase(
        "fused, split and rejoined kernel",
        lambda: Model(rotated, stack_of(qkv=(8, 24), out=(6, 8)), [X]),
        "qkv|out",
        2,
    ),
    ModelCase(
        "fori_loop over a stack",
        lambda: Model(loop_over_stack, stack_of(layers=(3, 8, 8)), [X]),
        "layers",
        1,
    ),
    ModelCase(
        "experts by switch",
        lambda: Model(switch_experts, arrays((8, 6), (8, 6)), [X, jnp.array([1, 0])]),
        r"\d",
        2,
    ),
    ModelCase(
        "experts by index",
        lambda: Model(routed_by_index, stack_of(experts=(4, 8, 6)), [X, jnp.array([3, 1])]),
        "experts",
        1,
    ),
    ModelCase(
        "experts by map and checkpoint",
        lambda: Model(mapped_experts, stack_of(up=(4, 8, 12), down=(4, 12, 8), router=(8, 4)), [X]),
        "up|down|router",
        3,
    ),
    ModelCase("state-space layer", lambda: Model(state_space, stack_of(**SSM), [X]), ".*proj", 4),
    ModelCase(
        "gradient inside the model",
        lambda: Model(with_inner_grad, stack_of(first=(8, 12), second=(12, 3)), [X]),
        "first|second",
        2,
    ),
]
