"""Factors that do not belong to params: the message names the path and both shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lora
from tests.errors.bad import apply_fn, factors, init, inputs, params, rule


def edited(**changes):
    """Factors whose only node, the query kernel's, is changed."""
    tree = factors()
    query = tree["encoder"]["query"]
    query["kernel"] = dataclasses.replace(query["kernel"], **changes)
    return tree


def with_leaf(value):
    tree = factors()
    tree["encoder"]["query"]["kernel"] = value
    return tree


def without(*path):
    tree = node = factors()
    for name in path[:-1]:
        node = node[name]
    del node[path[-1]]
    return tree


def other_model():
    return init(rule("dense/kernel"), tree={"dense": {"kernel": jnp.ones((7, 5))}})


def wider_model():
    tree = params()
    tree["encoder"]["query"]["kernel"] = jnp.ones((9, 5))
    return init(rule(), tree=tree)


QUERY = "encoder/query/kernel"

BAD_FACTORS = {
    "leaf_missing": (lambda: without("head", "kernel"), ["head/kernel"]),
    "subtree_missing": (lambda: without("encoder"), ["encoder"]),
    "leaf_too_many": (lambda: factors() | {"extra": None}, ["extra"]),
    "another_model": (other_model, ["dense|encoder|head|conv|gain"]),
    "another_width": (wider_model, [QUERY, "9", "7"]),
    "a_of_wrong_length": (lambda: edited(a=jnp.ones((8, 2))), [QUERY, "8, 2", "7"]),
    "b_of_wrong_length": (lambda: edited(b=jnp.ones((2, 4))), [QUERY, "2, 4", "5"]),
    "a_of_wrong_ndim": (lambda: edited(a=jnp.ones((7, 1, 2))), [QUERY, "7, 1, 2"]),
    "a_transposed": (lambda: edited(a=jnp.ones((2, 7))), [QUERY, "2, 7"]),
    "ranks_differ": (lambda: edited(a=jnp.ones((7, 3))), [QUERY, "3", "2"]),
    "integer_factor": (lambda: edited(a=jnp.ones((7, 2), jnp.int32)), [QUERY, "int32"]),
    "complex_factor": (lambda: edited(b=jnp.ones((2, 5), jnp.complex64)), [QUERY, "complex64"]),
    "array_in_place_of_a_node": (lambda: with_leaf(jnp.ones((7, 5))), [QUERY]),
    "number_in_place_of_a_node": (lambda: with_leaf(1.5), [QUERY]),
    "string_in_place_of_a_node": (lambda: with_leaf("lora"), [QUERY]),
    "params_again": (params, ["kernel|conv|encoder", "init|adapter"]),
    "nothing_at_all": (lambda: None, ["None", "init|parallel|structure"]),
    "a_list": (lambda: [factors()], ["list|0/"]),
}

USES = {
    "wrap": lambda p, f: lora.wrap(apply_fn)(p, f, inputs()),
    "wrap_under_jit": lambda p, f: jax.jit(lora.wrap(apply_fn))(p, f, inputs()),
    "merge": lora.merge,
    "unmerge": lora.unmerge,
    "inspect": lambda p, f: lora.inspect(apply_fn, p, f, inputs()),
}

# A string is no JAX type: jit refuses it before the library sees it.
NOT_UNDER_JIT = {"string_in_place_of_a_node"}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("bad", BAD_FACTORS)
def test_factors_that_do_not_fit(bad, use):
    make, says = BAD_FACTORS[bad]
    tree = make()
    error = TypeError if use == "wrap_under_jit" and bad in NOT_UNDER_JIT else lora.StructureError
    with pytest.raises(error) as caught:
        USES[use](params(), tree)
    if error is lora.StructureError:
        for word in says:
            assert any(option in str(caught.value) for option in word.split("|")), word


@pytest.mark.parametrize("bad", BAD_FACTORS)
def test_nothing_runs_before_the_check(bad):
    """The user's function is not so much as traced with factors that do not fit."""
    calls = []

    def spy(params, x):
        calls.append(1)
        return apply_fn(params, x)

    tree = BAD_FACTORS[bad][0]()
    with pytest.raises(lora.StructureError):
        lora.wrap(spy)(params(), tree, inputs())
    assert not calls


@pytest.mark.parametrize("use", USES)
def test_params_and_factors_are_left_as_they_were(use):
    before, tree = params(), edited(a=jnp.ones((8, 2)))
    snapshot = jax.tree.map(np.array, (before, tree))
    with pytest.raises(lora.StructureError):
        USES[use](before, tree)
    jax.tree.map(np.testing.assert_array_equal, (before, tree), snapshot)


@pytest.mark.parametrize("use", USES)
def test_no_adapter_anywhere_is_no_error(use):
    """A tree of None is valid: the base alone."""
    none = jax.tree.map(lambda _: None, params())
    result = USES[use](params(), none)
    if use == "merge":
        jax.tree.map(np.testing.assert_array_equal, result, params())


def test_merge_refuses_what_is_not_finite_by_path():
    tree = edited(a=jnp.full((7, 2), jnp.nan), b=jnp.ones((2, 5)))
    with pytest.raises(lora.LoraError, match="encoder/query/kernel"):
        lora.merge(params(), tree, check_finite=True)
    assert jnp.isnan(lora.merge(params(), tree)["encoder"]["query"]["kernel"]).all()
