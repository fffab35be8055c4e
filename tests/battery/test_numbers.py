"""Every case under every transformation agrees with the numpy reference: output and derivatives."""

import jax
import numpy as np
import pytest

import lorax_fn as lora
from tests.battery.cases import ALL, FACTORED, OPERATIONS
from tests.battery.materials import assert_close, expected, materials
from tests.battery.transforms import TRANSFORMS, Run

# For every operation; the other transformations take the same paths through the interpreter, and are
# for one operation or two of each rule, or for all with ALL_OPERATIONS=1.
ALWAYS = {"eager", "jit", "grad", "vmap_inputs", "scan", "remat"}


@pytest.mark.parametrize(
    ("case", "transform"),
    [
        pytest.param(case, transform, id=f"{case.name}-{name}")
        for case in FACTORED
        for name, transform in TRANSFORMS.items()
        if name not in case.without and (ALL or name in ALWAYS or case.name in OPERATIONS)
    ],
)
def test_agrees_with_reference(case, transform):
    run = Run(case, lora.wrap(case.fn, dense="error"))
    seen = 0
    for quantity, f, j, value in transform(run):
        wanted = getattr(expected(case), quantity)(f, j)
        assert_close(value, wanted, case.tolerance, f"{quantity} with factors {f}, inputs {j}")
        seen += 1
    assert seen or not case.reverse


@pytest.mark.parametrize("case", FACTORED, ids=repr)
def test_shapes_and_dtypes_are_those_of_the_base(case):
    drawn = materials(case)
    wrapped = lora.wrap(case.fn, dense="error")
    base = jax.eval_shape(case.fn, drawn.params, drawn.xs[0])
    assert jax.eval_shape(wrapped, drawn.params, drawn.factors[0], drawn.xs[0]) == base


@pytest.mark.optimized
@pytest.mark.parametrize("mode", ["eager", "jit"])
@pytest.mark.parametrize("case", FACTORED, ids=repr)
def test_equals_the_base_bit_for_bit_at_init(case, mode):
    compile_or_not = jax.jit if mode == "jit" else lambda fn: fn
    drawn = materials(case)
    wrapped = compile_or_not(lora.wrap(case.fn, dense="error"))
    base = compile_or_not(case.fn)(drawn.params, drawn.xs[0])
    adapted = wrapped(drawn.params, drawn.initial, drawn.xs[0])
    for got, want in zip(jax.tree.leaves(adapted), jax.tree.leaves(base), strict=True):
        assert got.dtype == want.dtype
        if mode in case.rounding:
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
        else:
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize("case", FACTORED, ids=repr)
def test_equals_the_merged_model(case):
    drawn = materials(case)
    merged = lora.merge(drawn.params, drawn.factors[0])
    assert jax.tree.structure(merged) == jax.tree.structure(drawn.params)
    by_merge = jax.jit(case.fn)(merged, drawn.xs[0])
    assert_close(by_merge, expected(case).output(0, 0), case.tolerance)
