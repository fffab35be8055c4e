"""One random function of one weight, held to numpy: value, gradient, and nothing added up."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np

import lorax_fn as lora
from tests.reference import directional_difference, float64, low_rank_sum

# The same examples on every run, each of them compiled: no deadline, no data base of failures.
SETTINGS = hypothesis.settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
SCALE = 1.5  # alpha / rank


def random_factors(rng, weight, roles, rank):
    """The factors of {"w": weight}, every entry random."""
    axes = lora.Axes(*(tuple(i for i, role in enumerate(roles) if role == x) for x in "bco"))
    rule = lora.LoRA("w", rank=rank, alpha=SCALE * rank)
    make = jax.eval_shape(
        lambda key: lora.init(key, {"w": weight}, [rule], axes={"w": axes}), jax.random.key(0)
    )
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), make)


def largest_rank(shape, roles):
    sizes = dict.fromkeys("bco", 1)
    for size, role in zip(shape, roles, strict=True):
        sizes[role] *= size
    return min(sizes["c"], sizes["o"])


def check(fn, reference, *, shape, roles, x_shape, rank, seed):
    """`fn(w, x)` in JAX and `reference(w, x)` in numpy, both linear in w."""
    rng = np.random.default_rng(seed)
    weight, x = (rng.normal(size=size).astype(np.float32) for size in (shape, x_shape))
    factors = random_factors(rng, weight, roles, min(rank, largest_rank(shape, roles)))
    direction = [rng.normal(size=leaf.shape) for leaf in jax.tree.leaves(factors)]
    wrapped = lora.wrap(lambda params, x: fn(params["w"], x), dense="error")

    def loss(factors, ct):
        out = wrapped({"w": weight}, factors, x)
        return jnp.sum(out * ct), out

    def outputs(leaves):
        w = float64(weight) + low_rank_sum(*leaves, roles, SCALE)
        return [reference(w, float64(x))]

    leaves = [float64(leaf) for leaf in jax.tree.leaves(factors)]
    wanted = outputs(leaves)[0]
    ct = rng.normal(size=wanted.shape).astype(np.float32)
    (_, got), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(factors, ct)
    assert got.shape == wanted.shape
    _close(got, wanted)

    slope = np.sum(directional_difference(outputs, leaves, direction)[0] * ct)
    pairs = zip(jax.tree.leaves(gradient), direction, strict=True)
    parts = [np.sum(float64(leaf) * along) for leaf, along in pairs]
    _close(sum(parts), slope, scale=sum(map(abs, parts)))


def _close(got, wanted, scale=0.0):
    scale = max(1.0, scale, np.abs(wanted).max(initial=0.0))
    np.testing.assert_allclose(float64(got), wanted, rtol=0, atol=2e-4 * scale)
