"""Factors that start from data: EVA, CorDA and LoRA-GA.

A probe stands in a weight's place while the function is differentiated over some batches. It
changes no result, and its gradient, summed over the batches, is what the method wants to know:
xᵀ·x·A of the inputs x for EVA and CorDA, ∂L/∂W · Bᵀ or Aᵀ · ∂L/∂W for LoRA-GA. So the gradient of W
itself is never formed. `next` makes the following pass's probe of it, `start` the factors of the
last.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lorax_fn.adapters.low_rank import SummedAdapter, split_shape
from lorax_fn.adapters.matrices import as_columns, as_factors, as_matrices, as_rows
from lorax_fn.adapters.spectral import OVERSAMPLING
from lorax_fn.axes import Axes
from lorax_fn.interpreter import RANK, Factor, Term

DAMPING = 0.01  # of the mean variance, added to every variance before CorDA inverts them
GAMMA = 16.0  # LoRA-GA's gamma: the larger, the smaller the factors start


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Start:
    """Where the factors of one weight start.

    Attributes:
        a: (batch dims…, contract dims…, r).
        b: (batch dims…, r, out dims…); None means zero.
        taken_off: whether s·a·b is taken off the weight again.
    """

    a: Any
    b: Any | None = None
    taken_off: bool = dataclasses.field(default=True, metadata={"static": True})


class Probe(SummedAdapter):
    """What stands at one leaf while batches are shown; its arrays are all differentiated.

    Attributes:
        passes: how often all batches are shown.
        needs_loss: whether the function has to return the scalar loss.
    """

    kind: ClassVar[str] = "Probe"
    passes: ClassVar[int]
    needs_loss: ClassVar[bool] = False

    axes: Any

    @classmethod
    @abc.abstractmethod
    def of(cls, key: jax.Array, leaf: Any, axes: Axes, rank: int) -> Probe:
        """The first pass's probe of a weight."""

    @classmethod
    def largest_rank(cls, contract: int, out: int) -> int:
        """The most that a matrix of this size can be given."""
        return min(contract, out)

    @abc.abstractmethod
    def next(self, gradient: Any, index: int) -> Probe:
        """The probe after pass `index`, given the gradient with respect to this one."""

    @abc.abstractmethod
    def start(self, leaf: Any, rank: int, scale: float) -> Start:
        """The factors that the method starts from, in float32."""

    def check(self, path: str, leaf: Any) -> None:
        """A probe is made for its leaf, and fits."""

    def dims(self) -> Probe:
        """Probes are not placed: they stay where they are made."""
        return jax.tree.map(lambda x: (None,) * len(x.shape), self)

    def trainable(self) -> Probe:
        """Every array."""
        return jax.tree.map(lambda _: True, self)

    def _a(self, array: Any) -> Factor:
        return Factor(array, (*self.axes.batch, *self.axes.contract, RANK))

    def _b(self, array: Any) -> Factor:
        return Factor(array, (*self.axes.batch, RANK, *self.axes.out))


# ------------------------------------------------------------------------------------------
# What goes into a weight


class _InputProbe(Probe):
    """Its gradient is xᵀ·x·a, over all inputs x of the weight."""

    a: Any

    def terms(self, shape: Sequence[int], key: jax.Array | None) -> tuple[Term, ...]:
        """a·0, whose first half is watched."""
        batch, _, out = split_shape(shape, self.axes)
        b = jnp.zeros((*batch, self.a.shape[-1], *out), self.a.dtype)
        return (Term(self._a(self.a), self._b(b), None, 1.0, 0.0, observes=True),)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EVA(_InputProbe):
    """The directions in which a weight's inputs vary most (Paischer et al. 2024, arXiv:2410.07170).

    A holds the leading right singular vectors of all inputs, by subspace iteration: each pass
    multiplies by xᵀx once. B is zero. Of a rank above the number of independent inputs the other
    columns are arbitrary.
    """

    passes: ClassVar[int] = 3

    a: Any  # (batch dims…, contract dims…, k), orthonormal columns
    axes: Axes = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, key: jax.Array, leaf: Any, axes: Axes, rank: int) -> EVA:
        """Random directions, some more than the rank."""
        batch, contract, _ = split_shape(leaf.shape, axes)
        k = min(rank + OVERSAMPLING, math.prod(contract))
        return cls(jax.random.normal(key, (*batch, *contract, k), jnp.float32), axes)

    def next(self, gradient: EVA, index: int) -> EVA:
        """xᵀx·a, made orthonormal, the largest direction first."""
        images = as_columns(gradient.a, self.axes)  # (batch, contract, k)
        return EVA(_leading(images).reshape(self.a.shape), self.axes)

    def start(self, leaf: Any, rank: int, scale: float) -> Start:
        """The first directions."""
        return Start(self.a[..., :rank])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CorDA(_InputProbe):
    """The part of a weight that these inputs use (Yang et al. 2024, arXiv:2406.05223).

    With C the inputs' second moment, C·W = U·S·Vᵀ; the triplets that are largest make
    A = C⁻¹·U·√S and B = √S·Vᵀ ("instruction-previewed adaptation"), which are taken off W. C is
    scaled to a mean variance of one, so that A and B are of a size, and damped to be inverted.

    Costs a matrix of the size of the contracted dims squared, for each weight.
    """

    passes: ClassVar[int] = 1

    a: Any  # (batch dims…, contract dims…, prod(contract)): the identity, then C
    axes: Axes = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, key: jax.Array, leaf: Any, axes: Axes, rank: int) -> CorDA:
        """The identity."""
        batch, contract, _ = split_shape(leaf.shape, axes)
        eye = jnp.eye(math.prod(contract)).reshape(*contract, -1)
        return cls(jnp.broadcast_to(eye, (*batch, *eye.shape)), axes)

    def next(self, gradient: CorDA, index: int) -> CorDA:
        """The second moment."""
        return gradient

    def start(self, leaf: Any, rank: int, scale: float) -> Start:
        """The chosen triplets of C·W."""
        moments = as_columns(self.a, self.axes)  # (batch, n, n)
        variance = jnp.trace(moments, axis1=-2, axis2=-1) / moments.shape[-1]
        seen = variance > 0  # an expert that saw nothing is treated as one that saw all alike
        moments = jnp.where(seen[:, None, None], moments, jnp.eye(moments.shape[-1])[None])
        moments /= jnp.where(seen, variance, 1)[:, None, None]
        moments += DAMPING * jnp.eye(moments.shape[-1])[None]
        u, s, vt = jnp.linalg.svd(moments @ as_matrices(leaf, self.axes), full_matrices=False)
        chosen = self.chosen(rank, s.shape[-1])
        root = jnp.sqrt(s[:, chosen] / scale)  # so that scale·a·b is what is taken off
        a = jnp.linalg.solve(moments, u[..., chosen]) * root[:, None]
        return Start(*as_factors(a, root[..., None] * vt[:, chosen], leaf.shape, self.axes))

    def chosen(self, rank: int, n: int) -> slice:
        """The largest triplets."""
        return slice(rank)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CorDAKnowledge(CorDA):
    """CorDA that trains the triplets which the inputs use least, and so preserves the others.

    The paper's "knowledge-preserved adaptation": show it batches of what is not to be forgotten.
    """

    def chosen(self, rank: int, n: int) -> slice:
        """The smallest triplets."""
        return slice(n - rank, n)


# ------------------------------------------------------------------------------------------
# The gradient of a weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRAGA(Probe):
    """The directions of the loss's gradient (Wang et al. 2024, arXiv:2407.05000).

    With ∂L/∂W = U·S·Vᵀ, A holds the first r columns of U and B the rows r to 2r of Vᵀ, each times
    ⁴√(prod(out)) / √gamma, and s·A·B is taken off W. The gradient is only ever seen times a few
    vectors: with respect to a it is ∂L/∂W · bᵀ while a is zero, and the other way round.
    """

    passes: ClassVar[int] = 6
    needs_loss: ClassVar[bool] = True

    a: Any  # (batch dims…, contract dims…, k)
    b: Any  # (batch dims…, k, out dims…)
    left: Any  # like a: the leading left singular vectors, as far as they are known
    axes: Axes = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, key: jax.Array, leaf: Any, axes: Axes, rank: int) -> LoRAGA:
        """a is zero and b random."""
        batch, contract, out = split_shape(leaf.shape, axes)
        most = min(math.prod(contract), math.prod(out))
        k = min(2 * rank + OVERSAMPLING, most)
        a = jnp.zeros((*batch, *contract, k), jnp.float32)
        return cls(a, jax.random.normal(key, (*batch, k, *out), jnp.float32), a, axes)

    @classmethod
    def largest_rank(cls, contract: int, out: int) -> int:
        """A and B take singular vectors of their own."""
        return min(contract, out) // 2

    def terms(self, shape: Sequence[int], key: jax.Array | None) -> tuple[Term, ...]:
        """a·b, of which one is zero."""
        return (Term(self._a(self.a), self._b(self.b), None, 1.0, 0.0),)

    def next(self, gradient: LoRAGA, index: int) -> LoRAGA:
        """The other factor becomes the leading singular vectors seen from this one's side."""
        if index % 2 == 0:
            q = _leading(as_columns(gradient.a, self.axes)).reshape(self.a.shape)
            return dataclasses.replace(self, a=q, b=jnp.zeros_like(self.b))
        images = as_rows(gradient.b, self.axes)  # (batch, k, out)
        u, _, vt = jnp.linalg.svd(images, full_matrices=False)
        left = (as_columns(self.a, self.axes) @ u).reshape(self.a.shape)
        return LoRAGA(jnp.zeros_like(self.a), vt.reshape(self.b.shape), left, self.axes)

    def start(self, leaf: Any, rank: int, scale: float) -> Start:
        """The first r left and the next r right vectors, scaled."""
        _, _, out = split_shape(leaf.shape, self.axes)
        size = math.prod(out) ** 0.25 / math.sqrt(GAMMA)
        rows = as_rows(self.b, self.axes)[:, rank : 2 * rank]
        columns = as_columns(self.left, self.axes)[..., :rank]
        return Start(*as_factors(columns * size, rows * size, leaf.shape, self.axes))


PROBES: dict[str, type[Probe]] = {
    "eva": EVA,
    "corda": CorDA,
    "corda_kpm": CorDAKnowledge,
    "lora_ga": LoRAGA,
}


def _leading(images: jax.Array) -> jax.Array:
    """Orthonormal columns of the same span, the longest direction first."""
    return jnp.linalg.svd(images, full_matrices=False)[0]
