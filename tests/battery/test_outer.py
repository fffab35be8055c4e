"""Transformations outside the wrapped function that need more than the common battery gives."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import lorax_fn as lora
from tests.battery.cases import FACTORED
from tests.battery.materials import assert_close, expected, materials
from tests.battery.transforms import Run, inner, stacked
from tests.reference import directional_difference, float64

BY_NAME = {case.name: case for case in FACTORED}

TINY = [
    "dot/tied_both_sides",
    "dot/two_layers_with_bias",
    "conv/1d",
    "embedding/tied_head",
    "chain/fused_qkv_some_adapted",
    "inside/grad",
]


@pytest.mark.parametrize("name", TINY)
def test_hessian(name):
    """Column by column: the derivative of the numpy gradient along every entry of the factors."""
    case = BY_NAME[name]
    drawn, run = materials(case), Run(case, lora.wrap(case.fn, dense="error"))
    flat, unravel = jax.flatten_util.ravel_pytree(drawn.factors[0])

    def loss(flat):
        return inner(run.apply(unravel(flat), drawn.xs[0]), drawn.cts[0])

    got = np.asarray(jax.jit(jax.hessian(loss))(flat))
    reference = expected(case)
    for column in range(0, flat.size, 5):
        direction = jax.tree.leaves(unravel(jnp.zeros_like(flat).at[column].set(1.0)))
        wanted = directional_difference(
            lambda leaves: reference.gradient_at(leaves, 0),
            reference.factors(0),
            [float64(leaf) for leaf in direction],
            step=1e-4,
        )
        assert_close(got[:, column], np.concatenate([x.ravel() for x in wanted]), 2e-4)


OUTER = [
    "dot/weight_on_the_right",
    "conv/2d",
    "embedding/index",
    "scan/stacked_layers",
    "ragged/dot",
]


@pytest.mark.parametrize("name", OUTER)
def test_shard_map_over_examples(name):
    """Two devices, an input each; params and factors whole on both."""
    case = BY_NAME[name]
    drawn, run = materials(case), Run(case, lora.wrap(case.fn, dense="error"))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def one(factors, x, ct):
        x, ct = jax.tree.map(lambda leaf: leaf[0], (x, ct))
        out, gradient = run.step(factors, x, ct)
        return jax.tree.map(lambda leaf: leaf[None], out), gradient

    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": (P("data"), P())}
    step = jax.jit(jax.shard_map(one, mesh=mesh, **specs))
    outs, gradient = step(drawn.factors[0], stacked(*drawn.xs), stacked(*drawn.cts))
    reference = expected(case)
    for j in range(2):
        assert_close(outs[j], reference.output(0, j), case.tolerance)
    pairs = zip(reference.gradient(0, 0), reference.gradient(0, 1), strict=True)
    assert_close(gradient, [sum(pair) for pair in pairs], case.tolerance)


def test_a_weight_that_is_returned_is_added_up():
    case = BY_NAME["dot/weight_on_the_right"]
    drawn = materials(case)

    def with_weight(params, x):
        return x["x"] @ params["w"], params["w"]

    with pytest.warns(lora.DenseWarning, match=r"\bw\b"):
        _, weight = lora.wrap(with_weight)(drawn.params, drawn.factors[0], drawn.xs[0])
    factors = expected(case).factors(0)
    assert_close(weight, expected(case).adapted(factors, factors)["w"], 1e-6)
    assert lora.inspect(with_weight, drawn.params, drawn.factors[0], drawn.xs[0]).dense == ["w"]
