"""Where a weight meets what has no factored form: right numbers, and the user is told where."""

import inspect as python_inspect
import re
import warnings

import numpy as np
import pytest

import lorax_fn as lora
from tests.battery.cases.dense import ADDED_UP
from tests.battery.materials import assert_close, expected, materials
from tests.battery.transforms import TRANSFORMS, Run


def marked(fn):
    """(primitive, "file:line") of the line of `fn` that says `# dense: <primitive>`."""
    lines, first = python_inspect.getsourcelines(fn)
    offset, line = next((i, line) for i, line in enumerate(lines) if "# dense:" in line)
    primitive = re.search(r"# dense: (\w+)", line)[1]
    return primitive, f"dense.py:{first + offset}"


def call(case, dense):
    drawn = materials(case)
    return lora.wrap(case.fn, dense=dense)(drawn.params, drawn.factors[0], drawn.xs[0])


@pytest.mark.parametrize(
    ("case", "transform"),
    [
        pytest.param(case, transform, id=f"{case.name}-{name}")
        for case in ADDED_UP
        for name, transform in TRANSFORMS.items()
        if name not in case.without
    ],
)
def test_the_sum_is_right(case, transform):
    for quantity, f, j, value in transform(Run(case, lora.wrap(case.fn, dense="allow"))):
        wanted = getattr(expected(case), quantity)(f, j)
        assert_close(value, wanted, case.tolerance, f"{quantity} with factors {f}, inputs {j}")


@pytest.mark.parametrize("case", ADDED_UP, ids=repr)
def test_warns_with_path_primitive_and_line(case):
    primitive, line = marked(case.fn)
    with pytest.warns(lora.DenseWarning) as caught:
        call(case, "warn")
    message = str(caught[0].message)
    assert re.search(r"\bw\b", message)
    assert re.search(rf"\b{primitive}\b", message)
    assert line in message


@pytest.mark.parametrize("case", ADDED_UP, ids=repr)
def test_raises_with_path_primitive_and_line(case):
    primitive, line = marked(case.fn)
    with pytest.raises(lora.LoraError) as caught:
        call(case, "error")
    message = str(caught.value)
    assert re.search(r"\bw\b", message)
    assert re.search(rf"\b{primitive}\b", message)
    assert line in message


@pytest.mark.parametrize("case", ADDED_UP, ids=repr)
def test_is_silent_where_allowed(case):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(case, "allow")
    assert [w for w in caught if issubclass(w.category, lora.DenseWarning)] == []


@pytest.mark.parametrize("case", ADDED_UP, ids=repr)
def test_inspect_lists_the_leaf(case):
    drawn = materials(case)
    assert lora.inspect(case.fn, drawn.params, drawn.factors[0], drawn.xs[0]).dense == ["w"]


@pytest.mark.optimized
@pytest.mark.parametrize("case", ADDED_UP, ids=repr)
def test_equals_the_base_bit_for_bit_at_init(case):
    drawn = materials(case)
    wrapped = lora.wrap(case.fn, dense="allow")
    adapted = wrapped(drawn.params, drawn.initial, drawn.xs[0])
    np.testing.assert_array_equal(adapted, case.fn(drawn.params, drawn.xs[0]))
