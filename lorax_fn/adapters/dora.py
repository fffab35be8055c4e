"""DoRA: the direction of W + s·A·B, and a trained length for each output (arXiv:2402.09353).

    W' = m ∘ (W + s·A·B) / ‖W + s·A·B‖, the norm taken over the contracted dims.

Neither A·B nor W' is formed: the quotient is one number for each output, which multiplies the
outputs, and the norm comes from products no larger than the factors,

    ‖W + s·A·B‖² = ‖W‖² + 2s·Σ_r B ∘ (AᵀW) + s²·Σ_r B ∘ (AᵀA·B).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax

from lorax_fn.adapters.lora import LoRA, LoRAFactors
from lorax_fn.adapters.low_rank import check_abstract, check_fits, split_shape, sum_over_contract
from lorax_fn.adapters.probes import Start
from lorax_fn.axes import Axes
from lorax_fn.interpreter import RANK, Factor, Term, Weight, labelled_dot, wide_dtype

_OTHER_RANK = "other rank"  # labels the second rank axis of AᵀA


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DoRAFactors(LoRAFactors):
    """The factors of one weight, and the lengths of its outputs.

    Attributes:
        magnitude: m, (batch dims…, out dims…); starts at ‖W‖.
        squared_norm: ‖W‖² of the frozen weight, of the same shape; never trained.
    """

    kind: ClassVar[str] = "DoRA"

    magnitude: Any = None
    squared_norm: Any = None

    def check(self, path: str, leaf: Any) -> None:
        """Raises `StructureError` unless every array has the shape that the leaf's demands."""
        super().check(path, leaf)
        batch, _, out = split_shape(leaf.shape, self.axes)
        names = ("magnitude", "squared_norm")
        check_fits(path, leaf, self.axes, {n: (getattr(self, n), (*batch, *out)) for n in names})

    def adapt(self, leaf: Any, path: str, key: jax.Array | None = None) -> Weight:
        """The sum of the leaf and the low-rank term, with one gain for each output."""
        terms = self.terms(leaf.shape, key)
        dims = (*self.axes.batch, *self.axes.out)
        squared = Factor(lax.stop_gradient(self.squared_norm), dims)
        norm = jnp.sqrt(jnp.maximum(_squared_norm(leaf, terms, squared), 0))
        # An output of norm zero has no direction, and a gain of one; `neutral` relies on it.
        gain = jnp.where(norm > 0, self.magnitude / jnp.where(norm > 0, norm, 1), 1)
        return Weight(leaf, terms, (path,), (Factor(gain, dims),))

    def remove(self, merged: Any, path: str) -> jax.Array:
        """W, given m ∘ (W + V) / n: its norm is stored, so that n solves ‖n·u - V‖ = ‖W‖.

        Of the two solutions the larger is taken, which is the right one wherever ‖V‖ < ‖W‖.
        """
        dims = (*self.axes.batch, *self.axes.out)
        dtype = wide_dtype(merged.dtype)
        m = Factor(jnp.where(self.magnitude == 0, 1, self.magnitude), dims)
        unit = Factor(merged.astype(dtype), tuple(range(merged.ndim))).times(m, lax.div)
        terms = self.terms(merged.shape, None)
        change = sum(term.add_up(merged.shape, dtype) for term in terms)
        along = sum_over_contract(unit.array * change, self.axes)
        across = sum_over_contract(jnp.square(change), self.axes)
        n = along + jnp.sqrt(jnp.maximum(along**2 - across + self.squared_norm, 0))
        return (unit.times(Factor(n, dims)).array - change).astype(merged.dtype)

    def dims(self) -> Self:
        """As LoRA's; the lengths span the batch and out dims."""
        lengths = (*self.axes.batch, *self.axes.out)
        return dataclasses.replace(super().dims(), magnitude=lengths, squared_norm=lengths)

    def trainable(self) -> DoRAFactors:
        """The factors and the magnitude are trained."""
        start = None if self.start is None else (False, False)
        return dataclasses.replace(
            self, a=not self.freeze_a, b=True, start=start, magnitude=True, squared_norm=False
        )


def _squared_norm(weight: Any, terms: Sequence[Term], squared: Factor) -> jax.Array:
    """‖W + Σ s·A·B‖² for each output, given ‖W‖²; constant to derivatives."""
    a = Factor(jnp.concatenate([t.a.array for t in terms], -1), terms[0].a.dims)
    b_axis = terms[0].b.dims.index(RANK)
    dtype = wide_dtype(weight.dtype)
    scaled = [t.b.array.astype(dtype) * t.scale for t in terms]
    b = Factor(jnp.concatenate(scaled, b_axis), terms[0].b.dims)
    a, b = (lax.stop_gradient(factor.astype(dtype)) for factor in (a, b))
    w = Factor(weight.astype(dtype), tuple(range(weight.ndim)))
    dot = functools.partial(labelled_dot, precision=lax.Precision.HIGHEST)
    a_w = dot(a, w, b.dims)  # (batch…, r, out…)
    a_a = dot(a, a.relabel_rank(_OTHER_RANK), (*squared.dims, RANK, _OTHER_RANK))
    a_a_b = dot(a_a, b.relabel_rank(_OTHER_RANK), b.dims)
    inner = 2 * a_w.transpose(b.dims).array + a_a_b.transpose(b.dims).array
    return squared.array + (b.array * inner).sum(b_axis)


@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """Rule: LoRA whose outputs each have a trained length (Liu et al. 2024, arXiv:2402.09353).

    Takes what `LoRA` takes. Costs, beside LoRA, one product of A with W a step, one multiplication
    of the outputs and one of W or of their gradient, whichever is smaller, and the memory of every
    product's output, which the gradient of its magnitudes needs (under remat it is computed
    again). Weight decay pulls the magnitudes towards zero, not towards the pretrained lengths:
    `lora.param_labels` helps to leave them out of it.

    >>> import jax, jax.numpy as jnp, lorax_fn as lora
    >>> rules = [lora.DoRA("w", rank=2, alpha=4)]
    >>> factors = lora.init(jax.random.key(0), {"w": jnp.ones((9, 5))}, rules)
    >>> factors["w"].magnitude
    Array([3., 3., 3., 3., 3.], dtype=float32)
    """

    def make(self, key: jax.Array, path: str, leaf: Any, axes: Axes | None) -> DoRAFactors:
        """LoRA's factors and the norms of the leaf's outputs."""
        node = super().make(key, path, leaf, axes)
        fields = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
        batch, _, out = split_shape(leaf.shape, node.axes)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            check_abstract(path, key)
            squared = jnp.zeros((*batch, *out), wide_dtype(leaf.dtype))
        else:
            squared = sum_over_contract(jnp.square(leaf.astype(wide_dtype(leaf.dtype))), node.axes)
        start = squared
        if isinstance(self.init, Start) and not self.init.taken_off:
            spanned = Factor(squared, (*node.axes.batch, *node.axes.out))
            start = jnp.maximum(_squared_norm(leaf, node.terms(leaf.shape, None), spanned), 0)
        return DoRAFactors(**fields, magnitude=jnp.sqrt(start), squared_norm=squared)
