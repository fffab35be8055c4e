import re

import jax
import jax.numpy as jnp
import pytest

from lorax_fn.errors import TargetError
from lorax_fn.targets import compile_targets, describe, nearest_paths


def leaf(shape=(4, 4), dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


QUERY = "params/layer_0/attn/query/kernel"


@pytest.mark.parametrize(
    ("targets", "picked"),
    [
        (r".*/query/kernel", True),
        (r"query", False),  # the whole path, not a part of it
        (re.compile(r".*/QUERY/.*", re.IGNORECASE), True),
        (["query"], True),
        (("attn/query",), True),
        ({"/attn/query/"}, True),
        ([QUERY], True),
        (["kernel"], True),
        (["value", "query"], True),
        (["quer"], False),  # whole components only
        (["layer_0/query"], False),  # next to each other only
        (["query/kernel/more"], False),
        (lambda path, x: "query" in path and x.shape == (4, 4), True),
        (lambda path, x: False, False),
    ],
)
def test_each_form_of_targets(targets, picked):
    assert compile_targets(targets)(QUERY, leaf()) is picked


@pytest.mark.parametrize(
    ("path", "shape", "dtype"),
    [
        ("attn/query/bias", (8, 4), jnp.float32),
        ("attn/query/qkv_bias", (8, 4), jnp.float32),
        ("attn/query/b", (8, 4), jnp.float32),
        ("attn/query/kernel", (4,), jnp.float32),
        ("attn/query/kernel", (4, 4), jnp.int8),
        ("attn/query/norm/scale", (8, 4), jnp.float32),
        ("attn/query/norm1/weight", (8, 4), jnp.float32),
        ("attn/query/LayerNorm_0/gamma", (8, 4), jnp.float32),
    ],
)
def test_names_never_pick_a_bias_a_norm_or_integers(path, shape, dtype):
    assert not compile_targets(["query"])(path, leaf(shape, dtype))
    assert not compile_targets([path])(path, leaf(shape, dtype))
    assert compile_targets(".*")(path, leaf(shape, dtype))  # a regex means what it says


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.complex64])
def test_names_pick_every_inexact_dtype(dtype):
    assert compile_targets(["query"])(QUERY, leaf(dtype=dtype))


def test_names_do_not_pick_leaves_that_are_no_arrays():
    assert not compile_targets(["activation"])("mlp/activation", jax.nn.relu)
    assert not compile_targets(["key"])("rngs/key", jax.random.split(jax.random.key(0), (2, 2)))


@pytest.mark.parametrize(
    "exclude",
    [r".*layer_0.*", ["layer_0"], ["other", "attn/query"], lambda path, x: "query" in path],
)
def test_each_form_of_exclude(exclude):
    picks = compile_targets(["query", "value"], exclude)
    assert not picks(QUERY, leaf())
    assert picks("params/layer_1/attn/value/kernel", leaf())


@pytest.mark.parametrize("exclude", [None, [], ()])
def test_nothing_excluded(exclude):
    assert compile_targets(r".*", exclude)(QUERY, leaf())


def test_names_exclude_vectors_too():
    assert not compile_targets(r".*", exclude=["bias"])("attn/bias", leaf((4,)))


WRONG = [
    (b"query", "of type bytes"),
    (3, "of type int"),
    ({"query": 8}, "of type dict"),
    (r"(query", "not a valid regex"),
    (re.compile(rb"query"), "over bytes"),
    (["query", 3], "holds 3"),
    (["query", ""], "holds ''"),
    ([b"query"], "holds b'query'"),
]


@pytest.mark.parametrize(
    ("targets", "message"), [*WRONG, (None, "of type NoneType"), ([], "no names")]
)
def test_wrong_targets_are_refused(targets, message):
    with pytest.raises(TargetError, match=f"^targets.*{message}.*[Ww]anted"):
        compile_targets(targets)


@pytest.mark.parametrize(("exclude", "message"), WRONG)
def test_wrong_excludes_are_refused(exclude, message):
    with pytest.raises(TargetError, match=f"^exclude.*{message}.*[Ww]anted"):
        compile_targets(".*", exclude=exclude)


PATHS = [
    f"params/layer_{i}/{name}"
    for i in range(2)
    for name in ("attn/key/kernel", "attn/query/bias", "attn/query/kernel", "mlp/up/kernel")
]


@pytest.mark.parametrize(
    "query", [r".*/querry/kernel", ["querry/kernel"], re.compile(r".*Qery/kernel$")]
)
def test_a_misspelt_module_finds_the_right_one(query):
    assert nearest_paths(query, PATHS, n=2) == [
        "params/layer_0/attn/query/kernel",
        "params/layer_1/attn/query/kernel",
    ]


def test_any_one_of_the_names_may_be_near():
    nearest = nearest_paths(["nowhere", "upp"], PATHS, n=2)
    assert nearest == ["params/layer_0/mlp/up/kernel", "params/layer_1/mlp/up/kernel"]


def test_regex_syntax_does_not_count():
    assert nearest_paths(r"(?i).*[a-z]\d{1,2}\w+/(upp|dwn)/.*", PATHS, n=1) == [
        "params/layer_0/mlp/up/kernel"
    ]


def test_a_function_has_no_near_paths():
    assert nearest_paths(lambda path, x: False, PATHS, n=3) == PATHS[:3]


@pytest.mark.parametrize("query", ["", ".*", []])
def test_a_query_without_words_keeps_the_order(query):
    assert nearest_paths(query, PATHS, n=2) == PATHS[:2]


def test_descriptions():
    def big(path, leaf):
        return True

    assert describe(r".*/kernel") == "the regex '.*/kernel'"
    assert describe(re.compile("a+")) == "the regex 'a+'"
    assert describe(("query",)) == "the name 'query'"
    assert describe(["query", "value"]) == "the names 'query', 'value'"
    assert describe(big) == "the function test_descriptions.<locals>.big"
