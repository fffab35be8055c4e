"""The operations of the battery on a quantised base: what they compute on the dequantised one."""

import os
import re

import jax
import jax.numpy as jnp
import pytest

import lorax_fn as lora
from tests.battery.cases import FACTORED
from tests.battery.materials import assert_close, materials
from tests.battery.transforms import inner

# One operation or two for each interpreter rule; all of them with ALL_OPERATIONS=1.
OPERATIONS = [
    "dot/contract_around_out",
    "dot/all_half",
    "dot/tied_both_sides",
    "einsum/experts",
    "conv/2d_everything",
    "embedding/two_dims_of_ids",
    "embedding/fill_with_nan",
    "embedding/tied_head",
    "stack/traced",
    "stack/every_expert_on_every_token",
    "stack/layer_then_lookup",
    "ragged/dot",
    "chain/long",
    "chain/cast_to_half",
    "chain/dynamic_slice_out",
    "chain/times_both_vectors",
    "chain/fused_qkv_some_adapted",
    "chain/split",
    "chain/optimization_barrier",
    "scan/stacked_layers",
    "scan/no_layers",
    "scan/fast_weights",
    "scan/constant_and_stacks",
    "while/carry",
    "inside/vmap_over_experts",
]
ALL = os.environ.get("ALL_OPERATIONS") == "1"
CASES = [case for case in FACTORED if ALL or case.name in OPERATIONS]
assert {*OPERATIONS} <= {case.name for case in FACTORED}


def block_of(length):
    """The smallest divisor above one: several blocks, where there can be."""
    return next((n for n in range(2, length) if length % n == 0), length)


def quantised(params):
    """All matrices in int8."""
    for name, leaf in params.items():
        if leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size:
            block = block_of(leaf.shape[-2])
            params = lora.quantize(params, re.escape(name), dtype="int8", block=block)
    return params


def floating(params):
    return lora.merge(params, dict.fromkeys(params))


def outcome(case, params):
    """Output, tangent along the drawn direction, gradients for factors and floating inputs."""
    drawn, wrapped = materials(case), lora.wrap(case.fn, dense="error")
    floats = {k: x for k, x in drawn.xs[0].items() if jnp.issubdtype(x.dtype, jnp.floating)}

    @jax.jit
    def step(params, factors, floats):
        def loss(factors, floats):
            out = wrapped(params, factors, drawn.xs[0] | floats)
            return inner(out, drawn.cts[0]), out

        run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True) if case.reverse else loss
        return jax.jvp(lambda factors: run(factors, floats), (factors,), (drawn.direction,))

    return step(params, drawn.factors[0], floats)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_computes_what_the_dequantised_base_computes(case):
    base = quantised(materials(case).params)
    assert_close(outcome(case, base), outcome(case, floating(base)), case.tolerance / 10)
