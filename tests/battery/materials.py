"""The arrays of a case, drawn once: params, two sets of factors, two inputs; and what to expect."""

import functools
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np

import lorax_fn as lora
from tests.battery.case import Floats, Ints, OpCase
from tests.reference import (
    central_difference,
    directional_difference,
    float64,
)


class Materials:
    """Arrays for one case. Index f picks one of two factors, j one of two inputs with cotangent."""

    def __init__(self, case: OpCase):
        self.case = case
        rng = np.random.default_rng(zlib.crc32(case.name.encode()))
        self.params = {
            name: _normal(rng, weight.shape, weight.dtype) for name, weight in case.weights.items()
        }
        self.initial = initial_factors(case, self.params)
        *self.factors, self.direction = (_redrawn(self.initial, rng) for _ in range(3))
        if not all(case.kind.trained):
            self.direction = _without_frozen(self.direction)
        self.xs = [_draw_inputs(case, rng, j) for j in range(2)]
        shapes = jax.eval_shape(case.fn, self.params, self.xs[0])
        self.cts = [
            jax.tree.map(lambda s: _normal(rng, s.shape, s.dtype), shapes) for _ in range(2)
        ]


def initial_factors(case, params):
    """`lora.init` with one rule a weight, the axes given by the case's roles."""
    adapted = {name: weight for name, weight in case.weights.items() if weight.roles}
    rules = [case.kind.rule(re.escape(name), weight) for name, weight in adapted.items()]
    axes = {name: lora.Axes(*adapted[name].axes) if name in adapted else None for name in params}
    return lora.init(jax.random.key(7), params, rules, axes=axes)


def _normal(rng, shape, dtype):
    """Of standard deviation 1/2, so that chains of tanh are not saturated."""
    return jnp.asarray(np.asarray(rng.normal(size=shape) / 2).astype(dtype))


def _redrawn(factors, rng):
    """The same factors, all that is trained random: a zero B would hide every error."""

    def redraw(leaf, is_trained):
        return _normal(rng, leaf.shape, leaf.dtype) if is_trained else leaf

    return jax.tree.map(redraw, factors, lora.trainable_mask(factors))


def _without_frozen(factors):
    """What is not trained has no direction."""
    mask = lora.trainable_mask(factors)
    return jax.tree.map(lambda leaf, kept: leaf if kept else jnp.zeros_like(leaf), factors, mask)


def _draw_inputs(case, rng, j):
    def draw(spec):
        if isinstance(spec, Floats):
            return _normal(rng, spec.shape, spec.dtype)
        if isinstance(spec, Ints):
            return jnp.asarray(rng.integers(spec.low, spec.high, spec.shape, np.int32))
        return jnp.asarray((spec.first, spec.second)[j])

    return {name: draw(spec) for name, spec in case.inputs.items()}


@functools.cache
def materials(case: OpCase) -> Materials:
    return Materials(case)


class Expected:
    """Outputs and derivatives of a case by the numpy reference, as functions of (f, j).

    Factors appear as the flat list of the nodes' leaves, such as [a, b, a, b, …].
    """

    def __init__(self, case: OpCase):
        self.case, self.drawn = case, materials(case)
        self.names = [name for name, weight in sorted(case.weights.items()) if weight.roles]
        self.params = {name: float64(value) for name, value in self.drawn.params.items()}

    def factors(self, f):
        return _flat(self.drawn.factors[f])

    def inputs(self, j):
        return {name: float64(value) for name, value in self.drawn.xs[j].items()}

    def adapted(self, factors, constants):
        """The params with the adapted weight at every adapted name."""
        params = dict(self.params)
        per_node = len(self.case.kind.trained)
        for i, name in enumerate(self.names):
            node = slice(i * per_node, (i + 1) * per_node)
            params[name] = self.case.kind.adapted(
                params[name], factors[node], self.case.weights[name].roles, constants[node]
            )
        return params

    def _differentiable(self, factors, j):
        """The outputs as a function of (factors, inputs), to differentiate at the given point."""
        at_factors = factors
        at_params, at_inputs = self.adapted(factors, factors), self.inputs(j)

        def outputs(factors, inputs):
            params = self.adapted(factors, at_factors)
            if self.case.surrogate:
                return jax.tree.leaves(self.case.surrogate(params, inputs, at_params, at_inputs))
            return jax.tree.leaves(self.case.reference(params, inputs))

        return outputs

    def _loss(self, factors, j):
        """The scalar sum(out · cotangent) of (factors, inputs), to differentiate at that point."""
        cts = _flat(self.drawn.cts[j])
        outputs = self._differentiable(factors, j)

        def loss(factors, inputs):
            outs = outputs(factors, inputs)
            return sum(np.sum(out * ct) for out, ct in zip(outs, cts, strict=True))

        return loss

    @functools.cache  # noqa: B019 — one Expected a case, alive as long as the tests
    def output(self, f, j):
        factors = self.factors(f)
        return self.case.reference(self.adapted(factors, factors), self.inputs(j))

    @functools.cache  # noqa: B019
    def gradient(self, f, j):
        return self.gradient_at(self.factors(f), j)

    def gradient_at(self, factors, j):
        inputs, loss = self.inputs(j), self._loss(factors, j)
        trained = self.case.kind.trained * len(self.names)
        return central_difference(lambda factors: loss(factors, inputs), factors, trained)

    @functools.cache  # noqa: B019
    def input_gradient(self, f, j):
        """With respect to the floating inputs, in the order of their names."""
        inputs, loss = self.inputs(j), self._loss(self.factors(f), j)
        names = sorted(name for name in inputs if inputs[name].dtype == np.float64)

        def of_floats(values):
            return loss(self.factors(f), inputs | dict(zip(names, values, strict=True)))

        return central_difference(of_floats, [inputs[name] for name in names])

    @functools.cache  # noqa: B019
    def tangent(self, f, j):
        """Derivative of the output along `materials.direction`."""
        factors, inputs = self.factors(f), self.inputs(j)
        outputs = self._differentiable(factors, j)
        direction = _flat(self.drawn.direction)
        return directional_difference(lambda values: outputs(values, inputs), factors, direction)

    @functools.cache  # noqa: B019
    def hessian_product(self, f, j):
        """Derivative of the gradient along `materials.direction`."""
        return directional_difference(
            lambda factors: self.gradient_at(factors, j),
            self.factors(f),
            _flat(self.drawn.direction),
            step=1e-4,
        )


def _flat(tree):
    return [float64(leaf) for leaf in jax.tree.leaves(tree)]


@functools.cache
def expected(case: OpCase) -> Expected:
    return Expected(case)


def assert_close(actual, wanted, tolerance, what=""):
    """Leaf by leaf, absolute to the largest entry of the leaf; NaN matches NaN."""
    actual, wanted = jax.tree.leaves(actual), jax.tree.leaves(wanted)
    assert len(actual) == len(wanted), f"{what}: {len(actual)} leaves instead of {len(wanted)}"
    for got, want in zip(actual, wanted, strict=True):
        got, want = float64(got), np.asarray(want)
        assert got.shape == want.shape, f"{what}: shape {got.shape} instead of {want.shape}"
        finite = np.abs(want[np.isfinite(want)])
        scale = max(1.0, finite.max(initial=0.0))
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale, err_msg=what)
