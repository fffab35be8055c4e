"""`trace`: any call as a jaxpr over flat arrays, and its outputs back."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorax_fn.tracing import is_array, trace


def evaluate(traced, param_leaves=None, arg_leaves=None):
    inputs = [*(param_leaves or traced.param_leaves), *(arg_leaves or traced.arg_leaves)]
    outputs = jax.core.eval_jaxpr(traced.jaxpr.jaxpr, traced.jaxpr.consts, *inputs)
    return traced.rebuild(outputs)


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        (jnp.ones(2), True),
        (np.ones(2), True),
        (np.float32(1), True),
        (np.bool_(True), True),
        (jnp.ones(2, jnp.bfloat16), True),
        (jnp.ones(2, jnp.int4), True),
        (jax.random.key(0), True),
        (jax.ShapeDtypeStruct((2,), jnp.float32), True),
        (np.array(["text"]), False),
        (np.array([object()]), False),
        (1.0, False),
        (True, False),
        ("text", False),
        (None, False),
        (jnp.sin, False),
    ],
)
def test_what_is_an_array(leaf, expected):
    assert is_array(leaf) is expected


def test_tracers_are_arrays():
    seen = []
    jax.make_jaxpr(lambda x: seen.append(is_array(x)))(2.0)
    assert seen == [True]


def test_inputs_are_the_arrays_of_params_then_args_then_kwargs():
    params = {"act": jnp.tanh, "rate": 0.5, "w": jnp.ones((2, 3)), "z": jnp.ones(5)}
    traced = trace(
        lambda p, x, flag, *, key, mutable: p["act"](x @ p["w"]),
        params,
        (np.ones((4, 2), np.float32), True),
        {"mutable": ["stats"], "key": jax.random.key(0)},
    )
    assert traced.param_slots == (2, 3)
    assert [v.aval.shape for v in traced.jaxpr.jaxpr.invars] == [(2, 3), (5,), (4, 2), ()]
    assert [x.shape for x in traced.param_leaves + traced.arg_leaves] == [(2, 3), (5,), (4, 2), ()]
    assert evaluate(traced).shape == (4, 3)


def test_static_leaves_reach_the_function_and_come_back_as_they_are():
    seen = []

    def apply(params, x, options):
        seen.append((params["act"], options))
        return {"y": params["act"](x), "act": params["act"], "n": 3, "none": None, "s": "text"}

    options = {"train": True, "names": ("a", "b"), "none": None}
    out = evaluate(trace(apply, {"act": jnp.sin}, (jnp.zeros(2), options), {}))
    assert seen == [(jnp.sin, options)]
    assert out.pop("y").tolist() == [0, 0]
    assert out == {"act": jnp.sin, "n": 3, "none": None, "s": "text"}


def test_other_values_may_take_the_places_of_the_arrays():
    traced = trace(lambda p, x: p * x, jnp.ones(2), (jnp.ones(2),), {})
    assert evaluate(traced, [jnp.full(2, 3.0)], [jnp.full(2, 5.0)]).tolist() == [15, 15]


def test_shapes_stand_for_arrays():
    w, x = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((10**6, 10**6), (10**6,)))
    assert trace(lambda p, x: x @ p, w, (x,), {}).jaxpr.out_avals[0].shape == (10**6,)


@pytest.mark.parametrize(
    "scalar", [jnp.asarray(2.0), jax.ShapeDtypeStruct((), jnp.float32, weak_type=True)]
)
def test_weak_types_are_kept(scalar):
    traced = trace(lambda p, x: x * p, scalar, (jnp.ones((), jnp.bfloat16),), {})
    assert traced.jaxpr.in_avals[0].weak_type
    assert traced.jaxpr.out_avals[0].dtype == jnp.bfloat16


def test_strong_types_are_kept():
    traced = trace(lambda p: p, jnp.float32(2), (), {})
    assert not traced.jaxpr.in_avals[0].weak_type


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.grad, jax.vmap, jax.linearize])
def test_tracing_under_transformations_and_over_closed_over_tracers(transform):
    def f(c):
        traced = trace(lambda p, x: (p * x + jnp.sin(c)).sum(), jnp.ones(2), (c,), {})
        return evaluate(traced)

    def plain(c):
        return (jnp.ones(2) * c + jnp.sin(c)).sum()

    c = jnp.full(3, 1.5) if transform is jax.vmap else 1.5
    if transform is jax.linearize:
        assert jnp.allclose(jax.linearize(f, c)[1](1.0), jax.linearize(plain, c)[1](1.0))
    else:
        with jax.numpy_rank_promotion("allow"):
            assert jnp.allclose(transform(f)(c), transform(plain)(c))


def test_collectives_find_the_axis_of_an_outer_vmap():
    def f(x):
        return evaluate(trace(lambda p, x: jax.lax.psum(p * x, "i"), jnp.float32(2), (x,), {}))

    assert jax.vmap(f, axis_name="i")(jnp.arange(3.0)).tolist() == [6, 6, 6]


def test_nnx_state_and_graphdef_pass_in_both_directions():
    graphdef, state = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))

    def apply(state, graphdef, x):
        model = nnx.merge(graphdef, state)
        return model(x), *nnx.split(model)

    y, new_graphdef, new_state = evaluate(trace(apply, state, (graphdef, jnp.ones((1, 2))), {}))
    assert y.shape == (1, 3)
    assert new_graphdef == graphdef
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert jnp.array_equal(new_state["kernel"][...], state["kernel"][...])


def test_equinox_modules_keep_their_functions():
    model = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
    x = jnp.ones(2)
    y, same = evaluate(trace(lambda m, x: (m(x), m), model, (x,), {}))
    assert jnp.allclose(y, model(x))
    assert eqx.tree_equal(same, model)


def test_the_function_runs_once_and_its_errors_come_through():
    def apply(params):
        raise KeyError("no such weight")

    with pytest.raises(KeyError, match="no such weight"):
        trace(apply, jnp.ones(2), (), {})


def test_rebuild_wants_one_value_for_each_array():
    traced = trace(lambda p: (p, p + 1), jnp.ones(2), (), {})
    with pytest.raises(TypeError, match="got 1 arrays for a tree with 2"):
        traced.rebuild([jnp.ones(2)])


def test_an_error_of_a_trial_with_exchanged_arguments_does_not_hide_the_first():
    class ForeignError(Exception):
        pass

    def apply(params, batch):
        if "w" not in params:
            raise ForeignError
        return params["w"] @ batch["typo"]

    with pytest.raises(KeyError, match="typo"):
        trace(apply, {"w": jnp.ones((2, 2))}, ({"x": jnp.ones(2)},), {})
