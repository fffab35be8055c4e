"""Contractions: dot_general with every kind of dimension numbers, einsum, mixed precision."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.battery.case import HALF, F, OpCase, Plain, W
from tests.reference import dot_general, relu


def dot_case(name, weight, x, contract, batch=((), ()), *, weight_on="right", **kwargs):
    """One dot_general of the input with the weight; dims are given as (lhs, rhs) pairs."""

    def operands(p, inputs):
        pair = inputs["x"], p["w"]
        return pair if weight_on == "right" else pair[::-1]

    return OpCase(
        name=name,
        weights={"w": weight},
        inputs={"x": x},
        fn=lambda p, x: lax.dot_general(*operands(p, x), (contract, batch)),
        reference=lambda p, x: dot_general(*operands(p, x), contract, batch),
        **kwargs,
    )


def einsum_case(name, spec, weight, x, *, weight_on="right", **kwargs):
    """`spec` names the input first unless the weight is on the left."""

    def operands(p, inputs):
        pair = inputs["x"], p["w"]
        return pair if weight_on == "right" else pair[::-1]

    return OpCase(
        name=name,
        weights={"w": weight},
        inputs={"x": x},
        fn=lambda p, x: jnp.einsum(spec, *operands(p, x)),
        reference=lambda p, x: np.einsum(spec, *operands(p, x)),
        **kwargs,
    )


# 5-D weight against 7-D input: one batch dim, two contracted, in scattered places.
SCATTERED = {"contract": ((1, 4), (3, 0)), "batch": ((6,), (2,))}
SCATTERED_WEIGHT = W("cobco", 2, 3, 2, 3, 2)
SCATTERED_INPUT = F(1, 3, 2, 1, 2, 2, 2)


def flipped(dims):
    return {kind: (right, left) for kind, (left, right) in dims.items()}


CASES = [
    dot_case("dot/weight_on_the_right", W("co", 7, 5), F(3, 7), ((1,), (0,))),
    dot_case("dot/weight_on_the_left", W("co", 7, 5), F(3, 7), ((0,), (1,)), weight_on="left"),
    dot_case("dot/vector_input", W("co", 7, 5), F(7), ((0,), (0,))),
    dot_case("dot/input_contracts_its_first_dim", W("co", 7, 5), F(7, 3), ((0,), (0,))),
    dot_case("dot/transposed_kernel", W("oc", 5, 7), F(3, 7), ((1,), (1,))),
    dot_case("dot/three_input_dims", W("co", 7, 5), F(2, 3, 7), ((2,), (0,))),
    dot_case("dot/two_contracted", W("cco", 2, 4, 5), F(3, 2, 4), ((1, 2), (0, 1))),
    dot_case("dot/two_contracted_crosswise", W("cco", 2, 4, 5), F(3, 4, 2), ((2, 1), (0, 1))),
    dot_case("dot/contract_around_out", W("coc", 2, 5, 4), F(3, 2, 4), ((1, 2), (0, 2))),
    dot_case("dot/two_out", W("coo", 7, 3, 5), F(2, 7), ((1,), (0,))),
    dot_case("dot/out_around_contract", W("oco", 3, 7, 5), F(2, 7), ((1,), (1,))),
    dot_case("dot/out_around_left", W("oco", 3, 7, 5), F(2, 7), ((1,), (1,)), weight_on="left"),
    dot_case("dot/out_side", W("co", 7, 5), F(3, 5), ((1,), (1,))),
    dot_case("dot/out_side_left", W("co", 7, 5), F(3, 5), ((1,), (1,)), weight_on="left"),
    dot_case("dot/two_out_side", W("coo", 7, 3, 5), F(2, 5, 3), ((2, 1), (1, 2))),
    dot_case("dot/rank_one", W("co", 7, 5, rank=1), F(3, 7), ((1,), (0,))),
    dot_case("dot/rank_four", W("co", 7, 5, rank=4), F(3, 7), ((1,), (0,))),
    dot_case("dot/scattered_5d_7d", SCATTERED_WEIGHT, SCATTERED_INPUT, **SCATTERED),
    dot_case(
        "dot/scattered_5d_7d_left",
        SCATTERED_WEIGHT,
        SCATTERED_INPUT,
        **flipped(SCATTERED),
        weight_on="left",
    ),
    einsum_case("einsum/experts", "ebd,edk->ebk", W("bco", 4, 7, 5), F(4, 3, 7)),
    einsum_case(
        "einsum/experts_left", "edk,ebd->bek", W("bco", 4, 7, 5), F(4, 3, 7), weight_on="left"
    ),
    einsum_case("einsum/experts_in_the_middle", "ebd,dek->bke", W("cbo", 7, 4, 5), F(4, 3, 7)),
    einsum_case("einsum/experts_out_side", "ebk,edk->ebd", W("bco", 4, 7, 5), F(4, 3, 5)),
    einsum_case("einsum/two_batch_dims", "lebd,ledk->lebk", W("bbco", 2, 3, 7, 5), F(2, 3, 4, 7)),
    einsum_case("einsum/batch_dims_apart", "lebd,dlke->ebkl", W("cbob", 7, 2, 5, 3), F(2, 3, 4, 7)),
    einsum_case("einsum/out_projection", "bthd,hdo->bto", W("cco", 2, 4, 5), F(3, 2, 2, 4)),
    einsum_case("einsum/query_projection", "btd,dhk->bhtk", W("coo", 7, 3, 5), F(2, 2, 7)),
    OpCase(
        name="dot/eight_bit_input",
        weights={"w": W("co", 7, 5)},
        inputs={"x": F(3, 7, dtype=jnp.float8_e4m3fn)},
        fn=lambda p, x: lax.dot_general(
            x["x"], p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        ),
        reference=lambda p, x: x["x"] @ p["w"],
        without=frozenset({"grad"}),  # an input of eight bits has a gradient of eight bits
    ),
    OpCase(
        name="dot/preferred_element_type",
        weights={"w": W("co", 7, 5, dtype=jnp.bfloat16)},
        inputs={"x": F(3, 7, dtype=jnp.bfloat16)},
        fn=lambda p, x: jnp.einsum("bd,dk->bk", x["x"], p["w"], preferred_element_type=jnp.float32),
        reference=lambda p, x: x["x"] @ p["w"],
        tolerance=HALF,
    ),
    OpCase(
        name="dot/half_weight_meets_float_input",
        weights={"w": W("co", 7, 5, dtype=jnp.bfloat16)},
        inputs={"x": F(3, 7)},
        fn=lambda p, x: lax.dot_general(
            x["x"], p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        ),
        reference=lambda p, x: x["x"] @ p["w"],
        tolerance=HALF,
    ),
    einsum_case(
        "dot/all_half",
        "bd,dk->bk",
        W("co", 7, 5, dtype=jnp.bfloat16),
        F(3, 7, dtype=jnp.bfloat16),
        tolerance=HALF,
    ),
    OpCase(
        name="dot/precision",
        weights={"w": W("co", 7, 5)},
        inputs={"x": F(3, 7)},
        fn=lambda p, x: jnp.matmul(x["x"], p["w"], precision=lax.Precision.HIGHEST),
        reference=lambda p, x: x["x"] @ p["w"],
    ),
    OpCase(
        name="dot/two_layers_with_bias",
        weights={
            "first": W("co", 7, 6),
            "bias": Plain(6),
            "second": W("co", 6, 5, rank=3),
        },
        inputs={"x": F(3, 7)},
        fn=lambda p, x: jax.nn.relu(x["x"] @ p["first"] + p["bias"][None]) @ p["second"],
        reference=lambda p, x: relu(x["x"] @ p["first"] + p["bias"]) @ p["second"],
    ),
    OpCase(
        name="dot/tied_both_sides",
        weights={"w": W("co", 7, 5)},
        inputs={"x": F(3, 7)},
        fn=lambda p, x: jnp.tanh(x["x"] @ p["w"]) @ p["w"].T,
        reference=lambda p, x: np.tanh(x["x"] @ p["w"]) @ p["w"].T,
    ),
    OpCase(
        name="dot/same_weight_twice",
        weights={"w": W("co", 6, 6)},
        inputs={"x": F(3, 6)},
        fn=lambda p, x: jnp.tanh(x["x"] @ p["w"]) @ p["w"],
        reference=lambda p, x: np.tanh(x["x"] @ p["w"]) @ p["w"],
    ),
    OpCase(
        name="dot/several_outputs",
        weights={"q": W("co", 7, 5), "v": W("co", 7, 4)},
        inputs={"x": F(3, 7)},
        fn=lambda p, x: {"q": x["x"] @ p["q"], "rest": (x["x"] @ p["v"], x["x"])},
        reference=lambda p, x: {"q": x["x"] @ p["q"], "rest": (x["x"] @ p["v"], x["x"])},
    ),
]
