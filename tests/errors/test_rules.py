"""A rule that cannot be meant gets an error that names the rule, the leaf and the way out."""

import jax
import jax.numpy as jnp
import pytest

import lorax_fn as lora
from tests.errors.bad import Bad, apply_fn, init, inputs, params, rule

CONV = r"conv/kernel"


def integer_params():
    return {"codes": jnp.ones((7, 5), jnp.int8), "kernel": jnp.ones((7, 5))}


def boolean_params():
    return {"mask": jnp.ones((7, 5), bool)}


MATCHING = [
    Bad(
        "regex_with_a_typo",
        lambda: init(rule(r".*/query/kernal")),
        lora.TargetError,
        [r"kernal", r"encoder/query/kernel"],
    ),
    Bad(
        "regex_of_another_model",
        lambda: init(rule(r"layers_\d+/attn/q_proj/kernel")),
        lora.TargetError,
        [r"q_proj", r"kernel"],
    ),
    Bad(
        "regex_that_matches_a_part_only",
        lambda: init(rule(r"query")),
        lora.TargetError,
        [r"query", r"encoder/query/kernel"],
    ),
    Bad(
        "names_that_do_not_occur",
        lambda: init(rule(["querry", "values"])),
        lora.TargetError,
        [r"querry", r"encoder/query/kernel"],
    ),
    Bad(
        "callable_that_is_never_true",
        lambda: init(rule(lambda path, leaf: False)),
        lora.TargetError,
        [r"match|select", r"kernel"],
    ),
    Bad(
        "two_leaves_of_one_path",
        lambda: init(rule("a/b"), tree={"a": {"b": jnp.ones((7, 5))}, "a/b": jnp.ones((7, 5))}),
        lora.TargetError,
        [r"a/b", r"without '/'"],
    ),
    Bad(
        "everything_excluded",
        lambda: init(rule(r".*query/kernel", exclude=r".*")),
        lora.TargetError,
        [r"query/kernel", r"exclud|without"],
    ),
    Bad(
        "one_rule_of_two",
        lambda: init(rule(), rule(r"decoder/kernel")),
        lora.TargetError,
        [r"decoder/kernel"],
    ),
    Bad(
        "rule_that_another_leaves_nothing",
        lambda: init(rule(r".*kernel", exclude=CONV), lora.Full(r".*head/kernel")),
        lora.TargetError,
        [r"Full\(.*head/kernel", r"LoRA\(.*takes 'head/kernel'", r"first"],
    ),
    Bad(
        "number_for_rules",
        lambda: lora.init(jax.random.key(0), params(), 5),
        lora.TargetError,
        [r"\b5\b", r"int", r"lora\.LoRA"],
    ),
    Bad(
        "full_rule_without_a_match",
        lambda: init(lora.Full(r"heads/kernel")),
        lora.TargetError,
        [r"heads/kernel", r"head/kernel"],
    ),
]

UNFIT_LEAVES = [
    Bad(
        "vector",
        lambda: init(rule(r"encoder/query/bias")),
        lora.TargetError,
        [r"encoder/query/bias", r"\(5,\)|\[5\]", r"Full|two dims|2 dims"],
    ),
    Bad("scalar", lambda: init(rule("gain")), lora.TargetError, [r"gain", r"\(\)|\[\]"]),
    Bad(
        "integers",
        lambda: init(rule("codes"), tree=integer_params()),
        lora.TargetError,
        [r"codes", r"int8"],
    ),
    Bad(
        "booleans",
        lambda: init(rule("mask"), tree=boolean_params()),
        lora.TargetError,
        [r"mask", r"bool"],
    ),
    Bad(
        "no_array",
        lambda: init(rule("name"), tree={"name": "bert", "kernel": jnp.ones((7, 5))}),
        lora.TargetError,
        [r"name", r"kernel"],
    ),
    Bad(
        "integers_to_be_trained_in_full",
        lambda: init(lora.Full("codes"), tree=integer_params()),
        lora.TargetError,
        [r"codes", r"int8"],
    ),
]

AXES = [
    Bad(
        "three_dims_without_axes",
        lambda: init(rule(CONV)),
        lora.AxesError,
        [r"conv/kernel", r"3, 4, 5", r"infer_axes"],
    ),
    Bad(
        "leaf_that_no_contraction_consumes",
        lambda: init(rule(CONV), axes=lora.infer_axes(apply_fn, params(), inputs())),
        lora.AxesError,
        [r"conv/kernel", r"axes="],
    ),
    Bad(
        "axes_that_do_not_exist",
        lambda: init(rule(CONV, axes=lora.Axes((), (0, 1), (7,)))),
        lora.AxesError,
        [r"7", r"wanted", r"dim"],
    ),
    Bad(
        "axes_that_leave_a_dim_out",
        lambda: init(rule(CONV, axes=lora.Axes((), (0,), (2,)))),
        lora.AxesError,
        [r"\(0,\)", r"\(2,\)", r"wanted", r"dim"],
    ),
    Bad(
        "axes_that_name_a_dim_twice",
        lambda: init(rule(CONV, axes=lora.Axes((), (0, 1), (1, 2)))),
        lora.AxesError,
        [r"\(0, 1\)", r"\(1, 2\)", r"wanted", r"dim"],
    ),
    Bad(
        "axes_of_fewer_dims",
        lambda: init(rule(CONV, axes=lora.Axes((), (0,), (1,)))),
        lora.AxesError,
        [r"conv/kernel", r"3, 4, 5|\b3\b"],
    ),
    Bad(
        "axes_without_an_out_dim",
        lambda: init(rule(CONV, axes=lora.Axes((), (0, 1, 2), ()))),
        lora.AxesError,
        [r"conv/kernel", r"out"],
    ),
    Bad(
        "tuples_for_axes",
        lambda: init(rule(r"encoder/query/kernel", axes=((0,), (1,)))),
        lora.AxesError,
        [r"\(\(0,\), \(1,\)\)", r"lora\.Axes"],
    ),
    Bad(
        "axes_of_another_tree",
        lambda: init(rule(CONV), axes={"kernel": lora.Axes((), (0, 1), (2,))}),
        lora.LoraError,
        [r"axes", r"params|infer_axes"],
    ),
]

NUMBERS = [
    Bad("dtype_misspelt", lambda: rule(dtype="flaot32"), lora.LoraError, [r"flaot32", r"float32"]),
    Bad(
        "initializer_of_another_shape",
        lambda: init(rule(init=lambda key, shape, dtype: jnp.zeros(3, dtype))),
        lora.LoraError,
        [r"\[3\]", r"wanted a function"],
    ),
    Bad(
        "spectral_start_with_alpha_zero",
        lambda: rule(init="pissa", alpha=0),
        lora.LoraError,
        [r"scale 0\.0", r"pissa", r"alpha above 0"],
    ),
    Bad(
        "start_from_data_with_alpha_below_zero",
        lambda: rule(init="lora_ga", alpha=-2, rank=4),
        lora.LoraError,
        [r"scale -0\.5", r"lora_ga"],
    ),
    Bad("rank_zero", lambda: init(rule(rank=0)), lora.LoraError, [r"rank", r"\b0\b", r"1"]),
    Bad("rank_negative", lambda: init(rule(rank=-3)), lora.LoraError, [r"rank", r"-3"]),
    Bad("rank_fraction", lambda: init(rule(rank=2.5)), lora.LoraError, [r"rank", r"2\.5"]),
    Bad("rank_true", lambda: init(rule(rank=True)), lora.LoraError, [r"rank", r"True"]),
    Bad(
        "rank_above_the_weight",
        lambda: init(rule(rank=6)),
        lora.LoraError,
        [r"encoder/query/kernel", r"\b6\b", r"\b5\b", r"7, 5"],
    ),
    Bad("alpha_nan", lambda: init(rule(alpha=float("nan"))), lora.LoraError, [r"alpha", r"nan"]),
    Bad("alpha_inf", lambda: init(rule(alpha=float("inf"))), lora.LoraError, [r"alpha", r"inf"]),
    Bad("alpha_string", lambda: init(rule(alpha="16")), lora.LoraError, [r"alpha", r"16"]),
    Bad("dropout_one", lambda: init(rule(dropout=1.0)), lora.LoraError, [r"dropout", r"1\.0"]),
    Bad("dropout_negative", lambda: init(rule(dropout=-0.1)), lora.LoraError, [r"dropout", r"-0"]),
    Bad("init_unknown", lambda: init(rule(init="he")), lora.LoraError, [r"init", r"he", "kaiming"]),
    Bad("dtype_integer", lambda: init(rule(dtype=jnp.int32)), lora.LoraError, [r"dtype", r"int32"]),
]

KINDS = [
    Bad("targets_number", lambda: init(rule(7)), lora.LoraError, [r"targets", r"int|7"]),
    Bad("targets_empty", lambda: init(rule([])), lora.LoraError, [r"targets"]),
    Bad("regex_broken", lambda: init(rule("(query")), lora.LoraError, [r"\(query"]),
    Bad("rules_string", lambda: init("query"), lora.LoraError, [r"query|str", r"LoRA"]),
    Bad(
        "no_rules",
        lambda: lora.init(jax.random.key(0), params(), []),
        lora.LoraError,
        [r"rule"],
    ),
]


@pytest.mark.parametrize("bad", MATCHING, ids=repr)
def test_rule_that_matches_nothing(bad):
    bad.check()


@pytest.mark.parametrize("bad", UNFIT_LEAVES, ids=repr)
def test_leaf_that_cannot_be_adapted(bad):
    bad.check()


@pytest.mark.parametrize("bad", AXES, ids=repr)
def test_axes_that_do_not_fit(bad):
    bad.check()


@pytest.mark.parametrize("bad", NUMBERS, ids=repr)
def test_numbers_out_of_range(bad):
    bad.check()


@pytest.mark.parametrize("bad", KINDS, ids=repr)
def test_arguments_of_the_wrong_kind(bad):
    bad.check()


def test_complex_weight_works_or_is_refused_by_name():
    tree = {"kernel": jnp.ones((7, 5), jnp.complex64)}
    try:
        factors = init(rule("kernel"), tree=tree)
    except lora.LoraError as refusal:
        assert "kernel" in str(refusal)
        assert "complex64" in str(refusal)
        return
    factors = jax.tree.map(jnp.ones_like, factors)
    x = jnp.ones((3, 7), jnp.complex64)
    got = lora.wrap(lambda p, x: x @ p["kernel"])(tree, factors, x)
    assert got.dtype == jnp.complex64
    assert jnp.allclose(got, x @ lora.merge(tree, factors)["kernel"])


def test_the_nearest_path_comes_first():
    """A typo is answered with the leaf that was meant, not with the first of a long list."""
    tree = {f"layer_{i}": {"query": {"kernel": jnp.ones((4, 4))}} for i in range(40)}
    tree["classifier"] = {"kernel": jnp.ones((4, 2))}
    with pytest.raises(lora.TargetError) as caught:
        init(rule("clasifier/kernel"), tree=tree)
    message = str(caught.value)
    assert "classifier/kernel" in message
    assert message.count("layer_") < 40
