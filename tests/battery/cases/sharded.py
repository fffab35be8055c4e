"""shard_map over eight devices: the weight replicated, or cut along any of its roles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

from tests.battery.case import F, OpCase, W

# Plain JAX cannot nest a second mesh over the same devices.
NO_PMAP = frozenset({"pmap"})


def sharded_case(name, body, reference, weight, x, *, w_spec, x_spec, out_spec, **kwargs):
    """`body(w, x)` sees one shard of each; `mesh` has all eight devices on one axis, "d"."""

    def fn(p, inputs):
        mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
        mapped = jax.shard_map(body, mesh=mesh, in_specs=(w_spec, x_spec), out_specs=out_spec)
        return mapped(p["w"], inputs["x"])

    return OpCase(
        name=f"shard_map/{name}",
        weights={"w": weight},
        inputs={"x": x},
        fn=fn,
        reference=lambda p, inputs: reference(p["w"], inputs["x"]),
        without=NO_PMAP,
        **kwargs,
    )


def matmul(w, x):
    return x @ w


def partial_sum(w, x):
    return lax.psum(x @ w, "d")


def picked_layers(w, x):
    """Each device's columns of all layers, picked one by one."""
    pick = lambda i: lax.dynamic_index_in_dim(w, i, keepdims=False)
    return lax.fori_loop(0, 3, lambda i, y: y + x @ pick(i), x @ jnp.zeros_like(w[0]))


def gathered(axis):
    """As FSDP does: a weight cut over the devices is brought together where it is used."""
    return lambda w, x: x @ lax.all_gather(w, "d", axis=axis, tiled=True)


def gathered_in_parts(w, x):
    return x @ lax.all_gather(w, "d").reshape(-1, w.shape[1])


def from_the_neighbour(w, x):
    """Each device's rows of w go to the next one."""
    w = lax.ppermute(w, "d", [(i, (i + 1) % 8) for i in range(8)])
    return lax.psum(x @ w, "d")


def from_the_neighbour_reference(w, x):
    return x @ np.roll(w, len(w) // 8, axis=0)


CASES = [
    *(
        sharded_case(
            name,
            body,
            lambda w, x: x @ w,
            W("co", 24, 40),  # not of the size of eight devices' A or B
            F(8, 24),
            w_spec=spec,
            x_spec=P("d"),
            out_spec=P("d"),
        )
        for name, body, spec in (
            ("gathered_on_contract", gathered(0), P("d")),
            ("gathered_on_out", gathered(1), P(None, "d")),
            ("gathered_in_parts", gathered_in_parts, P("d")),
        )
    ),
    sharded_case(
        "from_the_neighbour",
        from_the_neighbour,
        from_the_neighbour_reference,
        W("co", 32, 7),
        F(3, 32),
        w_spec=P("d"),
        x_spec=P(None, "d"),
        out_spec=P(),
    ),
    sharded_case(
        "gathered_layers",
        lambda w, x: lax.scan(
            lambda h, w: (jnp.tanh(h @ lax.all_gather(w, "d", axis=1, tiled=True)), None), x, w
        )[0],
        lambda w, x: functools.reduce(lambda h, w: np.tanh(h @ w), w, x),
        W("bco", 3, 8, 8),
        F(16, 8),
        w_spec=P(None, None, "d"),
        x_spec=P("d"),
        out_spec=P("d"),
    ),
    sharded_case(
        "picked_layers",
        picked_layers,
        lambda w, x: (x @ w).sum(0),
        W("bco", 3, 7, 24),
        F(2, 7),
        w_spec=P(None, None, "d"),
        x_spec=P(),
        out_spec=P(None, "d"),
    ),
    sharded_case(
        "replicated",
        matmul,
        lambda w, x: x @ w,
        W("co", 7, 5),
        F(16, 7),
        w_spec=P(),
        x_spec=P("d"),
        out_spec=P("d"),
    ),
    sharded_case(
        "on_contract",
        partial_sum,
        lambda w, x: x @ w,
        W("co", 32, 7),
        F(3, 32),
        w_spec=P("d", None),
        x_spec=P(None, "d"),
        out_spec=P(),
    ),
    sharded_case(
        "on_out",
        matmul,
        lambda w, x: x @ w,
        W("co", 7, 24),
        F(2, 7),
        w_spec=P(None, "d"),
        x_spec=P(),
        out_spec=P(None, "d"),
    ),
    sharded_case(
        "on_experts",
        lambda w, x: jnp.einsum("ebd,edk->ebk", x, w),
        lambda w, x: np.einsum("ebd,edk->ebk", x, w),
        W("bco", 8, 7, 5),
        F(8, 3, 7),
        w_spec=P("d"),
        x_spec=P("d"),
        out_spec=P("d"),
    ),
    sharded_case(
        "cast_and_transposed",
        lambda w, x: jnp.tanh(x @ w.astype(jnp.float32)) @ w.T,
        lambda w, x: np.tanh(x @ w) @ w.T,
        W("co", 7, 5),
        F(16, 7),
        w_spec=P(),
        x_spec=P("d"),
        out_spec=P("d"),
    ),
]
