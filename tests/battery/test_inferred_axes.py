"""What `infer_axes` finds is a split under which nothing is added up, in every case."""

import re

import jax
import pytest

import lorax_fn as lora
from tests.battery.cases import FACTORED
from tests.battery.materials import materials


@pytest.mark.parametrize("case", FACTORED, ids=repr)
def test_the_inferred_axes_keep_every_weight_factored(case):
    drawn = materials(case)
    params, x = drawn.params, drawn.xs[0]
    axes = lora.infer_axes(case.fn, params, x)
    adapted = [name for name, weight in case.weights.items() if weight.roles]
    assert all(isinstance(axes[name], lora.Axes) for name in adapted)

    rules = [lora.LoRA(re.escape(name), rank=1, alpha=1.5) for name in adapted]
    factors = jax.eval_shape(
        lambda key: lora.init(key, params, rules, axes=axes), jax.random.key(0)
    )
    wrapped = lora.wrap(case.fn, dense="error")
    assert jax.eval_shape(wrapped, params, factors, x) == jax.eval_shape(case.fn, params, x)


@pytest.mark.parametrize("case", FACTORED, ids=repr)
def test_inference_takes_shapes_alone(case):
    """Arrays or ShapeDtypeStructs: the answer is the same."""
    drawn = materials(case)
    shapes = jax.eval_shape(lambda tree: tree, (drawn.params, drawn.xs[0]))
    assert lora.infer_axes(case.fn, *shapes) == lora.infer_axes(case.fn, drawn.params, drawn.xs[0])
