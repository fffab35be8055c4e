"""Weights inside jit, scan, loops, branches and checkpoint."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tests.battery.case import F, Ints, OneOf, OpCase, Plain, W

KERNEL = W("co", 7, 7)
LAYERS = W("bco", 4, 7, 7)
INPUT = F(5, 7)
FLAG = OneOf(np.bool_(True), np.bool_(False))


def case(name, fn, reference, *, weights=None, x=INPUT, more=None, **kwargs):
    return OpCase(
        name=name,
        weights=weights or {"w": KERNEL},
        inputs={"x": x} | (more or {}),
        fn=fn,
        reference=reference,
        **kwargs,
    )


def once(p, x):
    return x["x"] @ p["w"]


def thrice(p, x):
    h = x["x"]
    for _ in range(3):
        h = np.tanh(h @ p["w"])
    return h


def through_layers(p, x):
    h = x["x"]
    for w in p["w"]:
        h = np.tanh(h @ w)
    return h


def layer(h, w):
    return jnp.tanh(h @ w)


# --- jit ---------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("activation", "transpose"))
def dense(x, w, *, activation, transpose=False):
    y = x @ (w.T if transpose else w)
    return jnp.tanh(y) if activation == "tanh" else y


@jax.jit
def half_and_back(w):
    return w.astype(jnp.bfloat16).astype(jnp.float32)


@jax.jit
def pair(w, x):
    """A weight goes in and comes out beside an activation."""
    return {"w": w.T, "h": x @ w}


JITS = [
    case(
        "jit/nested",
        lambda p, x: jax.jit(lambda w, x: jax.jit(jnp.matmul)(x, w))(p["w"], x["x"]),
        once,
    ),
    case(
        "jit/static_arguments",
        lambda p, x: dense(dense(x["x"], p["w"], activation="tanh"), p["w"], activation=None),
        lambda p, x: np.tanh(x["x"] @ p["w"]) @ p["w"],
    ),
    case(
        "jit/two_static_variants",
        lambda p, x: dense(
            dense(x["x"], p["w"], activation="tanh"), p["w"], activation="tanh", transpose=True
        ),
        lambda p, x: np.tanh(np.tanh(x["x"] @ p["w"]) @ p["w"].T),
    ),
    case(
        "jit/returns_the_weight",
        lambda p, x: x["x"] @ half_and_back(p["w"]),
        once,
        tolerance=4e-2,
    ),
    case(
        "jit/returns_weight_and_activation",
        lambda p, x: (lambda out: out["h"] @ out["w"])(pair(p["w"], x["x"])),
        lambda p, x: x["x"] @ p["w"] @ p["w"].T,
    ),
    case(
        "jit/one_function_two_weights",
        lambda p, x: [
            dense(x["x"], p["u"], activation=None),
            dense(x["x"], p["plain"], activation=None),
            dense(x["x"], p["v"], activation=None),
        ],
        lambda p, x: [x["x"] @ p["u"], x["x"] @ p["plain"], x["x"] @ p["v"]],
        weights={"u": KERNEL, "v": W("co", 7, 7, rank=3), "plain": Plain(7, 7)},
    ),
    case(
        "jit/inline",
        lambda p, x: jax.jit(jnp.matmul, inline=True)(x["x"], p["w"]),
        once,
    ),
    case(
        "jit/closed_over",
        lambda p, x: jax.jit(lambda x: x @ p["w"])(x["x"]),
        once,
    ),
    case(
        "jit/named_scope",
        lambda p, x: jax.named_call(layer, name="layer")(x["x"], p["w"]),
        lambda p, x: np.tanh(x["x"] @ p["w"]),
    ),
]


# --- scan --------------------------------------------------------------------------------------


def over_layers(body=layer, **options):
    def fn(p, x):
        return lax.scan(lambda h, w: (body(h, w), None), x["x"], p["w"], **options)[0]

    return fn


def const_in_scan(p, x):
    return lax.scan(lambda h, _: (layer(h, p["w"]), None), x["x"], length=3)[0]


def weight_as_carry(p, x):
    def body(carry, _):
        w, h = carry
        return (w, layer(h, w)), jnp.sum(h)

    (w, h), sums = lax.scan(body, (p["w"], x["x"]), length=3)
    return h @ w, sums


def fast_weights(p, x):
    """A weight that fades from step to step, met with the step's own input."""
    return lax.scan(lambda w, row: (0.9 * w, row @ w), p["w"], x["x"])[1]


def fast_weights_reference(p, x):
    return np.stack([row @ (0.9**i * p["w"]) for i, row in enumerate(x["x"])])


def weight_as_carry_reference(p, x):
    h, sums = x["x"], []
    for _ in range(3):
        sums.append(h.sum())
        h = np.tanh(h @ p["w"])
    return h @ p["w"], np.stack(sums)


def weight_as_ys(p, x):
    """Each step hands its layer back; the stack of them is used after the loop."""

    def body(h, w):
        return layer(h, w), w.T

    h, transposed = lax.scan(body, x["x"], p["w"])
    return jnp.einsum("bd,ldk->lbk", h, transposed[1:3])


def weight_as_ys_reference(p, x):
    h = through_layers(p, x)
    return np.stack([h @ w.T for w in p["w"][1:3]])


def const_as_ys(p, x):
    """The constant weight comes out once a step."""
    h, copies = lax.scan(lambda h, _: (layer(h, p["w"]), p["w"]), x["x"], length=3)
    return h @ copies[1]


def mixed_scan(p, x):
    """A constant, a stack and a plain stack of biases together."""

    def body(h, leaves):
        w, bias = leaves
        return layer(h, w) @ p["shared"] + bias[None], h[0, 0]

    return lax.scan(body, x["x"], (p["w"], p["bias"]))


def mixed_scan_reference(p, x):
    h, firsts = x["x"], []
    for w, bias in zip(p["w"], p["bias"], strict=True):
        firsts.append(h[0, 0])
        h = np.tanh(h @ w) @ p["shared"] + bias
    return h, np.stack(firsts)


def nested_scan(p, x):
    def outer(h, stack):
        return lax.scan(lambda h, w: (layer(h, w), None), h, stack)[0], None

    return lax.scan(outer, x["x"], p["w"])[0]


def recurrent(p, x):
    """A cell run over time: both weights constant, the sequence scanned."""

    def cell(h, x_t):
        h = jnp.tanh(x_t @ p["inward"] + h @ p["w"])
        return h, h

    return lax.scan(cell, x["x"], x["sequence"])


def recurrent_reference(p, x):
    h, outs = x["x"], []
    for x_t in x["sequence"]:
        h = np.tanh(x_t @ p["inward"] + h @ p["w"])
        outs.append(h)
    return h, np.stack(outs)


SCANS = [
    case("scan/constant", const_in_scan, thrice),
    case("scan/stacked_layers", over_layers(), through_layers, weights={"w": LAYERS}),
    case(
        "scan/reverse",
        over_layers(reverse=True),
        lambda p, x: through_layers({"w": p["w"][::-1]}, x),
        weights={"w": LAYERS},
    ),
    case("scan/unrolled", over_layers(unroll=2), through_layers, weights={"w": LAYERS}),
    case(
        "scan/checkpointed_layers",
        over_layers(jax.checkpoint(layer, prevent_cse=False)),
        through_layers,
        weights={"w": LAYERS},
    ),
    case(
        "scan/no_layers",
        lambda p, x: lax.scan(lambda h, w: (layer(h, w), None), x["x"], p["w"][:0])[0] @ p["w"][0],
        lambda p, x: x["x"] @ p["w"][0],
        weights={"w": LAYERS},
    ),
    case(
        "scan/half_of_the_layers",
        lambda p, x: lax.scan(lambda h, w: (layer(h, w), None), x["x"], p["w"][1:3])[0],
        lambda p, x: through_layers({"w": p["w"][1:3]}, x),
        weights={"w": LAYERS},
    ),
    case("scan/weight_as_carry", weight_as_carry, weight_as_carry_reference),
    case("scan/fast_weights", fast_weights, fast_weights_reference),
    case("scan/weight_as_ys", weight_as_ys, weight_as_ys_reference, weights={"w": LAYERS}),
    case("scan/constant_as_ys", const_as_ys, lambda p, x: thrice(p, x) @ p["w"]),
    case(
        "scan/constant_and_stacks",
        mixed_scan,
        mixed_scan_reference,
        weights={"w": LAYERS, "shared": KERNEL, "bias": Plain(4, 7)},
    ),
    case(
        "scan/nested",
        nested_scan,
        lambda p, x: through_layers({"w": p["w"].reshape(6, 7, 7)}, x),
        weights={"w": W("bbco", 2, 3, 7, 7)},
    ),
    case(
        "scan/recurrent_cell",
        recurrent,
        recurrent_reference,
        weights={"w": KERNEL, "inward": W("co", 11, 7)},
        more={"sequence": F(3, 5, 11)},
    ),
    case(
        "scan/lax_map_over_experts",
        lambda p, x: lax.map(lambda w: x["x"] @ w, p["w"]),
        lambda p, x: np.stack([x["x"] @ w for w in p["w"]]),
        weights={"w": LAYERS},
    ),
    case(
        "scan/associative_inputs",
        lambda p, x: lax.associative_scan(jnp.add, x["x"] @ p["w"]),
        lambda p, x: np.cumsum(x["x"] @ p["w"], axis=0),
    ),
]


# --- while and for -----------------------------------------------------------------------------


def while_constant(p, x):
    def body(state):
        i, h = state
        return i + 1, layer(h, p["w"])

    return lax.while_loop(lambda state: state[0] < x["n"], body, (0, x["x"]))[1]


def repeated(p, x):
    h = x["x"]
    for _ in range(int(x["n"])):
        h = np.tanh(h @ p["w"])
    return h


def while_carry(p, x):
    def body(state):
        i, w, h = state
        return i + 1, w, layer(h, w)

    _, w, h = lax.while_loop(lambda state: state[0] < x["n"], body, (0, p["w"], x["x"]))
    return h @ w


def while_condition(p, x):
    """The condition looks through the weight too: stop when the next output is small."""

    def small(h):
        return jnp.sum(jnp.square(h @ p["w"])) < 0.01

    def body(state):
        i, h = state
        return i + 1, h / 3

    return lax.while_loop(lambda s: ~small(s[1]) & (s[0] < 9), body, (0, x["x"]))[1] @ p["w"]


def while_condition_reference(p, x):
    h, i = x["x"], 0
    while np.sum((h @ p["w"]) ** 2) >= 0.01 and i < 9:
        h, i = h / 3, i + 1
    return h @ p["w"]


def fori_over_layers(p, x):
    return lax.fori_loop(0, 4, lambda i, h: layer(h, p["w"][i]), x["x"])


STEPS = {"n": Ints((), high=4, low=1)}

LOOPS = [
    case("while/constant", while_constant, repeated, more=STEPS, reverse=False),
    case(
        "while/carry",
        while_carry,
        lambda p, x: repeated(p, x) @ p["w"],
        more=STEPS,
        reverse=False,
    ),
    case("while/condition", while_condition, while_condition_reference, reverse=False),
    case(
        "fori/constant",
        lambda p, x: lax.fori_loop(0, 3, lambda _, h: layer(h, p["w"]), x["x"]),
        thrice,
    ),
    case(
        "fori/picks_its_layer",
        fori_over_layers,
        through_layers,
        weights={"w": LAYERS},
        images=(49,),
    ),
    case(
        "fori/carry",
        lambda p, x: (lambda w, h: h @ w)(
            *lax.fori_loop(0, 3, lambda _, s: (s[0], layer(s[1], s[0])), (p["w"], x["x"]))
        ),
        lambda p, x: thrice(p, x) @ p["w"],
    ),
]


# --- cond and switch ---------------------------------------------------------------------------


TWO = {"u": KERNEL, "v": KERNEL}


def choose(p, flag):
    return p["u"] if flag else p["v"]


BRANCHES = [
    case(
        "cond/operand",
        lambda p, x: lax.cond(
            x["flag"], lambda w, x: x @ w, lambda w, x: jnp.tanh(x @ w.T), p["w"], x["x"]
        ),
        lambda p, x: x["x"] @ p["w"] if x["flag"] else np.tanh(x["x"] @ p["w"].T),
        more={"flag": FLAG},
    ),
    case(
        "cond/closed_over",
        lambda p, x: lax.cond(x["flag"], lambda: x["x"] @ p["u"], lambda: x["x"] @ p["v"]),
        lambda p, x: x["x"] @ choose(p, x["flag"]),
        weights=TWO,
        more={"flag": FLAG},
    ),
    case(
        "cond/skips_the_layer",
        lambda p, x: lax.cond(x["flag"], lambda h: layer(h, p["w"]), lambda h: h, x["x"]),
        lambda p, x: np.tanh(x["x"] @ p["w"]) if x["flag"] else x["x"],
        more={"flag": FLAG},
    ),
    case(
        "cond/chooses_between_weights",
        lambda p, x: x["x"] @ lax.cond(x["flag"], lambda: p["u"], lambda: p["v"]),
        lambda p, x: x["x"] @ choose(p, x["flag"]),
        weights=TWO,
        more={"flag": FLAG},
    ),
    case(
        "cond/python_bool",
        lambda p, x: lax.cond(True, lambda: x["x"] @ p["u"], lambda: x["x"] @ p["v"]),
        lambda p, x: x["x"] @ p["u"],
        weights=TWO,
    ),
    case(
        "switch/three_branches",
        lambda p, x: lax.switch(
            x["i"],
            [lambda h: h @ p["u"], lambda h: jnp.tanh(h @ p["v"]), lambda h: h @ p["u"].T],
            x["x"],
        ),
        lambda p, x: [
            x["x"] @ p["u"],
            np.tanh(x["x"] @ p["v"]),
            x["x"] @ p["u"].T,
        ][int(x["i"])],
        weights=TWO,
        more={"i": Ints((), high=3)},
    ),
    case(
        "switch/inside_scan",
        lambda p, x: lax.scan(
            lambda h, i: (
                lax.switch(i, [lambda h: layer(h, p["u"]), lambda h: layer(h, p["v"])], h),
                None,
            ),
            x["x"],
            jnp.array([0, 1, 0]),
        )[0],
        lambda p, x: np.tanh(np.tanh(np.tanh(x["x"] @ p["u"]) @ p["v"]) @ p["u"]),
        weights=TWO,
    ),
    case(
        "cond/platform_dependent",
        lambda p, x: lax.platform_dependent(
            x["x"], p["w"], cpu=lambda x, w: x @ w, default=lambda x, w: 0 * (x @ w)
        ),
        once,
    ),
]


# --- checkpoint --------------------------------------------------------------------------------


def checkpointed(policy):
    """Two layers with named activations under one policy."""

    def two_layers(p, x):
        h = checkpoint_name(layer(x, p["w"]), "hidden")
        return layer(h, p["v"])

    return lambda p, x: jax.checkpoint(two_layers, policy=policy)(p, x["x"])


def two_layers_reference(p, x):
    return np.tanh(np.tanh(x["x"] @ p["w"]) @ p["v"])


POLICIES = jax.checkpoint_policies
PLAIN_POLICIES = [
    name
    for name in dir(POLICIES)
    if name.startswith(("checkpoint_dots", "dots", "everything", "nothing"))
]
NAMED_POLICIES = {
    "save_only_these_names": POLICIES.save_only_these_names("hidden"),
    "save_any_names_but_these": POLICIES.save_any_names_but_these("hidden"),
    "save_anything_except_these_names": POLICIES.save_anything_except_these_names("hidden"),
    "save_from_both_policies": POLICIES.save_from_both_policies(
        POLICIES.dots_saveable, POLICIES.save_only_these_names("hidden")
    ),
}

CHECKPOINTS = [
    case(
        f"checkpoint/{name}",
        checkpointed(policy),
        two_layers_reference,
        weights={"w": KERNEL, "v": KERNEL},
    )
    for name, policy in {
        "no_policy": None,
        **{name: getattr(POLICIES, name) for name in PLAIN_POLICIES},
        **NAMED_POLICIES,
    }.items()
] + [
    case(
        "checkpoint/cse_allowed",
        lambda p, x: jax.checkpoint(layer, prevent_cse=False)(x["x"], p["w"]),
        lambda p, x: np.tanh(x["x"] @ p["w"]),
    ),
    case(
        "checkpoint/weight_comes_out",
        lambda p, x: (lambda out: out[1] @ out[0])(
            jax.checkpoint(lambda w, x: (w.T, jnp.tanh(x @ w)))(p["w"], x["x"])
        ),
        lambda p, x: np.tanh(x["x"] @ p["w"]) @ p["w"].T,
    ),
    case(
        "checkpoint/weight_has_a_name",
        lambda p, x: x["x"] @ checkpoint_name(p["w"], "kernel"),
        once,
    ),
    case(
        "checkpoint/grad_inside",
        lambda p, x: jax.grad(
            lambda h: jnp.sum(jax.checkpoint(layer)(h, p["w"])),
        )(x["x"]),
        lambda p, x: (1 - np.tanh(x["x"] @ p["w"]) ** 2) @ p["w"].T,
    ),
]

CASES = JITS + SCANS + LOOPS + BRANCHES + CHECKPOINTS
