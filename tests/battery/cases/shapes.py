"""Chains: the weight is moved, cast, cut or scaled, and then contracted."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from tests.battery.case import HALF, F, Ints, OpCase, Plain, W
from tests.reference import conv

KERNEL = W("co", 7, 5)
INPUT = F(3, 7)


def chain_case(name, fn, reference, *, weight=KERNEL, x=INPUT, more=None, **kwargs):
    """`fn(w, inputs)` and its numpy twin."""
    return OpCase(
        name=f"chain/{name}",
        weights={"w": weight},
        inputs={"x": x} | (more or {}),
        fn=lambda p, inputs: fn(p["w"], inputs),
        reference=lambda p, inputs: reference(p["w"], inputs),
        **kwargs,
    )


def same_value(name, move, **kwargs):
    """A chain link that changes nothing in exact arithmetic."""
    return chain_case(name, lambda w, x: x["x"] @ move(w, x), lambda w, x: x["x"] @ w, **kwargs)


def constrained(spec):
    """with_sharding_constraint over all eight devices."""

    def constrain(w, _):
        mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
        return lax.with_sharding_constraint(w, NamedSharding(mesh, spec))

    return constrain


def long_chain(w, x):
    """(heads · head_dim, d) kernel, cut, cast, flipped, split into heads and contracted."""
    heads = lax.slice(jnp.transpose(w), (0, 2), (7, 8))  # (7, 6)
    heads = lax.reduce_precision(heads, 8, 23).reshape(7, 2, 3)
    heads = lax.rev(-heads, (2,)) * x["scale"]
    return jnp.einsum("bd,dhk->bhk", x["x"], heads)


def long_chain_reference(w, x):
    heads = -w.T[:, 2:8].reshape(7, 2, 3)[:, :, ::-1] * x["scale"]
    return np.einsum("bd,dhk->bhk", x["x"], heads)


MOVES = [
    chain_case("transpose", lambda w, x: x["x"] @ w.T, lambda w, x: x["x"] @ w.T, x=F(3, 5)),
    same_value("transpose_twice", lambda w, _: jnp.transpose(jnp.transpose(w))),
    chain_case(
        "transpose_stack",
        lambda w, x: jnp.einsum("ebk,ekd->ebd", x["x"], jnp.transpose(w, (1, 2, 0))),
        lambda w, x: np.einsum("ebk,dek->ebd", x["x"], w),
        weight=W("cbo", 7, 4, 5),
        x=F(4, 3, 5),
    ),
    chain_case(
        "reshape_split_out",
        lambda w, x: jnp.einsum("bd,dhk->bhk", x["x"], w.reshape(7, 2, 3)),
        lambda w, x: (x["x"] @ w).reshape(3, 2, 3),
        weight=W("co", 7, 6),
    ),
    chain_case(
        "reshape_merge_out",
        lambda w, x: x["x"] @ w.reshape(7, 6),
        lambda w, x: x["x"] @ w.reshape(7, 6),
        weight=W("coo", 7, 2, 3),
    ),
    chain_case(
        "reshape_split_contract",
        lambda w, x: jnp.einsum("bhd,hdk->bk", x["x"], w.reshape(2, 4, 5)),
        lambda w, x: x["x"].reshape(3, 8) @ w,
        weight=W("co", 8, 5),
        x=F(3, 2, 4),
    ),
    chain_case(
        "reshape_merge_contract",
        lambda w, x: x["x"] @ w.reshape(8, 5),
        lambda w, x: x["x"] @ w.reshape(8, 5),
        weight=W("cco", 2, 4, 5),
        x=F(3, 8),
    ),
    chain_case(
        "reshape_patch_embedding",
        lambda w, x: x["x"] @ w.reshape(12, 5),
        lambda w, x: x["x"] @ w.reshape(12, 5),
        weight=W("ccco", 2, 2, 3, 5),
        x=F(3, 12),
    ),
    chain_case(
        "reshape_both_roles_at_once",
        lambda w, x: jnp.einsum("bpq,pqk->bk", x["x"], w.reshape(4, 2, 6)),
        lambda w, x: x["x"].reshape(3, 8) @ w.reshape(8, 6),
        weight=W("ccoo", 2, 4, 2, 3),
        x=F(3, 4, 2),
    ),
    chain_case(
        "reshape_split_stack",
        lambda w, x: jnp.einsum("ijbd,ijdk->ijbk", x["x"], w.reshape(2, 3, 7, 5)),
        lambda w, x: np.einsum("ebd,edk->ebk", x["x"].reshape(6, 2, 7), w).reshape(2, 3, 2, 5),
        weight=W("bco", 6, 7, 5),
        x=F(2, 3, 2, 7),
        images=(35,),
    ),
    same_value("reshape_with_singletons", lambda w, _: w.reshape(7, 1, 5).reshape(1, 7, 5)[0]),
    chain_case(
        "squeeze",
        lambda w, x: x["x"] @ jnp.squeeze(w, (0, 2)),
        lambda w, x: x["x"] @ w[0, :, 0],
        weight=W("bcoo", 1, 7, 1, 5),
    ),
    same_value("expand_dims", lambda w, _: lax.squeeze(w[:, None, :, None], (1, 3))),
    chain_case(
        "broadcast_over_new_batch_dim",
        lambda w, x: jnp.einsum("ebd,edk->ebk", x["x"], jnp.broadcast_to(w, (4, 7, 5))),
        lambda w, x: x["x"] @ w,
        x=F(4, 3, 7),
    ),
    chain_case(
        "broadcast_in_dim",
        lambda w, x: jnp.einsum("bed,dek->bek", x["x"], lax.broadcast_in_dim(w, (7, 4, 5), (0, 2))),
        lambda w, x: x["x"] @ w,
        x=F(3, 4, 7),
    ),
    chain_case(
        "rev",
        lambda w, x: x["x"] @ lax.rev(w, (0, 1)),
        lambda w, x: x["x"] @ w[::-1, ::-1],
    ),
    chain_case(
        "flip_conv_kernel",
        lambda w, x: lax.conv_general_dilated(
            x["x"], jnp.flip(w, 0), (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        lambda w, x: conv(x["x"], w[::-1], ("NWC", "WIO", "NWC")),
        weight=W("cco", 3, 4, 5),
        x=F(2, 6, 4),
    ),
    chain_case("long", long_chain, long_chain_reference, weight=W("oc", 9, 7), more={"scale": F()}),
]

CASTS = [
    same_value(
        "cast_to_half",
        lambda w, x: w.astype(jnp.bfloat16),
        x=F(3, 7, dtype=jnp.bfloat16),
        tolerance=HALF,
    ),
    same_value(
        "cast_to_single",
        lambda w, _: w.astype(jnp.float32),
        weight=W("co", 7, 5, dtype=jnp.bfloat16),
        tolerance=HALF,
    ),
    same_value(
        "cast_there_and_back",
        lambda w, _: w.astype(jnp.bfloat16).astype(jnp.float32),
        tolerance=HALF,
    ),
    same_value("reduce_precision", lambda w, _: lax.reduce_precision(w, 8, 7), tolerance=HALF),
    same_value("copy", lambda w, _: jnp.array(w, copy=True)),
    same_value("optimization_barrier", lambda w, _: lax.optimization_barrier(w)),
    chain_case(
        "optimization_barrier_with_input",
        lambda w, x: (lambda w, x: x @ w)(*lax.optimization_barrier((w, x["x"]))),
        lambda w, x: x["x"] @ w,
    ),
    same_value("sharding_constraint_replicated", constrained(P()), without=frozenset({"pmap"})),
    same_value(
        "sharding_constraint_on_contract",
        constrained(P("model", None)),
        weight=W("co", 8, 5),
        x=F(3, 8),
        without=frozenset({"pmap"}),
    ),
    same_value(
        "sharding_constraint_on_out",
        constrained(P(None, "model")),
        weight=W("co", 7, 8),
        without=frozenset({"pmap"}),
    ),
    OpCase(
        name="chain/stop_gradient",
        weights={"w": KERNEL, "v": W("co", 7, 4)},
        inputs={"x": INPUT},
        fn=lambda p, x: (x["x"] @ lax.stop_gradient(p["w"]), x["x"] @ p["v"]),
        reference=lambda p, x: (x["x"] @ p["w"], x["x"] @ p["v"]),
        surrogate=lambda p, x, p0, x0: (x["x"] @ p0["w"], x["x"] @ p["v"]),
    ),
]

CUTS = [
    chain_case(
        "slice_contract", lambda w, x: x["x"] @ w[2:6], lambda w, x: x["x"] @ w[2:6], x=F(3, 4)
    ),
    chain_case("slice_out", lambda w, x: x["x"] @ w[:, 1:4], lambda w, x: x["x"] @ w[:, 1:4]),
    chain_case(
        "slice_strided",
        lambda w, x: x["x"] @ lax.slice(w, (1, 0), (7, 5), (2, 2)),
        lambda w, x: x["x"] @ w[1::2, ::2],
        x=F(4, 3),
    ),
    chain_case(
        "slice_stack",
        lambda w, x: jnp.einsum("ebd,edk->ebk", x["x"], w[1:3]),
        lambda w, x: np.einsum("ebd,edk->ebk", x["x"], w[1:3]),
        weight=W("bco", 4, 7, 5),
        x=F(2, 3, 7),
    ),
    chain_case(
        "dynamic_slice_out",
        lambda w, x: x["x"] @ lax.dynamic_slice_in_dim(w, x["i"], 3, axis=1),
        lambda w, x: x["x"] @ w[:, x["i"] : x["i"] + 3],
        more={"i": Ints((), high=3)},
        images=(21,),
    ),
    chain_case(
        "dynamic_slice_contract",
        lambda w, x: x["x"] @ lax.dynamic_slice_in_dim(w, x["i"], 4, axis=0),
        lambda w, x: x["x"] @ w[x["i"] : x["i"] + 4],
        x=F(3, 4),
        more={"i": Ints((), high=4)},
        images=(20,),
    ),
    chain_case(
        "dynamic_slice_stack",
        lambda w, x: jnp.einsum("ebd,edk->ebk", x["x"], lax.dynamic_slice_in_dim(w, x["i"], 2)),
        lambda w, x: np.einsum("ebd,edk->ebk", x["x"], w[x["i"] : x["i"] + 2]),
        weight=W("bco", 4, 7, 5),
        x=F(2, 3, 7),
        more={"i": Ints((), high=3)},
        images=(70,),
    ),
    chain_case(
        "dynamic_slice_clamped",
        lambda w, x: x["x"] @ lax.dynamic_slice(w, (0, x["i"]), (7, 3)),
        lambda w, x: x["x"] @ w[:, 2:5],
        more={"i": Ints((), high=9, low=3)},
        images=(21,),
    ),
]

SCALINGS = [
    chain_case("negation", lambda w, x: x["x"] @ -w, lambda w, x: x["x"] @ -w),
    chain_case("times_python_scalar", lambda w, x: x["x"] @ (0.5 * w), lambda w, x: x["x"] @ w / 2),
    chain_case("over_python_scalar", lambda w, x: x["x"] @ (w / 4), lambda w, x: x["x"] @ w / 4),
    chain_case(
        "times_traced_scalar",
        lambda w, x: x["x"] @ (w * x["s"]),
        lambda w, x: x["x"] @ (w * x["s"]),
        more={"s": F()},
    ),
    chain_case(
        "over_traced_scalar",
        lambda w, x: x["x"] @ (w / (2 + jnp.abs(x["s"]))),
        lambda w, x: x["x"] @ (w / (2 + np.abs(x["s"]))),
        more={"s": F()},
        rounding=frozenset({"jit"}),
    ),
    chain_case(
        "times_one_by_one_array",
        lambda w, x: x["x"] @ (w * x["s"]),
        lambda w, x: x["x"] @ (w * x["s"]),
        more={"s": F(1, 1)},
    ),
    chain_case(
        "times_contract_vector",
        lambda w, x: x["x"] @ (w * x["v"][:, None]),
        lambda w, x: x["x"] @ (w * x["v"][:, None]),
        more={"v": F(7)},
    ),
    chain_case(
        "times_out_vector",
        lambda w, x: x["x"] @ (x["v"][None, :] * w),
        lambda w, x: x["x"] @ (w * x["v"]),
        more={"v": F(5)},
    ),
    chain_case(
        "over_out_vector",
        lambda w, x: x["x"] @ (w / (2 + jnp.square(x["v"]))[None]),
        lambda w, x: x["x"] @ (w / (2 + x["v"] ** 2)),
        more={"v": F(5)},
    ),
    chain_case(
        "times_both_vectors",
        lambda w, x: x["x"] @ (w * x["u"][:, None] * x["v"][None]),
        lambda w, x: x["x"] @ (w * np.outer(x["u"], x["v"])),
        more={"u": F(7), "v": F(5)},
    ),
    chain_case(
        "times_stack_vector",
        lambda w, x: jnp.einsum("ebd,edk->ebk", x["x"], w * x["v"][:, None, None]),
        lambda w, x: np.einsum("ebd,edk,e->ebk", x["x"], w, x["v"]),
        weight=W("bco", 4, 7, 5),
        x=F(4, 3, 7),
        more={"v": F(4)},
    ),
    chain_case(
        "times_vector_then_transpose",
        lambda w, x: x["x"] @ (w * x["v"][None]).T,
        lambda w, x: x["x"] @ (w * x["v"]).T,
        x=F(3, 5),
        more={"v": F(5)},
    ),
    chain_case(
        "times_vector_then_slice",
        lambda w, x: x["x"] @ (w * x["v"][None])[:, 1:4],
        lambda w, x: x["x"] @ (w * x["v"])[:, 1:4],
        more={"v": F(5)},
    ),
    chain_case(
        "times_vector_then_lookup",
        lambda w, x: (w * x["v"][:, None])[x["i"]],
        lambda w, x: (w * x["v"][:, None])[x["i"]],
        x=F(1),
        more={"v": F(7), "i": Ints((4,), high=7)},
    ),
    chain_case(
        "vector_scales_conv_kernel",
        lambda w, x: lax.conv_general_dilated(
            x["x"],
            w * x["v"][None, None],
            (1,),
            "VALID",
            dimension_numbers=("NWC", "WIO", "NWC"),
        ),
        lambda w, x: conv(x["x"], w * x["v"], ("NWC", "WIO", "NWC")),
        weight=W("cco", 3, 4, 5),
        x=F(2, 6, 4),
        more={"v": F(5)},
    ),
    OpCase(
        name="chain/plus_array",
        weights={"w": KERNEL, "residual": Plain(7, 5)},
        inputs={"x": INPUT},
        fn=lambda p, x: x["x"] @ (p["w"] + p["residual"]),
        reference=lambda p, x: x["x"] @ (p["w"] + p["residual"]),
    ),
    OpCase(
        name="chain/array_minus_weight",
        weights={"w": KERNEL, "residual": Plain(7, 5)},
        inputs={"x": INPUT},
        fn=lambda p, x: x["x"] @ (p["residual"] - p["w"]),
        reference=lambda p, x: x["x"] @ (p["residual"] - p["w"]),
    ),
    OpCase(
        name="chain/times_trained_vector",
        weights={"w": KERNEL, "gain": Plain(5)},
        inputs={"x": INPUT},
        fn=lambda p, x: x["x"] @ (p["w"] * p["gain"][None]),
        reference=lambda p, x: x["x"] @ (p["w"] * p["gain"]),
    ),
]

QKV = {"q": W("co", 11, 5), "k": W("co", 11, 4, rank=3), "v": W("co", 11, 6)}
SOME_OF_QKV = QKV | {"k": Plain(11, 4)}
QKV_INPUT = F(3, 11)


def fused(p, x):
    return x["x"] @ jnp.concatenate([p["q"], p["k"], p["v"]], axis=1)


def fused_reference(p, x):
    return np.concatenate([x["x"] @ p[name] for name in "qkv"], axis=1)


JOINS = [
    OpCase("chain/fused_qkv", QKV, {"x": QKV_INPUT}, fused, fused_reference),
    OpCase("chain/fused_qkv_some_adapted", SOME_OF_QKV, {"x": QKV_INPUT}, fused, fused_reference),
    OpCase(
        name="chain/fused_then_split",
        weights=QKV,
        inputs={"x": QKV_INPUT},
        fn=lambda p, x: [
            x["x"] @ part
            for part in jnp.split(jnp.concatenate([p["q"], p["k"], p["v"]], axis=1), [5, 9], axis=1)
        ],
        reference=lambda p, x: [x["x"] @ p[name] for name in "qkv"],
    ),
    OpCase(
        name="chain/concatenate_contract",
        weights={"top": W("co", 4, 5), "rest": W("co", 3, 5, rank=1)},
        inputs={"x": F(2, 7)},
        fn=lambda p, x: x["x"] @ jnp.concatenate([p["top"], p["rest"]]),
        reference=lambda p, x: x["x"][:, :4] @ p["top"] + x["x"][:, 4:] @ p["rest"],
    ),
    OpCase(
        name="chain/concatenate_stacks",
        weights={"first": W("bco", 2, 7, 5), "last": W("bco", 1, 7, 5)},
        inputs={"x": F(3, 2, 7)},
        fn=lambda p, x: jnp.einsum(
            "ebd,edk->ebk", x["x"], jnp.concatenate([p["first"], p["last"]])
        ),
        reference=lambda p, x: np.concatenate([x["x"][:2] @ p["first"], x["x"][2:] @ p["last"]]),
    ),
    OpCase(
        name="chain/stack_of_experts",
        weights={"first": W("co", 7, 5), "last": W("co", 7, 5)},
        inputs={"x": F(2, 3, 7)},
        fn=lambda p, x: jnp.einsum("ebd,edk->ebk", x["x"], jnp.stack([p["first"], p["last"]])),
        reference=lambda p, x: np.stack([x["x"][0] @ p["first"], x["x"][1] @ p["last"]]),
    ),
    chain_case(
        "split",
        lambda w, x: [x["x"] @ part for part in jnp.split(w, [4, 7], axis=1)],
        lambda w, x: np.split(x["x"] @ w, [4, 7], axis=1),
        weight=W("co", 7, 10),
    ),
    chain_case(
        "split_contract",
        lambda w, x: [
            part @ cut for part, cut in zip(x["x"].reshape(2, 3, 4), jnp.split(w, 2), strict=True)
        ],
        lambda w, x: [x["x"].reshape(2, 3, 4)[i] @ w[4 * i : 4 * i + 4] for i in range(2)],
        weight=W("co", 8, 5),
        x=F(3, 8),
    ),
    chain_case(
        "split_stack",
        lambda w, x: [x["x"] @ layer[0] for layer in jnp.split(w, 3)],
        lambda w, x: [x["x"] @ layer for layer in w],
        weight=W("bco", 3, 7, 5),
        x=F(2, 7),
    ),
    chain_case(
        "unstack",
        lambda w, x: [x["x"] @ layer for layer in jnp.unstack(w)],
        lambda w, x: [x["x"] @ layer for layer in w],
        weight=W("bco", 3, 7, 5),
        x=F(2, 7),
    ),
]

CASES = MOVES + CASTS + CUTS + SCALINGS + JOINS
