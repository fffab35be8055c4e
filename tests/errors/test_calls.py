"""Swapped arguments, keys of the wrong kind, functions that do not take the pytree first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lora
from tests.errors.bad import Bad, apply_fn, factors, inputs, params, rule


def wrapped(*args, **kwargs):
    return lora.wrap(apply_fn)(*args, **kwargs)


def data_first(x, params):
    return apply_fn(params, x)


def closed_over(x):
    return apply_fn(params(), x)


SWAPPED = [
    Bad(
        "factors_before_params",
        lambda: wrapped(factors(), params(), inputs()),
        lora.StructureError,
        [r"order|swapped|exchanged", r"params, factors"],
    ),
    Bad(
        "factors_last",
        lambda: wrapped(params(), inputs(), factors()),
        lora.StructureError,
        [r"factors", r"init|second"],
    ),
    Bad(
        "factors_left_out",
        lambda: wrapped(params(), inputs()),
        lora.StructureError,
        [r"an array float32", r"left out", r"\(params, factors"],
    ),
    Bad(
        "inputs_first",
        lambda: wrapped(inputs(), params(), factors()),
        lora.StructureError,
        [r"factors|params", r"first|params, factors"],
    ),
    Bad(
        "inputs_before_factors",
        lambda: wrapped(inputs(), factors(), params()),
        lora.StructureError,
        [r"factors|params"],
    ),
    Bad(
        "merge_swapped",
        lambda: lora.merge(factors(), params()),
        lora.StructureError,
        [r"order|swapped|exchanged", r"params, factors"],
    ),
    Bad(
        "inspect_swapped",
        lambda: lora.inspect(apply_fn, factors(), params(), inputs()),
        lora.StructureError,
        [r"order|swapped|exchanged"],
    ),
    Bad(
        "init_params_before_key",
        lambda: lora.init(params(), jax.random.key(0), [rule()]),
        lora.LoraError,
        [r"key"],
    ),
]

NO_FUNCTION = [
    Bad("wrap_params", lambda: lora.wrap(params()), lora.LoraError, [r"dict", r"apply_fn"]),
    Bad("wrap_none", lambda: lora.wrap(None), lora.LoraError, [r"NoneType|None", r"apply_fn"]),
    Bad(
        "infer_axes_params_first",
        lambda: lora.infer_axes(params(), apply_fn, inputs()),
        lora.LoraError,
        [r"dict", r"apply_fn"],
    ),
    Bad(
        "inspect_params_first",
        lambda: lora.inspect(params(), apply_fn, factors(), inputs()),
        lora.LoraError,
        [r"dict", r"apply_fn"],
    ),
    Bad(
        "dense_unknown",
        lambda: lora.wrap(apply_fn, dense="ignore"),
        lora.LoraError,
        [r"dense", r"ignore", r"allow"],
    ),
]

FIRST_ARGUMENT = [
    Bad(
        "data_first",
        lambda: lora.wrap(data_first)(inputs(), factors(), params()),
        lora.StructureError,
        [r"params", r"first"],
    ),
    Bad(
        "params_in_place_of_data",
        lambda: lora.wrap(data_first)(params(), factors(), inputs()),
        lora.LoraError,
        [r"first", r"params|pytree"],
    ),
    Bad(
        "no_params_at_all",
        lambda: lora.wrap(closed_over)(params(), factors(), inputs()),
        (lora.LoraError, TypeError),
        [r"argument"],
    ),
    Bad(
        "key_first",
        lambda: lora.wrap(apply_fn)(jax.random.key(0), params(), factors(), inputs()),
        lora.StructureError,
        [r"params|factors"],
    ),
]

WRONG_KEYS = {
    "seed": 0,
    "numpy_seed": np.int64(3),
    "float_array": np.ones(2, np.float32),
    "two_keys": "two",
    "string": "key",
    "none": None,
    "key_function": jax.random.key,
}


@pytest.mark.parametrize("bad", SWAPPED, ids=repr)
def test_swapped_arguments(bad):
    bad.check()


@pytest.mark.parametrize("bad", NO_FUNCTION, ids=repr)
def test_what_is_no_function(bad):
    bad.check()


@pytest.mark.parametrize("bad", FIRST_ARGUMENT, ids=repr)
def test_function_whose_first_argument_is_not_the_pytree(bad):
    bad.check()


def key_named(name):
    return jax.random.split(jax.random.key(0)) if name == "two_keys" else WRONG_KEYS[name]


@pytest.mark.parametrize("name", WRONG_KEYS)
def test_init_with_a_key_of_the_wrong_kind(name):
    call = Bad(
        name,
        lambda: lora.init(key_named(name), params(), [rule()]),
        lora.LoraError,
        [r"key", r"jax\.random\.key"],
    )
    call.check()


@pytest.mark.parametrize("name", [name for name in WRONG_KEYS if name != "none"])
def test_dropout_with_a_key_of_the_wrong_kind(name):
    call = Bad(
        name,
        lambda: wrapped(params(), factors(), inputs(), lora_key=key_named(name)),
        lora.LoraError,
        [r"lora_key", r"jax\.random\.key"],
    )
    call.check()


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
def test_both_kinds_of_jax_key_are_taken(make):
    tree = lora.init(make(3), params(), [rule(dropout=0.5)])
    out = lora.wrap(apply_fn)(params(), tree, inputs(), lora_key=make(4))
    assert out.shape == (3, 2)


def test_errors_have_one_root_and_are_value_errors():
    for error in (lora.TargetError, lora.AxesError, lora.StructureError, lora.AdapterFileError):
        assert issubclass(error, lora.LoraError)
    assert issubclass(lora.LoraError, ValueError)
    assert issubclass(lora.DenseWarning, UserWarning)


def test_the_users_own_error_comes_through():
    """A bug in the model is reported as the model's, not as the library's."""

    def broken(params, x):
        return x @ params["encoder"]["query"]["bias_typo"]

    with pytest.raises(KeyError, match="bias_typo"):
        lora.wrap(broken)(params(), factors(), inputs())


def test_shape_errors_of_the_model_come_through():
    with pytest.raises(TypeError, match="dot_general"):
        lora.wrap(apply_fn)(params(), factors(), jnp.ones((3, 8)))
