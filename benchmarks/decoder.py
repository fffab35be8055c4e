"""The decoder of Llama 3 and Mixtral as a plain function, its layers scanned, at any size.

RMSNorm, rotary positions, grouped queries, SwiGLU; with experts, each token goes to its best two,
by the dispatch of GShard (arXiv:2006.16668). Written as one writes it for a mesh: each layer's
weights are gathered along `fsdp` where they are used. It knows nothing of LoRA, and is meant for
abstract arrays: nobody initialises it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

CAPACITY = 1.25  # places that an expert has for a sequence, relative to an even spread
CHOSEN = 2  # experts of a token


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the published models; `experts` is 0 for a dense one."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int
    experts: int = 0
    head_dim: int = 128
    theta: float = 5e5

    def shapes(self) -> dict[str, Any]:
        """The shape of each weight; layers are stacked along the first dim."""
        n, d, f = self.layers, self.width, self.hidden
        each = (n, self.experts) if self.experts else (n,)
        layers = {
            "attention_norm": (n, d),
            "query": (n, d, self.heads, self.head_dim),
            "key": (n, d, self.kv_heads, self.head_dim),
            "value": (n, d, self.kv_heads, self.head_dim),
            "out": (n, self.heads, self.head_dim, d),
            "mlp_norm": (n, d),
            "gate": (*each, d, f),
            "up": (*each, d, f),
            "down": (*each, f, d),
        }
        if self.experts:
            layers["router"] = (n, d, self.experts)
        vocabulary = {"embed": (self.vocabulary, d), "head": (d, self.vocabulary)}
        return {"layers": layers, "norm": (d,), **vocabulary}

    def specs(self) -> dict[str, Any]:
        """Where each weight lies: `tensor` cuts heads, hidden units or experts, `fsdp` a width."""
        inward, outward = P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp")
        experts = P(None, "tensor", "fsdp"), P(None, "tensor", None, "fsdp")
        into_mlp, out_of_mlp = experts if self.experts else (inward, outward)
        layers = {
            "attention_norm": P(),
            "query": inward,
            "key": inward,
            "value": inward,
            "out": P(None, "tensor", None, "fsdp"),
            "mlp_norm": P(),
            "gate": into_mlp,
            "up": into_mlp,
            "down": out_of_mlp,
        }
        if self.experts:
            layers["router"] = P(None, "fsdp")
        return {
            "layers": layers,
            "norm": P(),
            "embed": P("tensor", "fsdp"),
            "head": P("fsdp", "tensor"),
        }

    def params(self, mesh: Mesh, dtype: Any = jnp.bfloat16) -> Any:
        """The weights as abstract arrays on a mesh with the axes `fsdp` and `tensor`."""
        is_shape = lambda node: isinstance(node, tuple)
        return jax.tree.map(
            lambda s, spec: jax.ShapeDtypeStruct(s, dtype, sharding=NamedSharding(mesh, spec)),
            self.shapes(),
            self.specs(),
            is_leaf=is_shape,
        )


def apply(config: Config, mesh: Mesh, params: Any, tokens: jax.Array) -> jax.Array:
    """Logits (batch, length, vocabulary) of tokens (batch, length), in float32."""

    def place(x: jax.Array, *spec: Any) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

    def gather(w: jax.Array, spec: P) -> jax.Array:
        return place(w, *(None if axis == "fsdp" else axis for axis in spec))

    specs = config.specs()
    inner = {name: P(*spec[1:]) for name, spec in specs["layers"].items()}

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def layer(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        w = {name: gather(array, inner[name]) for name, array in w.items()}
        x = place(x + _attention(config, w, _norm(x, w["attention_norm"])), "fsdp")
        mlp = _experts if config.experts else _mlp
        return place(x + mlp(config, w, _norm(x, w["mlp_norm"]), place), "fsdp"), None

    x = place(gather(params["embed"], specs["embed"])[tokens], "fsdp")
    x, _ = jax.lax.scan(layer, x, params["layers"])
    head = gather(params["head"], specs["head"])
    return (_norm(x, params["norm"]) @ head).astype(jnp.float32)


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-5)
    return wide.astype(x.dtype) * scale


def _attention(config: Config, w: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    query = _rotated(config, jnp.einsum("bsd,dhk->bshk", x, w["query"]))
    key = _rotated(config, jnp.einsum("bsd,dhk->bshk", x, w["key"]))
    value = jnp.einsum("bsd,dhk->bshk", x, w["value"])
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    return jnp.einsum("bshk,hkd->bsd", mixed, w["out"])


def _rotated(config: Config, x: jax.Array) -> jax.Array:
    """x (batch, length, heads, head_dim) turned by its positions."""
    half = config.head_dim // 2
    rates = config.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * rates  # (length, 1, half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, -1).astype(x.dtype)


def _mlp(_: Config, w: dict[str, jax.Array], x: jax.Array, __: Any) -> jax.Array:
    return (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]


def _experts(config: Config, w: dict[str, jax.Array], x: jax.Array, place: Any) -> jax.Array:
    """Each sequence's tokens are sorted into `capacity` places of each expert."""
    length, n = x.shape[1], config.experts
    capacity = int(CAPACITY * CHOSEN * length / n)
    gates, chosen = jax.lax.top_k((x @ w["router"]).astype(jnp.float32), CHOSEN)  # (b, s, 2)
    gates = jax.nn.softmax(gates, -1)
    routed = jax.nn.one_hot(chosen, n, dtype=jnp.int32)  # (b, s, 2, n)
    flat = routed.reshape(x.shape[0], length * CHOSEN, n)
    position = (jnp.cumsum(flat, 1) * flat - 1).reshape(routed.shape)  # -1 where not routed
    places = jax.nn.one_hot(position, capacity, dtype=x.dtype)  # (b, s, 2, n, c)
    combine = jnp.einsum("bskn,bsknc->bsnc", gates[..., None].astype(x.dtype) * routed, places)
    sent = jnp.einsum("bsnc,bsd->bncd", places.sum(2), x)
    sent = place(sent, "fsdp", "tensor")
    hidden = jax.nn.silu(jnp.einsum("bncd,ndf->bncf", sent, w["gate"]))
    hidden *= jnp.einsum("bncd,ndf->bncf", sent, w["up"])
    done = place(jnp.einsum("bncf,nfd->bncd", hidden, w["down"]), "fsdp", "tensor")
    return jnp.einsum("bsnc,bncd->bsd", combine, done)
