"""Every adapter kind: the battery's operations against the kind's own formula in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_fn as lora
from lorax_fn.adapters import is_adapter
from tests.battery.cases import ALL, FACTORED, OPERATIONS
from tests.battery.kinds import KINDS
from tests.battery.materials import assert_close, expected, materials
from tests.battery.transforms import TRANSFORMS, Run

# A gain that differs between the inputs of a kernel's positions, or of fused kernels, is no gain of
# the data's; one on what a lookup fills in with would change that.
ADDED_UP = {
    *(("IA3 in", name) for name in OPERATIONS if name.startswith("conv/")),
    ("IA3 in", "chain/fused_qkv_some_adapted"),
    ("IA3 in", "stack/every_expert_on_every_token"),
    *((kind, "embedding/fill_with_a_value") for kind in ("DoRA", "IA3")),
}
# Where a Kronecker product stays one: matmuls, and what only hands the weight on or transposes it.
KRONECKER = (
    "dot/",
    "einsum/",
    "stack/every_expert_on_every_token",
    "scan/",
    "while/",
    "cond/",
    "chain/cast_to_half",
    "chain/negation",
    "chain/optimization_barrier",
    "checkpoint/",
    "inside/vmap_over_experts",
)
TRANSFORMED = {"einsum/experts", "scan/stacked_layers"}
CASES = [
    dataclasses.replace(case, kind=kind)
    for kind in KINDS
    for case in FACTORED
    if ALL or case.name in OPERATIONS
]


def identify(value):
    return f"{value.kind}-{value.name}" if hasattr(value, "kind") else None


# A row that is filled with NaN, and a gain on it: NaN is the gain's gradient too.
WITHOUT_GRADIENT = {("DoRA", "embedding/fill_with_nan"), ("IA3", "embedding/fill_with_nan")}


def transformations(case):
    names = TRANSFORMS if case.name in TRANSFORMED else ["jit"]
    if (case.kind.name, case.name) in WITHOUT_GRADIENT:
        return ["eager"]  # the value alone
    return [name for name in names if name not in case.without | case.kind.without]


def is_added_up(case):
    """As listed; with ALL_OPERATIONS, of the others what `inspect` says, and `wrap` has to agree."""
    if case.name not in OPERATIONS:
        drawn = materials(case)
        return bool(lora.inspect(case.fn, drawn.params, drawn.factors[0], drawn.xs[0]).dense)
    if case.kind.name == "LoKr":
        return not any(map(case.name.startswith, KRONECKER))
    return (case.kind.name, case.name) in ADDED_UP


def wrapped(case):
    return lora.wrap(case.fn, dense="allow" if is_added_up(case) else "error")


@pytest.mark.parametrize(
    ("case", "transform"),
    [(case, name) for case in CASES for name in transformations(case)],
    ids=identify,
)
def test_agrees_with_the_formula(case, transform):
    run = Run(case, wrapped(case))
    for quantity, f, j, value in TRANSFORMS[transform](run):
        wanted = getattr(expected(case), quantity)(f, j)
        assert_close(value, wanted, case.tolerance, f"{quantity} with factors {f}, inputs {j}")


@pytest.mark.optimized
@pytest.mark.parametrize("case", CASES, ids=identify)
def test_starts_at_the_base(case):
    drawn = materials(case)
    base = case.fn(drawn.params, drawn.xs[0])
    adapted = wrapped(case)(drawn.params, drawn.initial, drawn.xs[0])
    for got, want in zip(jax.tree.leaves(adapted), jax.tree.leaves(base), strict=True):
        assert got.dtype == want.dtype
        if "eager" in case.rounding:  # there XLA rounds fn itself otherwise
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
        else:
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize("case", CASES, ids=identify)
def test_merging_gives_the_formula_and_unmerging_takes_it_back(case):
    drawn = materials(case)
    merged = lora.merge(drawn.params, drawn.factors[0])
    factors = expected(case).factors(0)
    assert_close(merged, expected(case).adapted(factors, factors), 1e-2 if _half(case) else 1e-5)
    small = drawn.factors[0]
    if case.kind.name == "DoRA":  # can be undone while A·B is smaller than W
        small = jax.tree.map(
            lambda node: dataclasses.replace(node, b=node.b / 50), small, is_leaf=is_adapter
        )
        merged = lora.merge(drawn.params, small)
    back = lora.unmerge(merged, small)
    assert_close(back, drawn.params, 5e-2 if _half(case) else 1e-4)


def _half(case):
    return any(weight.dtype != np.float32 for weight in case.weights.values())


LISTED = [case for case in CASES if case.name in OPERATIONS and is_added_up(case)]


@pytest.mark.parametrize("case", LISTED, ids=identify)
def test_what_is_added_up_is_said_to_be(case):
    drawn = materials(case)
    report = lora.inspect(case.fn, drawn.params, drawn.factors[0], drawn.xs[0])
    assert report.dense
    with pytest.warns(lora.DenseWarning):
        lora.wrap(case.fn)(drawn.params, drawn.factors[0], drawn.xs[0])


SIMPLE = [case for case in CASES if case.name == "dot/two_out"]


@pytest.mark.parametrize("case", SIMPLE, ids=identify)
def test_frozen_parts_have_no_state_and_never_move(case):
    """Not even by weight decay; the trained ones do move."""
    drawn = materials(case)
    factors, mask = drawn.factors[0], jax.tree.leaves(lora.trainable_mask(drawn.factors[0]))
    assert mask == list(case.kind.trained)
    tx = lora.freeze(optax.adamw(0.1, weight_decay=0.1))
    state = tx.init(factors)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    leaves = jax.tree.leaves(factors)
    assert moments == 2 * sum(leaf.size for leaf, on in zip(leaves, mask, strict=True) if on)
    ones = jax.tree.map(jnp.ones_like, factors)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes its count with floats
        after = optax.apply_updates(factors, tx.update(ones, state, factors)[0])
    for before, now, trained in zip(leaves, jax.tree.leaves(after), mask, strict=True):
        assert bool((before == now).all()) != trained


@pytest.mark.parametrize("case", SIMPLE, ids=identify)
def test_inspect_names_the_kind_and_counts_what_is_trained(case):
    drawn = materials(case)
    report = lora.inspect(case.fn, drawn.params, drawn.factors[0], drawn.xs[0])
    (row,) = report.rows
    leaves = jax.tree.leaves(drawn.factors[0])
    trained = zip(leaves, case.kind.trained, strict=True)
    assert row.params == sum(leaf.size for leaf, on in trained if on)
    assert type(case.kind.rule("w", case.weights["w"])).__name__ == row.kind
    assert "factored" in str(report)


@pytest.mark.parametrize("case", SIMPLE, ids=identify)
def test_shapes_alone_make_the_same_factors(case):
    drawn = materials(case)
    shapes = jax.eval_shape(lambda params: params, drawn.params)
    axes = {"w": lora.Axes(*case.weights["w"].axes)}
    rules = [case.kind.rule("w", case.weights["w"])]
    made = jax.eval_shape(lambda key: lora.init(key, shapes, rules, axes=axes), jax.random.key(0))
    assert made == jax.eval_shape(lambda factors: factors, drawn.initial)


@pytest.mark.parametrize("case", SIMPLE, ids=identify)
def test_factors_of_another_weight_are_refused(case):
    drawn = materials(case)
    wider = {"w": np.concatenate([drawn.params["w"]] * 2, axis=-1)}
    longer = {"w": np.concatenate([drawn.params["w"]] * 2, axis=0)}
    for params in (wider, longer):
        if (case.kind.name == "IA3" and params is longer) or (
            case.kind.name == "IA3 in" and params is wider
        ):
            continue  # has nothing along that dim
        with pytest.raises(lora.StructureError, match="'w'"):
            lora.merge(params, drawn.factors[0])
