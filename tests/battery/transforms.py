"""Every way of calling a wrapped function that must give the same numbers.

A transformation takes a `Run` and yields observations (quantity, f, j, value): the value that JAX
found for that quantity of `materials.Expected` with factors f and inputs j.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.battery.case import OpCase
from tests.battery.materials import Materials, materials


@dataclass(frozen=True)
class Run:
    """A wrapped case with its arrays."""

    case: OpCase
    wrapped: Any

    @property
    def drawn(self) -> Materials:
        return materials(self.case)

    def apply(self, factors, x):
        return self.wrapped(self.drawn.params, factors, x)

    def step(self, factors, x, ct):
        """(output, gradient with respect to the factors); no gradient where JAX has none."""
        if not self.case.reverse:
            return self.apply(factors, x), None

        def loss(factors):
            out = self.apply(factors, x)
            return inner(out, ct), out

        (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(factors)
        return out, gradient


def inner(out, ct):
    """The scalar sum(out · ct) in float32, over every leaf."""
    terms = jax.tree.map(lambda o, c: jnp.sum((o * c).astype(jnp.float32)), out, ct)
    return sum(jax.tree.leaves(terms))


def stacked(*trees):
    """On the host: a jnp.stack of its own would compile for every shape."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)


def at(tree, i):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[i], tree)


def observe(f, j, result):
    """The observations in what `Run.step` returned."""
    out, gradient = result
    yield "output", f, j, out
    if gradient is not None:
        yield "gradient", f, j, gradient


def eager(run):
    drawn = run.drawn
    yield "output", 0, 0, run.apply(drawn.factors[0], drawn.xs[0])


def grad(run):
    """Eager, and with respect to the inputs as well."""
    drawn = run.drawn
    floats = {k: x for k, x in drawn.xs[0].items() if jnp.issubdtype(x.dtype, jnp.floating)}

    def loss(factors, floats):
        return inner(run.apply(factors, drawn.xs[0] | floats), drawn.cts[0])

    if run.case.reverse:
        gradient, input_gradient = jax.grad(loss, argnums=(0, 1))(drawn.factors[0], floats)
        yield "gradient", 0, 0, gradient
        yield "input_gradient", 0, 0, input_gradient


def jit(run):
    drawn, step = run.drawn, jax.jit(run.step)
    for f, j in ((0, 0), (1, 1)):
        yield from observe(f, j, step(drawn.factors[f], drawn.xs[j], drawn.cts[j]))


def vmap_inputs(run):
    drawn = run.drawn
    step = jax.jit(jax.vmap(run.step, in_axes=(None, 0, 0)))
    result = step(drawn.factors[0], stacked(*drawn.xs), stacked(*drawn.cts))
    for j in range(2):
        yield from observe(0, j, at(result, j))


def vmap_factors(run):
    drawn = run.drawn
    step = jax.jit(jax.vmap(run.step, in_axes=(0, None, None)))
    result = step(stacked(*drawn.factors), drawn.xs[0], drawn.cts[0])
    for f in range(2):
        yield from observe(f, 0, at(result, f))


def pmap(run):
    drawn = run.drawn
    step = jax.pmap(run.step, in_axes=(None, 0, 0))
    result = step(drawn.factors[0], stacked(*drawn.xs), stacked(*drawn.cts))
    for j in range(2):
        yield from observe(0, j, at(result, j))


def jvp(run):
    """Of output and gradient together: forward over forward, and forward over reverse."""
    drawn = run.drawn

    @jax.jit
    def pushforward(factors, direction):
        return jax.jvp(lambda f: run.step(f, drawn.xs[0], drawn.cts[0]), (factors,), (direction,))

    result, (tangent, product) = pushforward(drawn.factors[0], drawn.direction)
    yield from observe(0, 0, result)
    yield "tangent", 0, 0, tangent
    if run.case.reverse:
        yield "hessian_product", 0, 0, product


def linearize(run):
    drawn = run.drawn
    out, linear = jax.linearize(lambda fac: run.apply(fac, drawn.xs[0]), drawn.factors[0])
    yield "output", 0, 0, out
    yield "tangent", 0, 0, linear(drawn.direction)


def scan(run):
    drawn = run.drawn

    @jax.jit
    def over_inputs(factors, xs, cts):
        def body(carry, x_and_ct):
            return carry, run.step(factors, *x_and_ct)

        return jax.lax.scan(body, 0, (xs, cts))[1]

    result = over_inputs(drawn.factors[0], stacked(*drawn.xs), stacked(*drawn.cts))
    for j in range(2):
        yield from observe(0, j, at(result, j))


def remat(run):
    drawn = run.drawn
    step = jax.jit(Run(run.case, jax.checkpoint(run.wrapped)).step)
    yield from observe(0, 0, step(drawn.factors[0], drawn.xs[0], drawn.cts[0]))


TRANSFORMS = {
    fn.__name__: fn
    for fn in (
        eager,
        grad,
        jit,
        vmap_inputs,
        vmap_factors,
        pmap,
        jvp,
        linearize,
        scan,
        remat,
    )
}
