"""The same small models twice: plain, and with LoRA written by hand into every layer.

`HandWritten.plain(params, x)` is what the library wraps; `HandWritten.by_hand(params, factors, x)`
is what a careful author would write instead. Both see params and factors by the same names.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.battery.case import F, Floats, Ints, OneOf, OpCase, W, Weight
from tests.battery.kinds import SCALE


@dataclass(frozen=True, eq=False)
class HandWritten:
    name: str
    weights: Mapping[str, Weight]
    inputs: Mapping[str, Floats | Ints | OneOf]
    plain: Callable[[Any, Any], Any]
    by_hand: Callable[[Any, Any, Any], Any]

    def __repr__(self) -> str:
        return self.name

    @functools.cached_property
    def case(self) -> OpCase:
        """As an entry of the battery, for its arrays; it needs no numpy reference here."""
        return OpCase(self.name, self.weights, self.inputs, self.plain, reference=None)


def dense(x, w, node):
    return x @ w + (x @ node.a) @ node.b * SCALE


def mlp(p, x):
    return jnp.tanh(x["x"] @ p["up"]) @ p["down"]


def mlp_by_hand(p, f, x):
    return dense(jnp.tanh(dense(x["x"], p["up"], f["up"])), p["down"], f["down"])


def projection(spec_a, spec_b, x, node):
    return jnp.einsum(spec_b, jnp.einsum(spec_a, x, node.a), node.b) * SCALE


def heads(p, x):
    """DenseGeneral in and out: (d, h, k) and (h, k, d)."""
    q = jnp.tanh(jnp.einsum("btd,dhk->bthk", x["x"], p["query"]))
    return jnp.einsum("bthk,hkd->btd", q, p["out"])


def heads_by_hand(p, f, x):
    q = jnp.einsum("btd,dhk->bthk", x["x"], p["query"])
    q = jnp.tanh(q + projection("btd,dr->btr", "btr,rhk->bthk", x["x"], f["query"]))
    y = jnp.einsum("bthk,hkd->btd", q, p["out"])
    return y + projection("bthk,hkr->btr", "btr,rd->btd", q, f["out"])


def experts(p, x):
    return jnp.einsum("ebd,edk->ebk", x["x"], p["w"])


def experts_by_hand(p, f, x):
    return experts(p, x) + projection("ebd,edr->ebr", "ebr,erk->ebk", x["x"], f["w"])


def layers(p, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x["x"], p["w"])[0]


def layers_by_hand(p, f, x):
    def body(h, leaves):
        w, node = leaves
        return jnp.tanh(dense(h, w, node)), None

    return lax.scan(body, x["x"], (p["w"], f["w"]))[0]


def remat_layers(p, x):
    def body(h, w):
        return jnp.tanh(h @ w)

    h = x["x"]
    for i in range(3):
        h = jax.checkpoint(body)(h, p["w"][i])
    return h


def remat_layers_by_hand(p, f, x):
    def body(h, w, node):
        return jnp.tanh(dense(h, w, node))

    h = x["x"]
    for i in range(3):
        node = jax.tree.map(lambda leaf, i=i: leaf[i], f["w"])
        h = jax.checkpoint(body)(h, p["w"][i], node)
    return h


def convolve(x, w):
    return lax.conv_general_dilated(
        x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def conv(p, x):
    return convolve(x["x"], p["w"])


def conv_by_hand(p, f, x):
    return convolve(x["x"], p["w"]) + convolve(x["x"], f["w"].a) @ f["w"].b * SCALE


def language_model(p, x):
    return jnp.tanh(p["table"][x["ids"]] @ p["w"]) @ p["table"].T


def language_model_by_hand(p, f, x):
    h = p["table"][x["ids"]] + f["table"].a[x["ids"]] @ f["table"].b * SCALE
    h = jnp.tanh(dense(h, p["w"], f["w"]))
    return h @ p["table"].T + (h @ f["table"].b.T) @ f["table"].a.T * SCALE


def fused(p, x):
    return x["x"] @ jnp.concatenate([p["q"], p["v"]], axis=1)


def fused_by_hand(p, f, x):
    parts = [dense(x["x"], p[name], f[name]) for name in "qv"]
    return jnp.concatenate(parts, axis=-1)


WIDE = {"rank": 4}

HAND_WRITTEN = [
    HandWritten(
        "mlp",
        {"up": W("co", 64, 128, **WIDE), "down": W("co", 128, 64, **WIDE)},
        {"x": F(48, 64)},
        mlp,
        mlp_by_hand,
    ),
    HandWritten(
        "heads",
        {"query": W("coo", 64, 4, 16, **WIDE), "out": W("cco", 4, 16, 64, **WIDE)},
        {"x": F(3, 16, 64)},
        heads,
        heads_by_hand,
    ),
    HandWritten(
        "experts", {"w": W("bco", 4, 64, 48, **WIDE)}, {"x": F(4, 24, 64)}, experts, experts_by_hand
    ),
    HandWritten(
        "scanned", {"w": W("bco", 3, 64, 64, **WIDE)}, {"x": F(48, 64)}, layers, layers_by_hand
    ),
    HandWritten(
        "remat",
        {"w": W("bco", 3, 64, 64, **WIDE)},
        {"x": F(48, 64)},
        remat_layers,
        remat_layers_by_hand,
    ),
    HandWritten(
        "conv", {"w": W("ccco", 3, 3, 16, 32, **WIDE)}, {"x": F(2, 8, 8, 16)}, conv, conv_by_hand
    ),
    HandWritten(
        "tied_embedding",
        {"table": W("co", 96, 64, **WIDE), "w": W("co", 64, 64, **WIDE)},
        {"ids": Ints((48,), high=96)},
        language_model,
        language_model_by_hand,
    ),
    HandWritten(
        "fused_qv",
        {"q": W("co", 64, 48, **WIDE), "v": W("co", 64, 32, **WIDE)},
        {"x": F(48, 64)},
        fused,
        fused_by_hand,
    ),
]
