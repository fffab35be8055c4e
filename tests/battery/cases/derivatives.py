"""Custom derivatives beside the weight, and transformations inside the user's function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from tests.battery.case import F, Ints, OpCase, Plain, W
from tests.reference import relu, silu, softmax
from tests.versions import BEFORE_0_10

KERNEL = W("co", 7, 5)
INPUT = F(3, 7)


@jax.custom_jvp
def halved(x):
    """Identity whose derivative is declared to be one half."""
    return x * 1.0


halved.defjvps(lambda t, ans, x: t / 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scaled_back(factor, x):
    """Identity that multiplies its cotangent by `factor`."""
    return x * 1.0


scaled_back.defvjp(
    lambda factor, x: (x * 1.0, None),
    lambda factor, _, ct: (factor * ct,),
)


@custom_vmap
def shifted(x):
    return x + 1.0


@shifted.def_vmap
def _(_, in_batched, x):
    return x + 1.0, in_batched[0]


def case(name, fn, reference, *, weights=None, inputs=None, **kwargs):
    return OpCase(
        name=name,
        weights=weights or {"w": KERNEL},
        inputs=inputs or {"x": INPUT},
        fn=fn,
        reference=reference,
        **kwargs,
    )


def after(activation):
    return lambda p, x: activation(x["x"] @ p["w"])


def energy(w, x):
    return jnp.sum(jnp.tanh(x @ w))


def score(p, x):
    """∂/∂x of Σ tanh(x·w)."""
    return (1 - np.tanh(x["x"] @ p["w"]) ** 2) @ p["w"].T


CUSTOM = [
    case("custom_jvp/relu", after(jax.nn.relu), after(relu)),
    case("custom_jvp/silu", after(jax.nn.silu), after(silu)),
    case("custom_jvp/softmax", after(jax.nn.softmax), after(softmax)),
    case(
        "custom_jvp/logsumexp",
        after(lambda y: jax.nn.logsumexp(y, axis=-1)),
        after(lambda y: np.log(np.exp(y).sum(-1))),
    ),
    case(
        "custom_jvp/declared_derivative",
        after(halved),
        after(lambda y: y),
        surrogate=lambda p, x, *_: x["x"] @ p["w"] / 2,
    ),
    case(
        "custom_jvp/between_layers",
        lambda p, x: halved(x["x"] @ p["w"]) @ p["v"],
        lambda p, x: x["x"] @ p["w"] @ p["v"],
        weights={"w": KERNEL, "v": Plain(5, 4)},
        surrogate=lambda p, x, *_: x["x"] @ p["w"] @ p["v"] / 2,
    ),
    case(
        "custom_vjp/scaled_cotangent",
        after(functools.partial(scaled_back, 3.0)),
        after(lambda y: y),
        surrogate=lambda p, x, *_: 3 * x["x"] @ p["w"],
        without=frozenset({"jvp", "linearize"}),
    ),
    case(
        "custom_vmap/plain_operand",
        after(shifted),
        after(lambda y: y + 1),
        reverse=False,
        without=frozenset({"linearize"}),
    ),
]

INSIDE = [
    case("inside/grad", lambda p, x: jax.grad(energy, argnums=1)(p["w"], x["x"]), score),
    case(
        "inside/grad_of_two_layers",
        lambda p, x: jax.grad(lambda h: jnp.sum(jnp.tanh(h @ p["w"]) @ p["v"]))(x["x"]),
        lambda p, x: ((1 - np.tanh(x["x"] @ p["w"]) ** 2) * p["v"].sum(1)) @ p["w"].T,
        weights={"w": KERNEL, "v": W("co", 5, 4)},
        activations=(15,),
    ),
    case(
        "inside/jvp",
        lambda p, x: jax.jvp(lambda h: jnp.tanh(h @ p["w"]), (x["x"],), (jnp.ones((3, 7)),))[1],
        lambda p, x: (1 - np.tanh(x["x"] @ p["w"]) ** 2) * p["w"].sum(0),
        activations=(15,),
        rounding=frozenset({"eager"}),
    ),
    case(
        "inside/vmap_over_experts",
        lambda p, x: jax.vmap(jnp.matmul)(x["x"], p["w"]),
        lambda p, x: np.stack([h @ w for h, w in zip(x["x"], p["w"], strict=True)]),
        weights={"w": W("bco", 4, 7, 5)},
        inputs={"x": F(4, 3, 7)},
    ),
    case(
        "inside/vmap_over_examples",
        lambda p, x: jax.vmap(lambda h: h @ p["w"])(x["x"]),
        lambda p, x: x["x"] @ p["w"],
    ),
    case(
        "inside/vmap_over_out_dim",
        lambda p, x: jax.vmap(lambda w: x["x"] @ w, in_axes=2, out_axes=1)(p["w"]),
        lambda p, x: np.einsum("bd,dkh->bhk", x["x"], p["w"]),
        weights={"w": W("coo", 7, 5, 2)},
    ),
    case(
        "inside/vmap_of_lookup",
        lambda p, x: jax.vmap(lambda i: p["w"][i])(x["i"]),
        lambda p, x: p["w"][x["i"]],
        inputs={"i": Ints((4,), high=7)},
    ),
    case(
        "inside/vmap_picks_expert_per_token",
        lambda p, x: jax.vmap(lambda h, i: h @ p["w"][i])(x["x"], x["i"]),
        lambda p, x: np.stack([h @ p["w"][i] for h, i in zip(x["x"], x["i"], strict=True)]),
        weights={"w": W("bco", 4, 7, 5)},
        inputs={"x": INPUT, "i": Ints((3,), high=4)},
        images=(3 * 35, 35),
    ),
    case(
        "inside/linear_transpose",
        lambda p, x: jax.linear_transpose(lambda h: h @ p["w"], jnp.zeros((3, 7)))(x["y"])[0],
        lambda p, x: x["y"] @ p["w"].T,
        inputs={"y": F(3, 5)},
    ),
    case(
        "inside/norm_bias_activation",
        lambda p, x: jax.nn.relu(
            (x["x"] - jnp.mean(x["x"], -1, keepdims=True)) * p["scale"][None] @ p["w"]
        ),
        lambda p, x: relu((x["x"] - x["x"].mean(-1, keepdims=True)) * p["scale"] @ p["w"]),
        weights={"w": KERNEL, "scale": Plain(7)},
        rounding=frozenset({"eager"} if BEFORE_0_10 else ()),
    ),
]

CASES = CUSTOM + INSIDE
