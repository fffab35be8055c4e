"""What a real model must satisfy once it is wrapped: invariants 1 to 4, and nothing added up.

A `ModelCase` names a model, builds a tiny random-initialised one and says which of its leaves to
adapt. `Adapted` is that model with its factors, from which each test of `test_models.py` takes what
it needs. The models themselves are never changed: only their parameters and inputs are made here.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorax_fn as lora

# alpha != rank, so that a lost or doubled scale shows.
RANK, ALPHA = 2, 6.0

# Names (or parts of names) of vectors that multiply activations.
MULTIPLIERS = ("scale", "var", "norm", "weight_g")


@dataclasses.dataclass(frozen=True)
class Model:
    """A function with params first, and what to call it with."""

    apply_fn: Callable[..., Any]
    params: Any
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """A model by name: how to build it, the leaves to adapt (a regex) and how many those are.

    `spread` scales the random factors: models without normalisation need small ones. `tolerance`
    is relative to the largest entry of what is compared.
    """

    name: str
    build: Callable[[], Model]
    targets: str
    adapted: int
    exclude: str | None = None
    rank: int = RANK
    spread: float = 0.3
    tolerance: float = 1e-4

    @property
    def rules(self) -> list[lora.LoRA]:
        return [lora.LoRA(self.targets, rank=self.rank, alpha=ALPHA, exclude=self.exclude)]


class Adapted:
    """A built case, its zero-B factors as `init` makes them, and compiled ways to call it.

    Params may hold more than arrays (Equinox modules hold activation functions). What is compiled
    takes their floating-point leaves, `floats`, and finds all others here.
    """

    def __init__(self, case: ModelCase):
        model = case.build()
        self.case, self.apply_fn, self.params = case, model.apply_fn, model.params
        self.args, self.kwargs = model.args, model.kwargs
        self.floats = float_leaves(model.params)
        axes = lora.infer_axes(self.apply_fn, self.params, *self.args, **self.kwargs)
        self.at_init = lora.init(jax.random.key(1), self.params, case.rules, axes=axes)

    def random_factors(self, seed: int) -> Any:
        draw = np.random.default_rng(seed).standard_normal
        return jax.tree.map(
            lambda leaf: jnp.asarray(self.case.spread * draw(leaf.shape), leaf.dtype), self.at_init
        )

    def base(self, floats: Sequence[jax.Array]) -> list[jax.Array]:
        """The floating-point outputs of the model itself."""
        return self._call(self.apply_fn, self._rebuild(floats))

    def wrapped(self, floats: Sequence[jax.Array], factors: Any) -> list[jax.Array]:
        """The floating-point outputs of the adapted model; adding a weight up is an error."""
        wrapped = lora.wrap(self.apply_fn, dense="error")
        return self._call(wrapped, self._rebuild(floats), factors)

    def merged(self, floats: Sequence[jax.Array], factors: Any) -> list[jax.Array]:
        """The floating-point outputs of the plain model on merged params: the reference."""
        return self._call(self.apply_fn, lora.merge(self._rebuild(floats), factors))

    @functools.cached_property
    def wrapped_step(self) -> "Step":
        return Step(self.wrapped, self.floats)

    @functools.cached_property
    def merged_step(self) -> "Step":
        return Step(self.merged, self.floats)

    def _call(self, fn: Callable[..., Any], *trees: Any) -> list[jax.Array]:
        return float_leaves(fn(*trees, *self.args, **self.kwargs))

    def _rebuild(self, floats: Sequence[jax.Array]) -> Any:
        """The params with these arrays in place of the floating-point leaves."""
        new = iter(floats)
        return jax.tree.map(lambda leaf: next(new) if is_float(leaf) else leaf, self.params)


class Step:
    """A compiled training step: factors → outputs, d loss/d params, d loss/d factors.

    The loss is a fixed random projection of all outputs, so that no gradient cancels by symmetry.
    `traces` counts how often JAX traced it.
    """

    def __init__(self, outputs_of: Callable[[Any, Any], list[jax.Array]], floats: list[jax.Array]):
        self.traces, self.floats = 0, floats

        def loss(floats, factors):
            self.traces += 1
            outputs = outputs_of(floats, factors)
            return projection(outputs), outputs

        self.compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    def __call__(self, factors: Any) -> tuple[list[jax.Array], list[jax.Array], Any]:
        (_, outputs), (params_grad, factors_grad) = self.compiled(self.floats, factors)
        return outputs, params_grad, factors_grad


def random_params(shapes: Any, seed: int = 0) -> Any:
    """Arrays for a tree of shapes, as from `jax.eval_shape`: no initialiser has to be compiled.

    Matrices get Glorot-like scales; vectors that multiply (norm scales, variances) stay near one
    and all others (biases) near zero, so that nothing is trivially zero or one.
    """
    draw = np.random.default_rng(seed).standard_normal

    def fill(key_path, leaf):
        if not is_float(leaf):
            return jnp.zeros(leaf.shape, leaf.dtype)
        multiplies = any(word in jax.tree_util.keystr(key_path).lower() for word in MULTIPLIERS)
        if leaf.ndim >= 2:
            value = draw(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]) ** 0.5 * 2)
        else:
            value = multiplies + 0.1 * draw(leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def float_leaves(tree: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if is_float(leaf)]


def projection(outputs: Sequence[jax.Array]) -> jax.Array:
    """Σ ⟨output, fixed random array⟩ / √size, over all outputs."""
    total = jnp.zeros((), jnp.float32)
    for position, output in enumerate(outputs):
        direction = np.random.default_rng(position).standard_normal(output.shape, np.float32)
        total += jnp.sum(output * direction) / np.sqrt(max(output.size, 1))
    return total


def assert_close(got: Any, want: Any, tolerance: float) -> None:
    """Every leaf of `got` is within `tolerance` of `want`, relative to the leaf's largest entry.

    Leaves a hundred times smaller than the largest, where the rounding of the large ones shows, are
    held to a hundredth of the largest.
    """
    got, want = (
        [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)] for tree in (got, want)
    )
    scales = [np.abs(leaf).max(initial=0) for leaf in want]
    floor = 1e-2 * max(scales)
    for got_leaf, want_leaf, scale in zip(got, want, scales, strict=True):
        atol = tolerance * max(scale, floor)
        np.testing.assert_allclose(got_leaf, want_leaf, rtol=0, atol=atol)
