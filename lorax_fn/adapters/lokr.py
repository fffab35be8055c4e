"""LoKr: the Kronecker product of a small and a larger matrix (arXiv:2309.14859).

    ΔW = s · L ⊗ R,   R whole or R = A·B

Each contracted and each output dim of length n is split into l·r with l ≤ r as near as can be.
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

from lorax_fn.adapters.base import PART, Rule, static
from lorax_fn.adapters.initializers import kaiming
from lorax_fn.adapters.low_rank import (
    SummedAdapter,
    alpha_over_rank,
    check_alpha,
    check_dtype,
    check_fits,
    check_rank,
    draw,
    resolve_axes,
    split_shape,
)
from lorax_fn.axes import Axes
from lorax_fn.errors import LoraError
from lorax_fn.interpreter import RANK, Factor, KroneckerTerm, labelled_dot, wide_dtype
from lorax_fn.targets import Targets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoKrFactors(SummedAdapter):
    """The factors of one weight; lengths are those of each dim's left and right part.

    Attributes:
        left: (batch dims…, contract dims' left…, out dims' left…); starts at zero.
        right: (batch dims…, contract dims' right…, out dims' right…), or None.
        a: (batch dims…, contract dims' right…, r), in place of `right`.
        b: (batch dims…, r, out dims' right…).
        scale: alpha/rank.
        axes: the roles of the weight's dims.
    """

    kind: ClassVar[str] = "LoKr"

    left: Any
    right: Any
    a: Any
    b: Any
    scale: float = static()
    axes: Axes = static()

    @property
    def rank(self) -> int | None:
        """r, or None where `right` is whole."""
        return None if self.a is None else self.a.shape[-1]

    def check(self, path: str, leaf: Any) -> None:
        """Raises `StructureError` unless the parts' lengths multiply to the leaf's."""
        batch, contract, out = split_shape(leaf.shape, self.axes)
        lengths = self.left.shape[len(batch) :]
        if len(lengths) != len((*contract, *out)):
            lengths = (*contract, *out)
        pairs = zip((*contract, *out), lengths, strict=True)
        rest = tuple(n // left if left and n % left == 0 else 0 for n, left in pairs)
        right_in, right_out = rest[: len(contract)], rest[len(contract) :]
        parts = {"left": (self.left, (*batch, *lengths))}
        if self.right is not None:
            parts["right"] = (self.right, (*batch, *right_in, *right_out))
        else:
            parts["a"] = (self.a, (*batch, *right_in, self.rank))
            parts["b"] = (self.b, (*batch, self.rank, *right_out))
        check_fits(path, leaf, self.axes, parts)

    def dims(self) -> LoKrFactors:
        """The batch dims, and parts of the others."""
        batch = self.axes.batch
        contract, out = [PART] * len(self.axes.contract), [PART] * len(self.axes.out)
        whole = (*batch, *contract, *out)
        if self.right is not None:
            return dataclasses.replace(self, left=whole, right=whole)
        a, b = (*batch, *contract, None), (*batch, None, *out)
        return dataclasses.replace(self, left=whole, a=a, b=b)

    def unscaled(self) -> LoKrFactors:
        """With s·L for L."""
        return dataclasses.replace(self, left=self.scale * self.left, scale=1.0)

    def trainable(self) -> LoKrFactors:
        """All factors are trained."""
        return jax.tree.map(lambda _: True, self)

    def terms(self, shape: Sequence[int], key: jax.Array | None) -> tuple[KroneckerTerm, ...]:
        """One Kronecker term."""
        batch, contract, out = self.axes.batch, self.axes.contract, self.axes.out
        dims = (*batch, *contract, *out)
        if self.right is not None:
            right = Factor(self.right, dims)
        else:  # no larger than the right part: it is multiplied out
            a, b = Factor(self.a, (*batch, *contract, RANK)), Factor(self.b, (*batch, RANK, *out))
            a, b = a.astype(wide_dtype(self.a.dtype)), b.astype(wide_dtype(self.b.dtype))
            right = labelled_dot(a, b, dims, precision=lax.Precision.HIGHEST)
        return (KroneckerTerm(Factor(self.left, dims), right, self.scale),)


@dataclasses.dataclass(frozen=True)
class LoKr(Rule):
    """Rule: the Kronecker product of a small matrix and a larger, low-rank one.

    Yeh et al. 2023, arXiv:2309.14859 (LyCORIS). Stays factored where a matmul consumes the weight;
    elsewhere the weight is added up.

    Args:
        targets: which leaves, in any form that `LoRA` takes.
        rank: r of the larger matrix, which is left whole where r would be half its size or more.
        alpha: the update is scaled by alpha/rank. None means alpha = rank.
        factor: the largest length of a dim's left part; -1 splits each dim as evenly as it can be.
        dtype: the factors' dtype.
        exclude: leaves to leave out.
        axes: the roles of the dims of every targeted weight, in place of what `init` is given.

    Raises:
        LoraError: if rank, alpha, factor or dtype are out of their range.

    >>> import jax, jax.numpy as jnp, lorax_fn as lora
    >>> rules = [lora.LoKr("w", rank=2, alpha=4)]
    >>> node = lora.init(jax.random.key(0), {"w": jnp.ones((64, 32))}, rules)["w"]
    >>> node.left.shape, node.a.shape, node.b.shape  # 64 = 8·8, 32 = 4·8
    ((8, 4), (8, 2), (2, 8))
    """

    targets: Targets
    _: dataclasses.KW_ONLY
    rank: int = 8
    alpha: float | None = None
    factor: int = -1
    dtype: DTypeLike = jnp.float32
    exclude: Targets | None = None
    axes: Axes | None = None

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_alpha(self.alpha)
        check_dtype(self.dtype)
        if self.factor != -1 and (not isinstance(self.factor, int) or self.factor < 1):
            raise LoraError(f"factor={self.factor!r}: wanted a length of at least 1, or -1.")

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return alpha_over_rank(self.alpha, self.rank)

    def make(self, key: jax.Array, path: str, leaf: Any, axes: Axes | None) -> LoKrFactors:
        """The right part drawn, the left one zero."""
        axes = resolve_axes("LoKr", path, leaf, self.axes or axes)
        batch, contract, out = split_shape(leaf.shape, axes)
        left_in, right_in = zip(*(even_split(n, self.factor) for n in contract), strict=True)
        left_out, right_out = zip(*(even_split(n, self.factor) for n in out), strict=True)
        left = jnp.zeros((*batch, *left_in, *left_out), self.dtype)
        key_a, key_b = jax.random.split(key)
        if 2 * self.rank >= max(math.prod(right_in), math.prod(right_out)):
            drawn = draw(kaiming, key_a, batch, right_in, math.prod(right_out), self.dtype)
            right, a, b = drawn.reshape(*batch, *right_in, *right_out), None, None
        else:
            a = draw(kaiming, key_a, batch, right_in, self.rank, self.dtype)
            drawn = draw(kaiming, key_b, batch, [self.rank], math.prod(right_out), self.dtype)
            right, b = None, drawn.reshape(*batch, self.rank, *right_out)
        return LoKrFactors(left, right, a, b, self.scale, axes)


def even_split(length: int, factor: int = -1) -> tuple[int, int]:
    """(l, r) with l·r = length and l ≤ r, l the largest that is at most `factor` if that is given.

    A `factor` that divides the length is taken as it is.

    >>> even_split(128), even_split(250), even_split(360), even_split(512, 4)
    ((8, 16), (10, 25), (18, 20), (4, 128))
    """
    if factor > 0 and length % factor == 0:
        return factor, length // factor
    largest = math.isqrt(length) if factor == -1 else min(math.isqrt(length), factor)
    left = max(n for n in range(1, max(largest, 1) + 1) if length % n == 0)
    return left, length // left
