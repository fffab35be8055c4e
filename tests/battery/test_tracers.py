"""No tracer leaks, and other values of the factors never compile anew."""

import jax
import pytest

import lorax_fn as lora
from tests.battery.cases import ALL, FACTORED, OPERATIONS
from tests.battery.materials import materials
from tests.battery.transforms import Run

# psum under shard_map, and the gradient of a gather in a scan there, leak without any adapter.
LEAKS_IN_JAX = {
    "shard_map/on_contract",
    "shard_map/from_the_neighbour",
    "shard_map/gathered_layers",
}


CHECKED = [
    case for case in FACTORED if (ALL or case.name in OPERATIONS) and case.name not in LEAKS_IN_JAX
]


@pytest.mark.parametrize("case", CHECKED, ids=repr)
def test_no_tracer_leaks(case):
    drawn, run = materials(case), Run(case, lora.wrap(case.fn))
    with jax.checking_leaks():
        jax.eval_shape(run.step, drawn.factors[0], drawn.xs[0], drawn.cts[0])


@pytest.mark.parametrize("case", FACTORED[::9], ids=repr)
def test_other_factors_compile_nothing(case):
    drawn, run = materials(case), Run(case, lora.wrap(case.fn))
    step = jax.jit(run.step)
    for factors in (drawn.initial, *drawn.factors):
        for x, ct in zip(drawn.xs, drawn.cts, strict=True):
            step(factors, x, ct)
    assert step._cache_size() == 1
