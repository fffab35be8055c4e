"""The symbolic sum: a frozen weight plus low-rank terms, (W + Σ s·A·B) ∘ gains, not added up.

A `Weight` takes the place of one array while a jaxpr is evaluated. Linear shape operations map
over its base and its factors; contractions turn it into factored products; anything else has to
`add_up`. A dim that both factors of a term span (layers, experts) is a batch dim of A·B; a dim
that neither spans is broadcast. A gain is a multiplier that varies along some of the dims alone,
such as one number for each output (DoRA, IA3): it is applied to what goes in or to what comes out.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lorax_fn.interpreter.explicit import placed_like
from lorax_fn.interpreter.factor import Factor, labelled_dot
from lorax_fn.interpreter.kronecker import NotFactoredError
from lorax_fn.interpreter.quantized import Lazy, check_picks, computed, picked


def wide_dtype(dtype: Any) -> Any:
    """The dtype in which sums are formed: float32, or a wider one if that is what is summed.

    Data may be complex, though weights are not: it stays so.
    """
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return dtype
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)


def _gained(factor: Factor, gain: Factor) -> Factor:
    """factor · gain in float32 or wider: factors of 16 bits are not rounded anew."""
    dtypes = (wide_dtype(each.array.dtype) for each in (factor, gain))
    return factor.astype(np.promote_types(*dtypes)).times(gain)


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """One low-rank summand s·A·B, or s·(A·B) ∘ gains.

    `keys` holds a PRNG key for each batch dim of the weight, or None where dropout is off;
    `dropout` is the probability with which an input of A is dropped. A gain spans dims of A, or of
    B, or the rank. `observes` makes the cotangent of A the second moment of its inputs, xᵀ·x·A.
    """

    a: Factor
    b: Factor
    keys: Factor | None
    scale: float = _static()
    dropout: float = _static()
    gains: tuple[Factor, ...] = ()
    observes: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def is_thin(self) -> bool:
        """Whether A or B is a mere vector over the rank, so that A·B costs no more than W."""
        return any(factor.size(factor.spanned) == 1 for factor in (self.a, self.b))

    def map(self, fn: Callable[[Factor], Factor]) -> Term:
        """Applies a linear shape operation to A, B, the keys and the gains."""
        keys = None if self.keys is None else fn(self.keys)
        gains = tuple(map(fn, self.gains))
        return dataclasses.replace(self, a=fn(self.a), b=fn(self.b), keys=keys, gains=gains)

    def relabel(self, rename: Callable[[int], int]) -> Term:
        """The same term of a weight whose dim d is now called `rename(d)`."""
        return self.map(lambda factor: factor.relabel(rename))

    def folded(self) -> Term:
        """The same term with its gains multiplied into A and B."""
        a, b = self.a, self.b
        for gain in self.gains:
            fits_a = set(gain.dims) <= set(a.dims)
            if fits_a and (a.array.size < b.array.size or not set(gain.dims) <= set(b.dims)):
                a = _gained(a, gain)
                continue
            missing = [d for d in gain.dims if d not in b.dims]  # batch dims that A and B share
            b = _gained(b.widen(missing, [gain.length(d) for d in missing]), gain)
        return dataclasses.replace(self, a=a, b=b, gains=())

    def add_up(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """s·A·B of the weight's shape."""
        dims = tuple(range(len(shape)))
        folded = self.folded()
        a, b = folded.a.astype(dtype), folded.b.astype(dtype)
        if self.scale != 1.0:  # not into the product: two terms that cancel shall do so exactly
            b = b.with_array(b.array * self.scale)
        product = labelled_dot(a, b, dims, precision=lax.Precision.HIGHEST)
        missing = [d for d in dims if d not in product.dims]
        return product.widen(missing, [shape[d] for d in missing]).transpose(dims).array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """(`base` + Σ terms) ∘ Π gains. `paths` names the leaves of params that it came from.

    The base is an array, or `Lazy`. Each term is a `Term` or a `KroneckerTerm`.
    """

    base: Any
    terms: tuple[Any, ...]
    paths: tuple[str, ...] = _static()
    gains: tuple[Factor, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the sum."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """The number of dims of the sum."""
        return self.base.ndim

    @property
    def dtype(self) -> Any:
        """The dtype of the sum; the factors keep their own."""
        return self.base.dtype

    @property
    def is_adapted(self) -> bool:
        """Whether there is more than the base."""
        return bool(self.terms or self.gains)

    def map(self, base: Any, fn: Callable[[Factor], Factor]) -> Weight:
        """A weight with a new base, `fn` applied to every factor."""
        terms = tuple(term.map(fn) for term in self.terms)
        return Weight(base, terms, self.paths, tuple(map(fn, self.gains)))

    def relabel(self, base: Any, rename: Callable[[int], int]) -> Weight:
        """A weight with a new base, whose dim `rename(d)` is this one's dim d."""
        terms = tuple(term.relabel(rename) for term in self.terms)
        gains = tuple(gain.relabel(rename) for gain in self.gains)
        return Weight(base, terms, self.paths, gains)

    def add_up(self) -> jax.Array:
        """The sum as one array, formed in float32 or wider and cast once to `dtype`."""
        wide = wide_dtype(self.dtype)
        total = self.base.astype(wide)
        if self.terms:  # together first: two that cancel leave the base exact
            shares = [placed_like(t.add_up(self.shape, wide), total) for t in self.terms]
            total += functools.reduce(operator.add, shares)
        scaled = Factor(total, tuple(range(self.ndim)))
        for gain in self.gains:
            scaled = scaled.times(gain)
        return scaled.array.astype(self.dtype)


def stack_leading(weight: Weight) -> Weight:
    """Relabels a weight whose arrays have all gained a leading axis, such as a scan's outputs."""

    def lead(factor: Factor) -> Factor:
        return Factor(factor.array, (0, *factor.relabel(lambda d: d + 1).dims))

    return weight.map(weight.base, lead)


def bases(operands: Sequence[Any]) -> list[Any]:
    """The operands with every weight replaced by its base."""
    return [value.base if isinstance(value, Weight) else value for value in operands]


def leading_slices(weight: Weight) -> tuple[list[Any], Callable[[list[Any]], Weight]]:
    """Splits a stacked weight for a scan over its dim 0.

    Returns the arrays to scan over (the base and every factor that spans dim 0, that dim first) and
    the function that makes one step's weight of their slices. Factors that do not span dim 0 are
    the same in every step; of a lazy base each step picks its entry by number.
    """
    leaves, treedef = jax.tree.flatten(
        (weight.terms, weight.gains), is_leaf=lambda x: isinstance(x, Factor)
    )
    if any(0 in leaf.dims and leaf.length(0) != weight.shape[0] for leaf in leaves):
        raise NotFactoredError  # a part of a Kronecker product: its steps are not the weight's
    stacked = [leaf.lead_with(0) if 0 in leaf.dims else leaf for leaf in leaves]
    base = computed(weight.base) if weight.shape[0] == 0 else weight.base
    is_lazy = isinstance(base, Lazy)
    if is_lazy:
        check_picks(base)
    arrays = [
        jnp.arange(weight.shape[0]) if is_lazy else base,
        *(f.array for f in stacked if 0 in f.dims),
    ]

    def rebuild(slices: list[Any]) -> Weight:
        first, *rest = slices
        sliced = iter(rest)
        factors = [
            Factor(next(sliced), f.dims[1:]) if 0 in f.dims else f for f in stacked
        ]  # still labelled by the stack's dims
        terms, gains = jax.tree.unflatten(treedef, [f.relabel(lambda d: d - 1) for f in factors])
        own = picked(base, first) if is_lazy else first
        return Weight(own, terms, weight.paths, gains)

    return arrays, rebuild
