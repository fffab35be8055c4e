"""Real models, untouched: the invariants of `wrap` on each, and no weight added up anywhere."""

import jax
import numpy as np
import pytest

import lorax_fn as lora

from . import (
    equinox_cases,
    haiku_cases,
    image_cases,
    language_cases,
    linen_cases,
    nnx_cases,
    plain_cases,
    transformers_perception_cases,
    transformers_text_cases,
)
from .harness import Adapted, assert_close

MODULES = [
    linen_cases,
    nnx_cases,
    plain_cases,
    equinox_cases,
    haiku_cases,
    transformers_text_cases,
    transformers_perception_cases,
    language_cases,
    image_cases,
]
CASES = [case for module in MODULES for case in module.CASES]
OURS = (linen_cases, nnx_cases, plain_cases, equinox_cases, haiku_cases)

# Third-party packages may warn about JAX or Flax as they please; a weight added up is an error.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::lorax_fn.DenseWarning"),
]


def name_of(case):
    return case.name


@pytest.fixture(scope="module", params=CASES, ids=name_of)
def model(request):
    return Adapted(request.param)


def test_every_target_is_adapted_and_no_weight_is_added_up(model):
    report = lora.inspect(model.apply_fn, model.params, model.at_init, *model.args, **model.kwargs)
    assert report.dense == []
    assert len(nodes(model.at_init)) == model.case.adapted


def test_at_init_the_adapted_model_is_the_base_model(model):
    outputs, _, _ = model.wrapped_step(model.at_init)
    want_outputs, _, _ = model.merged_step(model.at_init)  # merged with nothing: the base itself
    # XLA fuses, and so rounds, two programs differently.
    assert_close(outputs, want_outputs, model.case.tolerance / 10)


@pytest.mark.parametrize(
    "model", [case for module in OURS for case in module.CASES], indirect=True, ids=name_of
)
def test_at_init_every_operation_gives_the_same_bits(model):
    """Of the models written here: one operation after another takes long in a large one."""
    with jax.disable_jit():
        base = model.base(model.floats)
        wrapped = model.wrapped(model.floats, model.at_init)
    for got, want in zip(wrapped, base, strict=True):
        np.testing.assert_array_equal(got, want)


def test_the_adapted_model_is_the_merged_model(model):
    factors = model.random_factors(seed=2)
    outputs, _, gradients = model.wrapped_step(factors)
    want_outputs, _, want_gradients = model.merged_step(factors)
    assert_close(outputs, want_outputs, model.case.tolerance)
    assert_close(gradients, want_gradients, model.case.tolerance)
    assert all(map(np.any, jax.tree.leaves(want_gradients)))


def test_the_base_gets_no_gradient(model):
    _, params_gradient, _ = model.wrapped_step(model.random_factors(seed=2))
    assert not any(map(np.any, params_gradient))


def test_other_factors_do_not_retrace(model):
    before, _, _ = model.wrapped_step(model.random_factors(seed=2))
    traces = model.wrapped_step.traces  # more than one if caches were cleared between two tests
    after, _, _ = model.wrapped_step(model.random_factors(seed=3))
    assert model.wrapped_step.traces == traces
    assert model.wrapped_step.compiled._cache_size() == 1
    assert not all(map(np.array_equal, before, after))


def nodes(factors):
    return [leaf for leaf in jax.tree.leaves(factors, is_leaf=is_node) if is_node(leaf)]


def is_node(leaf):
    return hasattr(leaf, "a") and hasattr(leaf, "b")
