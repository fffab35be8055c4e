"""VeRA: frozen random projections, and trained vectors between them (arXiv:2310.11454).

ΔW = A · diag(d) · B · diag(g), with A and B drawn once and never trained.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lorax_fn.adapters.base import Rule, static
from lorax_fn.adapters.low_rank import (
    SummedAdapter,
    check_dtype,
    check_fits,
    check_probability,
    check_rank,
    dropout_keys,
    is_finite,
    resolve_axes,
    split_shape,
)
from lorax_fn.axes import Axes
from lorax_fn.errors import LoraError
from lorax_fn.interpreter import RANK, Factor, Term
from lorax_fn.targets import Targets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VeRAFactors(SummedAdapter):
    """The vectors and projections of one weight.

    Attributes:
        d: (batch dims…, r), trained.
        g: (batch dims…, out dims…), trained; starts at zero.
        a: (contract dims…, r), frozen; one for all layers and experts of a stack.
        b: (r, out dims…), frozen.
        axes: the roles of the weight's dims.
        dropout: the probability of dropping an input of A while `lora_key` is given.
    """

    kind: ClassVar[str] = "VeRA"

    d: Any
    g: Any
    a: Any
    b: Any
    axes: Axes = static()
    dropout: float = static()

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[-1]

    def check(self, path: str, leaf: Any) -> None:
        """Raises `StructureError` unless every array has the shape that the leaf's demands."""
        batch, contract, out = split_shape(leaf.shape, self.axes)
        wanted = {
            "d": (*batch, self.rank),
            "g": (*batch, *out),
            "a": (*contract, self.rank),
            "b": (self.rank, *out),
        }
        parts = {name: (getattr(self, name), shape) for name, shape in wanted.items()}
        check_fits(path, leaf, self.axes, parts)

    def dims(self) -> VeRAFactors:
        """The vectors span the batch dims, the projections do not."""
        batch, contract, out = self.axes.batch, self.axes.contract, self.axes.out
        return dataclasses.replace(
            self, d=(*batch, None), g=(*batch, *out), a=(*contract, None), b=(None, *out)
        )

    def trainable(self) -> VeRAFactors:
        """The vectors are trained, the projections are not."""
        return dataclasses.replace(self, d=True, g=True, a=False, b=False)

    def terms(self, shape: Sequence[int], key: jax.Array | None) -> tuple[Term, ...]:
        """One term, with d and g as its gains."""
        batch, contract, out = self.axes.batch, self.axes.contract, self.axes.out
        keys = dropout_keys(self.axes, shape, key, self.dropout)
        a = Factor(lax.stop_gradient(self.a), (*contract, RANK))
        b = Factor(lax.stop_gradient(self.b), (RANK, *out))
        gains = Factor(self.d, (*batch, RANK)), Factor(self.g, (*batch, *out))
        return (Term(a, b, keys, 1.0, self.dropout, gains),)


@dataclasses.dataclass(frozen=True)
class VeRA(Rule):
    """Rule: train two vectors a weight, between frozen random projections.

    Kopiczko et al. 2023, arXiv:2310.11454. Trains r + out numbers a weight. All targets of one
    shape have the same projections, drawn from `seed` and not from `init`'s key; each node keeps
    its own copy, which costs memory as LoRA's factors of that rank do.

    Args:
        targets: which leaves, in any form that `LoRA` takes.
        rank: r; may be far above LoRA's, since it costs one number each.
        d_initial: the value that d starts at.
        dropout: probability of dropping an input of A; acts when `lora_key` is given.
        seed: what the projections are drawn from.
        dtype: the dtype of the vectors and projections.
        exclude: leaves to leave out.
        axes: the roles of the dims of every targeted weight, in place of what `init` is given.

    Raises:
        LoraError: if a hyperparameter is out of its range.

    >>> import jax, jax.numpy as jnp, lorax_fn as lora
    >>> factors = lora.init(jax.random.key(0), {"w": jnp.ones((9, 5))}, [lora.VeRA("w", rank=4)])
    >>> factors["w"].d.shape, factors["w"].g.shape
    ((4,), (5,))
    """

    targets: Targets
    _: dataclasses.KW_ONLY
    rank: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    seed: int = 0
    dtype: DTypeLike = jnp.float32
    exclude: Targets | None = None
    axes: Axes | None = None

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_probability("dropout", self.dropout)
        check_dtype(self.dtype)
        if not is_finite(self.d_initial):
            raise LoraError(f"d_initial={self.d_initial!r} is no finite number; 0.1 is usual.")

    def make(self, key: jax.Array, path: str, leaf: Any, axes: Axes | None) -> VeRAFactors:
        """Projections of uniform entries as in He et al. 2015, d constant, g zero."""
        axes = resolve_axes("VeRA", path, leaf, self.axes or axes)
        batch, contract, out = split_shape(leaf.shape, axes)
        key_a, key_b = jax.random.split(jax.random.key(self.seed))
        return VeRAFactors(
            d=jnp.full((*batch, self.rank), self.d_initial, self.dtype),
            g=jnp.zeros((*batch, *out), self.dtype),
            a=_projection(key_a, (*contract, self.rank), math.prod(contract), self.dtype),
            b=_projection(key_b, (self.rank, *out), self.rank, self.dtype),
            axes=axes,
            dropout=float(self.dropout),
        )


def _projection(key: jax.Array, shape: tuple[int, ...], fan_in: int, dtype: Any) -> jax.Array:
    bound = math.sqrt(6 / fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)
