"""AdaLoRA: W + s·A·diag(e)·B, whose ranks are budgeted by importance (arXiv:2303.10512).

A and B are kept near orthonormal by a penalty, so that e plays the part of singular values. A
`RankBudget` scores each triplet (a column of A, an entry of e, a row of B) by how much the loss
feels it, and sets the entries of the least important to zero, more and more of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lorax_fn.adapters.base import Rule, is_adapter, static
from lorax_fn.adapters.low_rank import (
    SummedAdapter,
    alpha_over_rank,
    check_alpha,
    check_count,
    check_dtype,
    check_fits,
    check_largest_rank,
    check_probability,
    check_rank,
    dropout_keys,
    resolve_axes,
    split_shape,
)
from lorax_fn.axes import Axes
from lorax_fn.errors import LoraError
from lorax_fn.interpreter import RANK, Factor, Term
from lorax_fn.targets import Targets

Pytree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaLoRAFactors(SummedAdapter):
    """The triplets of one weight.

    Attributes:
        a: (batch dims…, contract dims…, r).
        e: (batch dims…, r); starts at zero.
        b: (batch dims…, r, out dims…).
        scale: alpha/rank.
        axes: the roles of the weight's dims.
        dropout: the probability of dropping an input of A while `lora_key` is given.
    """

    kind: ClassVar[str] = "AdaLoRA"

    a: Any
    e: Any
    b: Any
    scale: float = static()
    axes: Axes = static()
    dropout: float = static()

    @property
    def rank(self) -> int:
        """r, the rank at the start."""
        return self.a.shape[-1]

    def check(self, path: str, leaf: Any) -> None:
        """Raises `StructureError` unless every array has the shape that the leaf's demands."""
        batch, contract, out = split_shape(leaf.shape, self.axes)
        wanted = {
            "a": (*batch, *contract, self.rank),
            "e": (*batch, self.rank),
            "b": (*batch, self.rank, *out),
        }
        parts = {name: (getattr(self, name), shape) for name, shape in wanted.items()}
        check_fits(path, leaf, self.axes, parts)

    def dims(self) -> AdaLoRAFactors:
        """As LoRA's; e spans the batch dims."""
        batch, contract, out = self.axes.batch, self.axes.contract, self.axes.out
        return dataclasses.replace(
            self, a=(*batch, *contract, None), e=(*batch, None), b=(*batch, None, *out)
        )

    def unscaled(self) -> AdaLoRAFactors:
        """With s·B for B."""
        return dataclasses.replace(self, b=self.scale * self.b, scale=1.0)

    def trainable(self) -> AdaLoRAFactors:
        """All three are trained."""
        return dataclasses.replace(self, a=True, e=True, b=True)

    def terms(self, shape: Sequence[int], key: jax.Array | None) -> tuple[Term, ...]:
        """One term, with e as its gain."""
        batch, contract, out = self.axes.batch, self.axes.contract, self.axes.out
        keys = dropout_keys(self.axes, shape, key, self.dropout)
        a = Factor(self.a, (*batch, *contract, RANK))
        b = Factor(self.b, (*batch, RANK, *out))
        gains = (Factor(self.e, (*batch, RANK)),)
        return (Term(a, b, keys, self.scale, self.dropout, gains),)


@dataclasses.dataclass(frozen=True)
class AdaLoRA(Rule):
    """Rule: low-rank triplets, to be thinned out by a `RankBudget` while they train.

    Zhang et al. 2023, arXiv:2303.10512.

    Args:
        targets: which leaves, in any form that `LoRA` takes.
        rank: r at the start; half as much again as is wanted in the end is usual.
        alpha: the update is scaled by alpha/rank. None means alpha = rank.
        dropout: probability of dropping an input of A; acts when `lora_key` is given.
        dtype: the dtype of the triplets.
        exclude: leaves to leave out.
        axes: the roles of the dims of every targeted weight, in place of what `init` is given.

    Raises:
        LoraError: if a hyperparameter is out of its range.

    >>> import jax, jax.numpy as jnp, lorax_fn as lora
    >>> rules = [lora.AdaLoRA("w", rank=3, alpha=6)]
    >>> factors = lora.init(jax.random.key(0), {"w": jnp.ones((9, 5))}, rules)
    >>> factors["w"].e.shape
    (3,)
    """

    targets: Targets
    _: dataclasses.KW_ONLY
    rank: int = 12
    alpha: float | None = None
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    exclude: Targets | None = None
    axes: Axes | None = None

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_alpha(self.alpha)
        check_probability("dropout", self.dropout)
        check_dtype(self.dtype)

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return alpha_over_rank(self.alpha, self.rank)

    def make(self, key: jax.Array, path: str, leaf: Any, axes: Axes | None) -> AdaLoRAFactors:
        """A and B normal with deviation 0.02, e zero."""
        axes = resolve_axes("AdaLoRA", path, leaf, self.axes or axes)
        check_largest_rank(path, leaf, axes, self.rank)
        batch, contract, out = split_shape(leaf.shape, axes)
        key_a, key_b = jax.random.split(key)
        return AdaLoRAFactors(
            a=0.02 * jax.random.normal(key_a, (*batch, *contract, self.rank), self.dtype),
            e=jnp.zeros((*batch, self.rank), self.dtype),
            b=0.02 * jax.random.normal(key_b, (*batch, self.rank, *out), self.dtype),
            scale=self.scale,
            axes=axes,
            dropout=float(self.dropout),
        )


def orthogonality(factors: Pytree) -> jax.Array:
    """The mean over all AdaLoRA nodes of ‖AᵀA - I‖ + ‖BBᵀ - I‖ (Frobenius), to add to the loss.

    The paper's weight for it is 0.1 to 0.5. Stacked layers and experts count one by one.

    Raises:
        LoraError: if factors hold no AdaLoRA node.
    """
    penalties = [
        p for node in _nodes(factors) for p in (_distance(node, "a"), _distance(node, "b"))
    ]
    return jnp.concatenate(penalties).mean()


def _distance(node: AdaLoRAFactors, name: str) -> jax.Array:
    rows = _triplets(node, getattr(node, name), name)  # (matrices, r, entries)
    gram = jnp.einsum("mre,mqe->mrq", rows, rows)
    return jnp.sqrt(jnp.square(gram - jnp.eye(gram.shape[-1])[None]).sum((1, 2)) + 1e-12)


class BudgetState(NamedTuple):
    """What a `RankBudget` remembers: the step, and two averages for each array of each triplet."""

    step: jax.Array
    sensitivity: Pytree
    uncertainty: Pytree


@dataclasses.dataclass(frozen=True)
class RankBudget:
    """Thins out the triplets of `AdaLoRA`: a pure update step, like an optax transformation.

    Call `update` after each optimiser step, with that step's gradients:

        factors = optax.apply_updates(factors, updates)
        factors, budget_state = budget.update(factors, grads, budget_state)

    The number of triplets kept falls along a cubic from all of them, at `warmup`, to `target_rank`
    times the number of adapted matrices, `final_steps` before `total_steps`. Works under `jax.jit`.

    Args:
        target_rank: triplets to keep for each adapted matrix, on average.
        total_steps: the length of the training.
        warmup: steps at the start in which nothing is dropped.
        final_steps: steps at the end in which the number of triplets kept stays the same.
        beta1: the average of sensitivities |w·∂L/∂w| keeps this share.
        beta2: and the average of their deviations this one.

    Raises:
        LoraError: if the steps do not fit into `total_steps`.
    """

    target_rank: int
    _: dataclasses.KW_ONLY
    total_steps: int
    warmup: int = 0
    final_steps: int = 0
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        check_rank(self.target_rank)
        for name in ("total_steps", "warmup", "final_steps"):
            check_count(name, getattr(self, name))
        if min(self.warmup, self.final_steps) < 0 or (
            self.warmup + self.final_steps >= self.total_steps
        ):
            raise LoraError(
                f"warmup={self.warmup} and final_steps={self.final_steps} leave nothing of "
                f"total_steps={self.total_steps} in which to drop triplets; wanted a smaller sum."
            )
        check_probability("beta1", self.beta1)
        check_probability("beta2", self.beta2)

    def init(self, factors: Pytree) -> BudgetState:
        """The state before the first step."""
        # Two trees of their own: a training step that donates the state gives each array once.
        sensitivity, uncertainty = (
            [jax.tree.map(jnp.zeros_like, node) for node in _nodes(factors)] for _ in range(2)
        )
        return BudgetState(jnp.zeros((), jnp.int32), sensitivity, uncertainty)

    def update(
        self, factors: Pytree, grads: Pytree, state: BudgetState
    ) -> tuple[Pytree, BudgetState]:
        """Factors with the entries e of the dropped triplets at zero, and the next state."""
        nodes, grad_nodes = _nodes(factors), _nodes(grads)
        # A step whose gradients are not finite says nothing, and must not stay in the averages.
        now = jax.tree.map(
            lambda w, g: jnp.nan_to_num(jnp.abs(w * g), posinf=0.0), nodes, grad_nodes
        )
        mean = jax.tree.map(
            lambda old, new: self.beta1 * old + (1 - self.beta1) * new, state.sensitivity, now
        )
        spread = jax.tree.map(
            lambda old, new, average: self.beta2 * old + (1 - self.beta2) * jnp.abs(new - average),
            state.uncertainty,
            now,
            mean,
        )
        scores = [_scores(*pair) for pair in zip(nodes, mean, spread, strict=True)]
        every = jnp.concatenate([score.ravel() for score in scores])
        matrices = sum(score.shape[0] for score in scores)
        kept = self._kept(state.step, every.size, min(self.target_rank * matrices, every.size))
        threshold = jnp.sort(every)[::-1][jnp.clip(kept - 1, 0, every.size - 1)]
        thinned = iter(
            [_thinned(node, score >= threshold) for node, score in zip(nodes, scores, strict=True)]
        )
        factors = jax.tree.map(
            lambda node: next(thinned) if isinstance(node, AdaLoRAFactors) else node,
            factors,
            is_leaf=is_adapter,
        )
        return factors, BudgetState(state.step + 1, mean, spread)

    def _kept(self, step: jax.Array, start: int, end: int) -> jax.Array:
        """How many triplets of all stay at a step."""
        span = self.total_steps - self.final_steps - self.warmup
        progress = jnp.clip((step - self.warmup) / span, 0.0, 1.0)
        kept = end + (start - end) * (1 - progress) ** 3
        return lax.convert_element_type(kept, jnp.int32)


def _nodes(tree: Pytree) -> list[AdaLoRAFactors]:
    nodes = [
        node
        for node in jax.tree.leaves(tree, is_leaf=is_adapter)
        if isinstance(node, AdaLoRAFactors)
    ]
    if not nodes:
        raise LoraError("the tree holds no AdaLoRA node; wanted factors made by lora.AdaLoRA.")
    return nodes


def _triplets(node: AdaLoRAFactors, array: jax.Array, name: str) -> jax.Array:
    """An array of a node as (matrices, r, entries of one triplet)."""
    n_batch = len(node.axes.batch)
    at = {"a": array.ndim - 1, "e": n_batch, "b": n_batch}[name]
    rank = array.shape[at]
    moved = jnp.moveaxis(array, at, n_batch)
    matrices = 1
    for length in array.shape[:n_batch]:
        matrices *= length
    return moved.reshape(matrices, rank, -1)


def _scores(node: AdaLoRAFactors, mean: AdaLoRAFactors, spread: AdaLoRAFactors) -> jax.Array:
    """(matrices, r): the score of e plus the mean scores of the column and the row."""
    a, e, b = (
        _triplets(node, getattr(mean, name) * getattr(spread, name), name).mean(-1)
        for name in ("a", "e", "b")
    )
    return a + e + b


def _thinned(node: AdaLoRAFactors, kept: jax.Array) -> AdaLoRAFactors:
    return dataclasses.replace(node, e=jnp.where(kept.reshape(node.e.shape), node.e, 0))
