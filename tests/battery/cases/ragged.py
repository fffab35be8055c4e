"""Token-routed experts: ragged_dot and ragged_dot_general."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.battery.case import HALF, F, OneOf, OpCase, W
from tests.reference import ragged_dot

EXPERTS = W("bco", 4, 7, 5)
TOKENS = F(6, 7)
SIZES = OneOf(np.array([1, 2, 0, 3], np.int32), np.array([0, 4, 1, 1], np.int32))
# Fewer tokens than rows: the rows beyond the last group are zero.
SHORT = OneOf(np.array([1, 2, 0, 1], np.int32), np.array([0, 0, 2, 0], np.int32))
# JAX has a batching rule only where all of lhs, rhs and group sizes are batched.
NO_BATCHING = frozenset({"vmap_inputs", "vmap_factors"})


def general(lhs, rhs, sizes, contract, batch, ragged, group):
    return lax.ragged_dot_general(
        lhs,
        rhs,
        sizes,
        lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(contract, batch),
            lhs_ragged_dimensions=[ragged],
            rhs_group_dimensions=group,
        ),
    )


def ragged_case(name, fn, reference, *, weight=EXPERTS, x=TOKENS, sizes=SIZES, **kwargs):
    """`fn(x, w, sizes)`."""
    return OpCase(
        name=f"ragged/{name}",
        weights={"w": weight},
        inputs={"x": x, "sizes": sizes},
        fn=lambda p, inputs: fn(inputs["x"], p["w"], inputs["sizes"]),
        reference=lambda p, inputs: reference(inputs["x"], p["w"], inputs["sizes"]),
        without=NO_BATCHING,
        **kwargs,
    )


CASES = [
    ragged_case("dot", lax.ragged_dot, ragged_dot),
    ragged_case("fewer_tokens_than_rows", lax.ragged_dot, ragged_dot, sizes=SHORT),
    ragged_case(
        "out_side",
        lambda x, w, sizes: lax.ragged_dot(x, jnp.swapaxes(w, 1, 2), sizes),
        lambda x, w, sizes: ragged_dot(x, np.swapaxes(w, 1, 2), sizes),
        x=F(6, 5),
    ),
    ragged_case(
        "preferred_element_type",
        lambda x, w, sizes: lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32),
        ragged_dot,
        weight=W("bco", 4, 7, 5, dtype=jnp.bfloat16),
        x=F(6, 7, dtype=jnp.bfloat16),
        tolerance=HALF,
    ),
    ragged_case(
        "general_odd_dims",
        lambda x, w, sizes: general(x, w, sizes, ((0,), (2,)), ((), ()), 1, [1]),
        lambda x, w, sizes: ragged_dot(x.T, np.transpose(w, (1, 2, 0)), sizes),
        weight=W("obc", 5, 4, 7),
        x=F(7, 6),
    ),
    ragged_case(
        "general_with_batch_dim",
        lambda x, w, sizes: general(x, w, sizes, ((2,), (2,)), ((0,), (0,)), 1, [1]),
        lambda x, w, sizes: np.stack([ragged_dot(*pair, sizes) for pair in zip(x, w, strict=True)]),
        weight=W("bbco", 2, 4, 7, 5),
        x=F(2, 6, 7),
    ),
    OpCase(
        name="ragged/two_layers_of_experts",
        weights={"up": W("bco", 4, 7, 6), "down": W("bco", 4, 6, 5)},
        inputs={"x": TOKENS, "sizes": SIZES},
        fn=lambda p, x: lax.ragged_dot(
            jnp.tanh(lax.ragged_dot(x["x"], p["up"], x["sizes"])), p["down"], x["sizes"]
        ),
        reference=lambda p, x: ragged_dot(
            np.tanh(ragged_dot(x["x"], p["up"], x["sizes"])), p["down"], x["sizes"]
        ),
        without=NO_BATCHING,
    ),
]
