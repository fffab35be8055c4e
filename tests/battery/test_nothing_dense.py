"""No A·B and no dW is ever formed: shown on the jaxpr of the wrapped function and its gradient."""

import jax
import pytest

import lorax_fn as lora
from tests.battery.cases import FACTORED
from tests.battery.materials import materials
from tests.battery.taint import dense_values, dependencies, image_sizes
from tests.battery.transforms import inner


def forbidden_sizes(case):
    """Sizes of the weights, of one slice of each stack, and of every image of a weight in `fn`."""
    drawn = materials(case)
    weights = {name: drawn.params[name] for name, w in case.weights.items() if w.roles}
    others = {name: value for name, value in drawn.params.items() if name not in weights}
    sizes = image_sizes(lambda w, o, x: case.fn(w | o, x), weights, others, drawn.xs[0])
    return (sizes | set(case.images)) - set(case.activations)


def outcome(case, fn):
    """`fn(params, factors, x)` made a function with a cotangent: (output, gradient)."""

    def step(params, factors, x, ct):
        def loss(factors):
            out = fn(params, factors, x)
            return inner(out, ct), out

        if not case.reverse:
            return loss(factors)
        return jax.value_and_grad(loss, has_aux=True)(factors)

    return step


def dense_values_of(case, fn):
    drawn = materials(case)
    arguments = (drawn.params, drawn.factors[0], drawn.xs[0], drawn.cts[0])
    return dense_values(outcome(case, fn), *arguments, forbidden_sizes(case))


@pytest.mark.parametrize("case", FACTORED, ids=repr)
def test_no_dense_value_in_forward_and_gradient(case):
    assert dense_values_of(case, lora.wrap(case.fn)) == []


@pytest.mark.parametrize("case", FACTORED, ids=repr)
def test_the_check_sees_a_dense_sum(case):
    """Guards the guard: "add up, then apply" must be caught in every case."""

    def add_up_then_apply(params, factors, x):
        return case.fn(lora.merge(params, factors), x)

    assert dense_values_of(case, add_up_then_apply)


@pytest.mark.parametrize("case", FACTORED, ids=repr)
def test_inspect_lists_no_dense_leaf(case):
    drawn = materials(case)
    assert lora.inspect(case.fn, drawn.params, drawn.factors[0], drawn.xs[0]).dense == []


@pytest.mark.parametrize("case", [case for case in FACTORED if case.reverse], ids=repr)
def test_the_base_gets_no_gradient_and_costs_no_dense_product(case):
    """Both trees differentiated: the base's gradient depends on nothing, so it can only be zero."""
    drawn, wrapped = materials(case), lora.wrap(case.fn)

    def gradients(params, factors, x, ct):
        def loss(params, factors):
            return inner(wrapped(params, factors, x), ct)

        return jax.grad(loss, argnums=(0, 1))(params, factors)

    arguments = (drawn.params, drawn.factors[0], drawn.xs[0], drawn.cts[0])
    assert dense_values(gradients, *arguments, forbidden_sizes(case)) == []
    base, _ = dependencies(gradients, *arguments)
    assert all(labels == set() for labels in base.values())
