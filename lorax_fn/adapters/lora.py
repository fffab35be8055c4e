"""LoRA: W + (alpha/rank)·A·B with W frozen (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lorax_fn.adapters.base import Adapter, Rule
from lorax_fn.adapters.initializers import INITIALIZERS, Initializer
from lorax_fn.axes import Axes
from lorax_fn.errors import AxesError, LoraError, StructureError, TargetError
from lorax_fn.interpreter import RANK, Factor, Term, Weight
from lorax_fn.targets import Targets


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRAFactors(Adapter):
    """The factors of one weight: ΔW = scale · Σ_r a[…, r] · b[r, …].

    Attributes:
        a: (batch dims…, contract dims…, r), in the weight's own dim order.
        b: (batch dims…, r, out dims…).
        scale: alpha/rank, or alpha/√rank with rsLoRA.
        axes: the roles of the weight's dims.
        dropout: the probability of dropping an input of A while `lora_key` is given.
    """

    kind: ClassVar[str] = "LoRA"

    a: Any
    b: Any
    scale: float = _static()
    axes: Axes = _static()
    dropout: float = _static()

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[-1]

    def check(self, path: str, leaf: Any) -> None:
        """Raises `StructureError` unless a and b have the shapes that the leaf's shape demands."""
        for name, array in (("the weight", leaf), ("a", self.a), ("b", self.b)):
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise StructureError(
                    f"at {path!r} {name} has dtype {array.dtype}; wanted a floating one. Were the "
                    "factors made for these params? Call lora.init on them again."
                )
        if leaf.ndim == self.axes.ndim:
            batch, contract, out = _split_shape(leaf.shape, self.axes)
            wanted = (*batch, *contract, self.rank), (*batch, self.rank, *out)
            if (self.a.shape, self.b.shape) == wanted:
                return
        raise StructureError(
            f"factors at {path!r} have a{list(self.a.shape)}, b{list(self.b.shape)} with "
            f"{self.axes}, which do not fit the weight's shape {list(leaf.shape)}. Were they made "
            "for these params? Call lora.init on them again."
        )

    def adapt(self, leaf: Any, path: str, key: jax.Array | None = None) -> Weight:
        """The symbolic sum of the leaf and the low-rank term."""
        return Weight(leaf, (self._term(leaf.shape, key),), (path,))

    def remove(self, merged: Any, path: str) -> jax.Array:
        """W = merged - ΔW, formed in float32 or wider."""
        term = self._term(merged.shape, None)
        term = dataclasses.replace(term, scale=-term.scale)
        return Weight(merged, (term,), (path,)).add_up()

    def trainable(self) -> LoRAFactors:
        """Both factors are trained."""
        return dataclasses.replace(self, a=True, b=True)

    def _term(self, shape: Sequence[int], key: jax.Array | None) -> Term:
        batch, contract, out = self.axes.batch, self.axes.contract, self.axes.out
        keys = None
        if key is not None and self.dropout > 0.0:
            keys = Factor(jax.random.split(key, tuple(shape[d] for d in batch)), batch)
        a = Factor(self.a, (*batch, *contract, RANK))
        b = Factor(self.b, (*batch, RANK, *out))
        return Term(a, b, keys, self.scale, self.dropout)


@dataclasses.dataclass(frozen=True)
class LoRA(Rule):
    """Rule: adapt the targeted weights with trainable low-rank factors.

    Args:
        targets: which leaves: a regex over the "/"-joined path, names, or a predicate
            (path, leaf) -> bool.
        rank: r, the number of columns of A; at most min(prod(contract), prod(out)) of a weight.
        alpha: the update is scaled by alpha/rank. None means alpha = rank.
        rslora: scale by alpha/√rank instead (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: probability of dropping an input of A; acts when `lora_key` is given to the
            wrapped function.
        init: how A starts: "kaiming", "gaussian", "orthogonal", or a function
            (key, (fan_in, rank), dtype) -> array. B starts at zero.
        dtype: the factors' dtype, whatever the weight's; float32 keeps half-precision bases stable.
        exclude: leaves to leave out, in any form that `targets` takes.
        axes: the roles of the dims of every targeted weight, where `init` is given no axes.

    Raises:
        LoraError: if rank, alpha, dropout, init or dtype are out of their range.

    >>> LoRA(r".*/(query|value)/kernel", rank=8, alpha=16).scale
    2.0
    """

    targets: Targets
    _: dataclasses.KW_ONLY
    rank: int = 8
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    init: str | Initializer = "kaiming"
    dtype: DTypeLike = jnp.float32
    exclude: Targets | None = None
    axes: Axes | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int | np.integer):
            raise LoraError(f"rank={self.rank!r} is no integer; wanted one of at least 1.")
        if self.rank < 1:
            raise LoraError(f"rank={self.rank} is below 1; wanted at least 1.")
        if self.alpha is not None and not _is_finite(self.alpha):
            raise LoraError(f"alpha={self.alpha!r} is no finite number; None means alpha = rank.")
        if not _is_finite(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise LoraError(f"dropout={self.dropout!r} is no probability in [0, 1).")
        if not callable(self.init) and self.init not in INITIALIZERS:
            raise LoraError(
                f"init={self.init!r} is unknown; wanted one of {sorted(INITIALIZERS)} or a "
                "function (key, shape, dtype) -> array."
            )
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise LoraError(f"dtype={self.dtype!r} is no floating dtype; float32 is the default.")

    @property
    def scale(self) -> float:
        """What A·B is multiplied by."""
        alpha = self.rank if self.alpha is None else self.alpha
        return float(alpha) / (math.sqrt(self.rank) if self.rslora else self.rank)

    def make(self, key: jax.Array, path: str, leaf: Any, axes: Axes | None) -> LoRAFactors:
        """Draws the factors of one weight: A by `init`, B zero."""
        axes = self._resolved_axes(path, leaf, axes)
        batch, contract, out = _split_shape(leaf.shape, axes)
        largest = min(math.prod(contract), math.prod(out))
        if self.rank > largest:
            raise LoraError(
                f"rank={self.rank} is above {largest}, the most that {path!r} of shape "
                f"{list(leaf.shape)} with {axes} can have. Lower the rank, or exclude the leaf."
            )
        return LoRAFactors(
            a=self._draw(key, batch, contract),
            b=jnp.zeros((*batch, self.rank, *out), self.dtype),
            scale=self.scale,
            axes=axes,
            dropout=float(self.dropout),
        )

    def _draw(self, key: jax.Array, batch: Sequence[int], contract: Sequence[int]) -> jax.Array:
        """A of shape (batch…, contract…, r), every batch index drawn on its own."""
        draw = self.init if callable(self.init) else INITIALIZERS[self.init]
        shape = (math.prod(contract), self.rank)
        if batch:
            keys = jax.random.split(key, math.prod(batch))
            drawn = jax.vmap(lambda k: draw(k, shape, self.dtype))(keys)
        else:
            drawn = draw(key, shape, self.dtype)
        return drawn.reshape(*batch, *contract, self.rank)

    def _resolved_axes(self, path: str, leaf: Any, axes: Axes | None) -> Axes:
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating) or not jnp.issubdtype(
            leaf.dtype, jnp.floating
        ):
            raise TargetError(
                f"{path!r} has dtype {leaf.dtype}; LoRA adapts real floating weights. "
                "Exclude the leaf."
            )
        if leaf.ndim < 2:
            raise TargetError(
                f"{path!r} has shape {list(leaf.shape)}; LoRA needs at least two dims to factor. "
                "Exclude the leaf, or train it whole with lora.Full."
            )
        axes = self.axes or axes or (Axes(contract=(0,), out=(1,)) if leaf.ndim == 2 else None)
        if axes is None:
            raise AxesError(
                f"the axes of {path!r}, shape {list(leaf.shape)}, are unknown. Call "
                "axes = lora.infer_axes(apply_fn, params, *args) and pass axes=axes to lora.init "
                "(if it finds no contraction of this leaf, exclude it), or give the rule axes=."
            )
        if axes.ndim != leaf.ndim or not axes.contract or not axes.out:
            raise AxesError(
                f"{axes} do not fit {path!r} of shape {list(leaf.shape)}; wanted {leaf.ndim} dims "
                "with at least one to contract and one out."
            )
        return axes


def _split_shape(shape: Sequence[int], axes: Axes) -> list[tuple[int, ...]]:
    """The lengths of the batch, contract and out dims."""
    return [tuple(shape[d] for d in dims) for dims in (axes.batch, axes.contract, axes.out)]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value)
