"""`thin_dot` against numpy and against `lax.dot_general` under every transformation."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from lorax_fn.interpreter.thin_dot import thin_dot, thin_dot_p

# name: (lhs shape, rhs shape, dimension numbers)
PRODUCTS = {
    "matmul": ((6, 4), (4, 5), (((1,), (0,)), ((), ()))),
    "dense": ((2, 3, 4), (4, 5), (((2,), (0,)), ((), ()))),
    "dense_general": ((2, 3, 4), (4, 5, 6), (((2,), (0,)), ((), ()))),
    "attention_out": ((2, 3, 4, 5), (4, 5, 6), (((2, 3), (0, 1)), ((), ()))),
    "weight_left": ((4, 5), (2, 3, 4), (((0,), (2,)), ((), ()))),
    "tied_head": ((2, 3, 4), (7, 4), (((2,), (1,)), ((), ()))),
    "experts": ((3, 6, 4), (3, 4, 5), (((2,), (1,)), ((0,), (0,)))),
    "scattered": ((4, 3, 2, 5), (5, 6, 2, 4), (((0, 3), (3, 0)), ((2,), (2,)))),
    "crossed_batch": ((2, 4, 3), (3, 5, 2, 4), (((1,), (3,)), ((0, 2), (2, 0)))),
    "vector": ((4,), (4, 5), (((0,), (0,)), ((), ()))),
    "inner": ((4,), (4,), (((0,), (0,)), ((), ()))),
    "outer": ((3,), (2, 4), (((), ()), ((), ()))),
}
each_product = pytest.mark.parametrize(
    ("lhs_shape", "rhs_shape", "numbers"), PRODUCTS.values(), ids=PRODUCTS
)


def random_operands(lhs_shape, rhs_shape, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in (lhs_shape, rhs_shape)]


def random_product(seed):
    """Shapes and dimension numbers with up to 3 batch, contracted and free dims, all shuffled."""
    rng = np.random.default_rng(seed)
    n_batch, n_contract, n_lhs, n_rhs = rng.integers(0, 4, size=4)
    sizes = lambda n: list(rng.integers(1, 5, size=n))
    batch, contract = sizes(n_batch), sizes(n_contract)

    def place(free):
        dims = batch + contract + free
        where = rng.permutation(len(dims))  # dim i of `dims` goes to place where[i]
        shape = [dims[i] for i in np.argsort(where)]
        return shape, where[n_batch : n_batch + n_contract].tolist(), where[:n_batch].tolist()

    lhs_shape, lhs_contract, lhs_batch = place(sizes(n_lhs))
    rhs_shape, rhs_contract, rhs_batch = place(sizes(n_rhs))
    return lhs_shape, rhs_shape, ((lhs_contract, rhs_contract), (lhs_batch, rhs_batch))


def numpy_subscripts(lhs_ndim, rhs_ndim, numbers):
    """Einsum subscripts of (lhs, rhs, out) that spell out the dimension numbers."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = numbers
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    lhs, rhs = [next(letters) for _ in range(lhs_ndim)], [next(letters) for _ in range(rhs_ndim)]
    for left, right in zip([*lhs_contract, *lhs_batch], [*rhs_contract, *rhs_batch], strict=True):
        rhs[right] = lhs[left]
    batch = [lhs[d] for d in lhs_batch]
    lhs_free = [lhs[d] for d in range(lhs_ndim) if d not in {*lhs_contract, *lhs_batch}]
    rhs_free = [rhs[d] for d in range(rhs_ndim) if d not in {*rhs_contract, *rhs_batch}]
    return "".join(lhs), "".join(rhs), "".join(batch + lhs_free + rhs_free)


def check_against_numpy(lhs_shape, rhs_shape, numbers):
    """Value and both cotangents against float64 einsums."""
    lhs, rhs = random_operands(lhs_shape, rhs_shape)
    a, b, c = numpy_subscripts(lhs.ndim, rhs.ndim, numbers)
    lhs64, rhs64 = np.float64(lhs), np.float64(rhs)
    want = np.einsum(f"{a},{b}->{c}", lhs64, rhs64)
    g = np.random.default_rng(1).normal(size=want.shape)

    @jax.jit
    def value_and_cotangents(lhs, rhs, g):
        out, pull_back = jax.vjp(lambda a, b: thin_dot(a, b, numbers), lhs, rhs)
        return out, *pull_back(g)

    out, lhs_bar, rhs_bar = value_and_cotangents(lhs, rhs, jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lhs_bar, np.einsum(f"{c},{b}->{a}", g, rhs64), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rhs_bar, np.einsum(f"{c},{a}->{b}", g, lhs64), rtol=1e-4, atol=1e-5)


def assert_trees_close(got, want, tolerance=2e-5):
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance), got, want
    )


def test_eager_evaluation_is_the_dot_general_of_its_operands():
    for lhs_shape, rhs_shape, numbers in PRODUCTS.values():
        lhs, rhs = random_operands(lhs_shape, rhs_shape)
        want = lax.dot_general(lhs, rhs, numbers)
        np.testing.assert_array_equal(thin_dot(lhs, rhs, numbers), want)


@each_product
def test_value_and_gradients_equal_numpy(lhs_shape, rhs_shape, numbers):
    check_against_numpy(lhs_shape, rhs_shape, numbers)


@pytest.mark.parametrize("seed", range(40))
def test_random_dimension_numbers_equal_numpy(seed):
    check_against_numpy(*random_product(seed))


def twice(dot):
    """A scalar function that is nonlinear in both operands, built on `dot`."""
    return lambda a, b: jnp.sum(jnp.sin(dot(a, b)) * (1 + dot(a, b)))


TRANSFORMS = {
    "value": lambda f: f,
    "jvp": lambda f: lambda a, b: jax.jvp(f, (a, b), (jnp.cos(a), jnp.sin(b))),
    "jvp_rhs_only": lambda f: lambda a, b: jax.jvp(lambda b: f(a, b), (b,), (jnp.sin(b),)),
    "grad": lambda f: jax.grad(f, (0, 1)),
    "linearize": lambda f: lambda a, b: jax.linearize(f, a, b)[1](jnp.cos(a), jnp.sin(b)),
    "hessian": lambda f: jax.hessian(f, (0, 1)),
    "reverse_over_reverse": lambda f: jax.jacrev(jax.jacrev(f, (0, 1)), (0, 1)),
    "grad_of_remat": lambda f: jax.grad(jax.checkpoint(f), (0, 1)),
    "vmap": lambda f: lambda a, b: jax.vmap(f)(*stacked(a, b)),
    "grad_of_vmap_both": lambda f: (
        lambda a, b: jax.grad(lambda a, b: jax.vmap(f)(a, b).sum(), (0, 1))(*stacked(a, b))
    ),
    "hessian_of_vmap": lambda f: (
        lambda a, b: jax.hessian(lambda b: jax.vmap(f, (0, None))(stacked(a, b)[0], b).sum())(b)
    ),
    "vmap_of_grad": lambda f: lambda a, b: jax.vmap(jax.grad(f, (0, 1)))(*stacked(a, b)),
    "vmap_of_hessian": lambda f: lambda a, b: jax.vmap(jax.hessian(f))(*stacked(a, b)),
    "grad_of_scan": lambda f: jax.grad(
        lambda a, b: lax.scan(lambda s, k: (s + k * f(a * k, b), s), 0.0, jnp.arange(3.0))[0],
        (0, 1),
    ),
    "jvp_of_scan_of_grad": lambda f: (
        lambda a, b: jax.jvp(
            lambda b: lax.scan(lambda b, _: (b - 0.1 * jax.grad(f, 1)(a, b), None), b, None, 2)[0],
            (b,),
            (jnp.sin(b),),
        )
    ),
}


def stacked(*arrays):
    return [jnp.stack([x, 2 * x, jnp.cos(x)]) for x in arrays]


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("product", ["dense", "experts", "scattered"])
def test_transformations_equal_those_of_dot_general(product, transform):
    lhs_shape, rhs_shape, numbers = PRODUCTS[product]
    operands = random_operands(lhs_shape, rhs_shape)
    got = jax.jit(transform(twice(lambda a, b: thin_dot(a, b, numbers))))(*operands)
    want = jax.jit(transform(twice(lambda a, b: lax.dot_general(a, b, numbers))))(*operands)
    assert_trees_close(got, want, tolerance=2e-4)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("mapped", ["both", "lhs", "rhs"])
def test_vmap_over_any_dim_equals_dot_general(mapped, seed):
    lhs_shape, rhs_shape, numbers = random_product(seed)
    rng = np.random.default_rng(seed)
    lhs_dim = int(rng.integers(0, len(lhs_shape) + 1)) if mapped != "rhs" else None
    rhs_dim = int(rng.integers(0, len(rhs_shape) + 1)) if mapped != "lhs" else None
    widen = lambda shape, dim: shape if dim is None else [*shape[:dim], 3, *shape[dim:]]
    operands = random_operands(widen(lhs_shape, lhs_dim), widen(rhs_shape, rhs_dim))

    def value_and_gradients(dot):
        mapped = jax.vmap(lambda a, b: dot(a, b, numbers), (lhs_dim, rhs_dim), -1)
        loss = lambda a, b: jnp.sin(mapped(a, b)).sum()
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(*operands)

    assert_trees_close(
        value_and_gradients(thin_dot), value_and_gradients(lax.dot_general), tolerance=1e-4
    )


@each_product
def test_shape_and_dtype_are_those_of_dot_general(lhs_shape, rhs_shape, numbers):
    lhs, rhs = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in (lhs_shape, rhs_shape))
    for preferred in (None, jnp.float32):
        options = {"dimension_numbers": numbers, "preferred_element_type": preferred}
        got = jax.eval_shape(functools.partial(thin_dot, **options), lhs, rhs)
        assert got == jax.eval_shape(functools.partial(lax.dot_general, **options), lhs, rhs)


def test_gradients_of_mixed_precision_have_the_dtype_of_their_operand():
    lhs_shape, rhs_shape, numbers = PRODUCTS["dense"]
    lhs, rhs = (x.astype(jnp.bfloat16) for x in random_operands(lhs_shape, rhs_shape))

    def loss(dot):
        return lambda a, b: dot(a, b, numbers, preferred_element_type=jnp.float32).sum()

    got, want = jax.grad(loss(thin_dot), (0, 1))(lhs, rhs), jax.grad(loss(lax.dot_general), (0, 1))
    assert [x.dtype for x in got] == [jnp.bfloat16, jnp.bfloat16]
    assert_trees_close(*jax.tree.map(jnp.float32, (got, want(lhs, rhs))), tolerance=1e-2)


def test_precision_reaches_the_product_and_its_gradients():
    lhs, rhs = random_operands((3, 4), (4, 5))
    numbers = PRODUCTS["matmul"][2]
    given = lambda a, b: thin_dot(a, b, numbers, precision="highest").sum()
    with jax.default_matmul_precision("highest"):
        from_config = jax.make_jaxpr(lambda a, b: thin_dot(a, b, numbers).sum())(lhs, rhs)
    for jaxpr in (jax.make_jaxpr(given)(lhs, rhs), from_config):
        assert set(jaxpr.eqns[0].params["precision"]) == {lax.Precision.HIGHEST}
    dots = [e for e in jax.make_jaxpr(jax.grad(given, (0, 1)))(lhs, rhs).eqns
            if e.primitive is lax.dot_general_p]  # fmt: skip
    assert len(dots) >= 2
    assert all(set(e.params["precision"]) == {lax.Precision.HIGHEST} for e in dots)


def test_a_policy_that_saves_dots_saves_this_one():
    lhs, rhs = random_operands((6, 4), (4, 5))
    dot = lambda a, b: thin_dot(a, b, PRODUCTS["matmul"][2])

    def products(policy):
        loss = jax.checkpoint(lambda a, b: jnp.sin(dot(a, b)).sum(), policy=policy)
        text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(lhs, rhs).as_text()
        return text.count("stablehlo.dot_general")

    policies = jax.checkpoint_policies
    # forward + two gradients, and once more where the forward product was not saved
    assert (products(policies.dots_saveable), products(policies.nothing_saveable)) == (3, 4)


def test_export_with_a_symbolic_batch():
    numbers = PRODUCTS["dense"][2]
    gradient = jax.jit(jax.grad(lambda b, a: jnp.sin(thin_dot(a, b, numbers)).sum()))
    (n,) = export.symbolic_shape("n")
    specs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, 5), (n, 3, 4))]
    exported = export.export(gradient)(*specs)
    lhs, rhs = random_operands((7, 3, 4), (4, 5))
    assert_trees_close(exported.call(rhs, lhs), gradient(rhs, lhs))


def test_wrong_dimension_numbers_raise_as_dot_general_does():
    with pytest.raises(TypeError, match="contracting dimensions to have the same shape"):
        thin_dot(jnp.ones((3, 4)), jnp.ones((5, 4)), (((1,), (0,)), ((), ())))


# How the gradients are computed ------------------------------------------------------------------

LORA = {  # x (batch…, contract…), a (contract…, r), b (r, out…)
    "matmul": ((96, 32), (32, 2), (2, 48), 1),
    "dense": ((8, 12, 32), (32, 2), (2, 48), 1),
    "dense_general": ((8, 12, 32), (32, 2), (2, 6, 8), 1),
    "attention_out": ((8, 12, 4, 8), (4, 8, 2), (2, 48), 2),
}


def low_rank_gradient(x_shape, a_shape, b_shape, n_contract):
    """The gradient of a LoRA term with respect to x, a and b, with its abstract operands."""

    def loss(x, a, b):
        x_dims = tuple(range(x.ndim - n_contract, x.ndim))
        t = thin_dot(x, a, ((x_dims, tuple(range(n_contract))), ((), ())))
        return jnp.sin(thin_dot(t, b, (((t.ndim - 1,), (0,)), ((), ())))).sum()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (x_shape, a_shape, b_shape)]
    return jax.grad(loss, (0, 1, 2)), shapes


each_low_rank_product = pytest.mark.parametrize("shapes", LORA.values(), ids=LORA)


def compiled_shapes_moved(text):
    """Element counts of everything that compiled HLO transposes or copies."""
    moved = re.findall(r"= \w+\[([\d,]*)\]\S* (?:transpose|copy)\(", text)
    return [np.prod([int(n) for n in dims.split(",")]) for dims in moved if dims]


@pytest.mark.optimized
@each_low_rank_product
def test_no_fat_array_is_transposed_in_the_compiled_gradient(shapes):
    gradient, operands = low_rank_gradient(*shapes)
    moved = compiled_shapes_moved(jax.jit(gradient).lower(*operands).compile().as_text())
    x, a, b = operands
    rows, rank = x.size * a.shape[-1] // a.size, a.shape[-1]
    assert max(moved, default=0) <= max(rows * rank, a.size, b.size)


@pytest.mark.optimized
def test_the_same_check_fails_for_jax_own_transpose_rule():
    x, t = jnp.ones((8, 12, 48)), jnp.ones((8, 12, 2))
    gradient = jax.grad(lambda b: (jnp.sin(lax.dot_general(t, b, PRODUCTS["dense"][2])) * x).sum())
    moved = compiled_shapes_moved(jax.jit(gradient).lower(jnp.ones((2, 48))).compile().as_text())
    assert max(moved) == x.size


@each_low_rank_product
def test_the_gradient_of_b_has_the_thin_operand_on_the_left(shapes):
    gradient, operands = low_rank_gradient(*shapes)
    jaxpr = jax.make_jaxpr(gradient)(*operands)
    b_bar = jaxpr.jaxpr.outvars[2]
    (dot,) = [e for e in jaxpr.eqns if b_bar in e.outvars]  # the product itself: nothing after it
    assert dot.primitive is lax.dot_general_p
    assert dot.invars[0].aval.size < dot.invars[1].aval.size


def test_a_batched_product_keeps_the_primitive_and_so_its_transpose_rule():
    lhs, rhs = random_operands((3, 2, 4), (4, 5))
    numbers = PRODUCTS["matmul"][2]
    mapped = jax.vmap(lambda a, b: thin_dot(a, b, numbers), (0, None))
    assert [e.primitive for e in jax.make_jaxpr(mapped)(lhs, rhs).eqns] == [thin_dot_p]


# Several devices ---------------------------------------------------------------------------------


def mesh_of(axis_type):
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(axis_type,) * 2)


@pytest.mark.parametrize("spec", [P("data"), P("data", None, "model")], ids=str)
def test_explicit_sharding_of_values_and_gradients_is_that_of_dot_general(spec):
    mesh = mesh_of(AxisType.Explicit)
    lhs, rhs = random_operands((4, 3, 4), (4, 6))
    lhs = jax.device_put(lhs, NamedSharding(mesh, spec))
    rhs = jax.device_put(rhs, NamedSharding(mesh, P()))
    numbers = PRODUCTS["dense"][2]

    def run(dot):
        f = lambda a, b: jnp.sin(dot(a, b, numbers)).sum()
        shardings = jax.tree.map(
            lambda x: x.sharding.spec, jax.eval_shape(jax.grad(f, (0, 1)), lhs, rhs)
        )
        return jax.jit(jax.value_and_grad(f, (0, 1)))(lhs, rhs), shardings

    with jax.set_mesh(mesh):
        (got, got_shardings), (want, want_shardings) = run(thin_dot), run(lax.dot_general)
    assert_trees_close(got, want)
    assert got_shardings == want_shardings


def test_shard_map_sums_the_gradient_of_an_unvarying_weight():
    mesh = mesh_of(AxisType.Auto)
    lhs, rhs = random_operands((4, 3, 4), (4, 6))
    numbers = PRODUCTS["dense"][2]

    def gradient(dot):
        def local(a, b):
            g = jax.grad(lambda b: jnp.sin(dot(a, b, numbers)).sum())(b)
            return g, dot(a, b, numbers)

        specs = {"in_specs": (P("data"), P()), "out_specs": (P(), P("data"))}
        return jax.jit(jax.shard_map(local, mesh=mesh, check_vma=True, **specs))(lhs, rhs)

    assert_trees_close(gradient(thin_dot), gradient(lax.dot_general))
    whole = jax.grad(lambda b: jnp.sin(lax.dot_general(lhs, b, numbers)).sum())(rhs)
    assert_trees_close(gradient(thin_dot)[0], whole)
