"""Gathers: embedding lookup in every index mode; layers and experts picked out of a stack."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.battery.case import F, Ints, OneOf, OpCase, W
from tests.reference import lookup

TABLE = W("co", 11, 5)
STACK = W("bco", 4, 7, 5)
IDS = Ints((6,), high=11)
OUT_OF_RANGE = OneOf(np.array([0, 10, 11, 40, -3], np.int32), np.array([7, 2, 99, 1, -1], np.int32))


def embedding_case(name, fn, reference, ids, *, table=TABLE, **kwargs):
    """`fn(table, ids)`."""
    if surrogate := kwargs.pop("surrogate", None):
        kwargs["surrogate"] = lambda p, x, *_: surrogate(p["table"], x["ids"])
    return OpCase(
        name=f"embedding/{name}",
        weights={"table": table},
        inputs={"ids": ids},
        fn=lambda p, x: fn(p["table"], x["ids"]),
        reference=lambda p, x: reference(p["table"], x["ids"]),
        **kwargs,
    )


def stack_case(name, fn, reference, *, weight=STACK, images=(), **inputs):
    """`fn(stack, inputs)`, where inputs hold the activations x and the index i."""
    return OpCase(
        name=f"stack/{name}",
        weights={"w": weight},
        inputs={"x": F(3, 7), "i": Ints((), high=4)} | inputs,
        fn=lambda p, x: fn(p["w"], x),
        reference=lambda p, x: reference(p["w"], x),
        images=(35, *images),
    )


def fill_with(value):
    return lambda table, ids: lookup(table, ids, mode="fill", fill=value)


def clip_both_ends(table, ids):
    """Unlike indexing, mode="clip" takes a negative id to row 0."""
    return table[np.clip(ids, 0, len(table) - 1)]


def columns(table, ids):
    return np.take(table, ids, axis=1)


def expert_per_token(w, x):
    """y[t] = x[t] · w[expert of t]."""
    return np.stack([row @ w[i] for row, i in zip(x["x"], x["i"], strict=True)])


def expert_pair_per_token(w, x):
    """y[t, k] = x[t] · w[k-th expert of t]."""
    return np.stack([[row @ w[i] for i in pair] for row, pair in zip(x["x"], x["i"], strict=True)])


def every_expert(w, x):
    return np.stack([x["x"] @ matrix for matrix in w])


LOOKUPS = [
    embedding_case("index", lambda t, i: t[i], lookup, IDS),
    embedding_case("take", lambda t, i: jnp.take(t, i, axis=0), lookup, IDS),
    embedding_case("two_dims_of_ids", lambda t, i: t[i], lookup, Ints((2, 3), high=11)),
    embedding_case("one_id", lambda t, i: t[i], lookup, Ints((), high=11)),
    embedding_case("negative_ids", lambda t, i: t[i], lookup, Ints((6,), high=11, low=-11)),
    embedding_case(
        "clip", lambda t, i: jnp.take(t, i, axis=0, mode="clip"), clip_both_ends, OUT_OF_RANGE
    ),
    embedding_case(
        "wrap",
        lambda t, i: jnp.take(t, i, axis=0, mode="wrap"),
        lambda t, i: t[i % len(t)],
        OUT_OF_RANGE,
    ),
    embedding_case(
        "fill_with_nan",
        lambda t, i: jnp.take(t, i, axis=0),
        fill_with(np.nan),
        OUT_OF_RANGE,
        surrogate=fill_with(0.0),
    ),
    embedding_case(
        "fill_with_a_value",
        lambda t, i: t.at[i].get(mode="fill", fill_value=7.0),
        fill_with(7.0),
        OUT_OF_RANGE,
    ),
    embedding_case(
        "promise_in_bounds",
        lambda t, i: t.at[i].get(mode="promise_in_bounds"),
        lookup,
        IDS,
    ),
    embedding_case(
        "unique_sorted_ids",
        lambda t, i: t.at[jnp.sort(i)].get(unique_indices=True, indices_are_sorted=True),
        lambda t, i: t[np.sort(i)],
        OneOf(np.array([4, 1, 9], np.int32), np.array([0, 10, 3], np.int32)),
    ),
    embedding_case(
        "table_on_its_side",
        lambda t, i: jnp.take(t, i, axis=1),
        columns,
        IDS,
        table=W("oc", 5, 11),
    ),
    embedding_case("several_out_dims", lambda t, i: t[i], lookup, IDS, table=W("coo", 11, 3, 4)),
    embedding_case(
        "half",
        lambda t, i: jnp.take(t, i, axis=0).astype(jnp.bfloat16),
        lookup,
        IDS,
        tolerance=4e-2,
    ),
    embedding_case(
        "one_hot",
        lambda t, i: jax.nn.one_hot(i, 11) @ t,
        lookup,
        IDS,
    ),
    OpCase(
        name="embedding/tied_head",
        weights={"table": TABLE},
        inputs={"ids": Ints((3,), high=11)},
        fn=lambda p, x: jnp.tanh(p["table"][x["ids"]]) @ p["table"].T,
        reference=lambda p, x: np.tanh(lookup(p["table"], x["ids"])) @ p["table"].T,
    ),
]

# The operation of a lookup, but what it yields is contracted along the rows: a weight still.
PERMUTATIONS = [
    OpCase(
        name="lookup/permuted_rows",
        weights={"w": W("co", 7, 5)},
        inputs={"x": F(3, 7), "order": OneOf(np.arange(7)[::-1].copy(), np.arange(7) * 3 % 7)},
        fn=lambda p, x: x["x"] @ p["w"][x["order"]],
        reference=lambda p, x: x["x"] @ p["w"][x["order"]],
    ),
    OpCase(
        name="lookup/rows_picked_and_transposed",
        weights={"w": W("co", 7, 5)},
        inputs={"x": F(4, 3), "rows": Ints((4,), high=7)},
        fn=lambda p, x: p["w"][x["rows"]].T @ x["x"],
        reference=lambda p, x: p["w"][x["rows"]].T @ x["x"],
        images=(20,),
    ),
    *(
        OpCase(
            name=f"lookup/added_to_a_product_{side}",
            weights={"table": TABLE, "w": W("co", 7, 5)},
            inputs={"ids": IDS, "x": F(6, 7)},
            fn=lambda p, x, s=sign: (lambda terms: terms[0] + terms[1])(
                (p["table"][x["ids"]], x["x"] @ p["w"])[::s]
            ),
            reference=lambda p, x: p["table"][x["ids"]] + x["x"] @ p["w"],
        )
        for side, sign in (("left", 1), ("right", -1))
    ),
    OpCase(
        name="lookup/contracted_and_looked_at",
        weights={"table": TABLE},
        inputs={"ids": IDS, "x": F(3, 6)},
        fn=lambda p, x: (lambda rows: (x["x"] @ rows, jnp.tanh(rows)))(p["table"][x["ids"]]),
        reference=lambda p, x: (x["x"] @ p["table"][x["ids"]], np.tanh(p["table"][x["ids"]])),
        activations=(30,),
    ),
]

PICKS = [
    stack_case("static", lambda w, x: x["x"] @ w[2], lambda w, x: x["x"] @ w[2]),
    stack_case("static_last", lambda w, x: x["x"] @ w[-1], lambda w, x: x["x"] @ w[-1]),
    stack_case("traced", lambda w, x: x["x"] @ w[x["i"]], lambda w, x: x["x"] @ w[x["i"]]),
    stack_case(
        "take_traced",
        lambda w, x: x["x"] @ jnp.take(w, x["i"], axis=0),
        lambda w, x: x["x"] @ w[x["i"]],
    ),
    stack_case(
        "dynamic_index_in_dim",
        lambda w, x: x["x"] @ lax.dynamic_index_in_dim(w, x["i"], keepdims=False),
        lambda w, x: x["x"] @ w[x["i"]],
    ),
    stack_case(
        "stack_dim_last",
        lambda w, x: x["x"] @ jnp.take(w, x["i"], axis=2),
        lambda w, x: x["x"] @ w[:, :, x["i"]],
        weight=W("cob", 7, 5, 4),
    ),
    stack_case(
        "two_indices",
        lambda w, x: x["x"] @ w[1, x["i"]],
        lambda w, x: x["x"] @ w[1, x["i"]],
        weight=W("bbco", 2, 4, 7, 5),
        images=(4 * 35,),
    ),
    stack_case(
        "vector",
        lambda w, x: jnp.einsum("td,tdk->tk", x["x"], w[x["i"]]),
        expert_per_token,
        i=Ints((3,), high=4),
        images=(3 * 35,),
    ),
    stack_case(
        "static_vector",
        lambda w, x: jnp.einsum("td,tdk->tk", x["x"], w[jnp.array([2, 0, 3])]),
        lambda w, x: expert_per_token(w, {"x": x["x"], "i": [2, 0, 3]}),
        images=(3 * 35,),
    ),
    stack_case(
        "two_experts_per_token",
        lambda w, x: jnp.einsum("td,tedk->tek", x["x"], jnp.take(w, x["i"], axis=0)),
        expert_pair_per_token,
        i=Ints((3, 2), high=4),
        images=(6 * 35,),
    ),
    stack_case(
        "every_expert_on_every_token",
        lambda w, x: jnp.einsum("td,edk->etk", x["x"], w),
        every_expert,
    ),
    stack_case(
        "sum_over_experts",
        lambda w, x: jnp.einsum("ted,edk->tk", x["h"], w),
        lambda w, x: np.einsum("ted,edk->tk", x["h"], w),
        h=F(3, 4, 7),
    ),
    OpCase(
        name="stack/lookup_under_two_vmaps",
        weights={"w": W("bbco", 2, 3, 7, 5)},
        inputs={"i": Ints((3, 2, 4), high=7)},
        fn=lambda p, x: jax.vmap(jax.vmap(lambda w, i: w[i]))(jnp.swapaxes(p["w"], 0, 1), x["i"]),
        reference=lambda p, x: np.take_along_axis(
            np.swapaxes(p["w"], 0, 1), x["i"][..., None], axis=2
        ),
        images=(3 * 2 * 4 * 5,),
        activations=(3 * 2 * 4 * 5,),
    ),
    OpCase(
        name="stack/layer_then_lookup",
        weights={"w": W("bco", 2, 11, 5)},
        inputs={"ids": IDS, "i": Ints((), high=2)},
        fn=lambda p, x: p["w"][x["i"]][x["ids"]],
        reference=lambda p, x: p["w"][x["i"]][x["ids"]],
        images=(55,),
    ),
]

CASES = LOOKUPS + PERMUTATIONS + PICKS
