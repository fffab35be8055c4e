"""LoRA: W + (alpha/rank)·A·B with W frozen (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lorax_fn.adapters.base import Rule, static
from lorax_fn.adapters.initializers import INITIALIZERS, Initializer
from lorax_fn.adapters.low_rank import (
    SummedAdapter,
    check_alpha,
    check_dtype,
    check_fits,
    check_largest_rank,
    check_positive,
    check_probability,
    check_rank,
    draw,
    dropout_keys,
    resolve_axes,
    split_shape,
)
from lorax_fn.adapters.probes import PROBES, Probe, Start
from lorax_fn.adapters.spectral import SPECTRAL, start_from
from lorax_fn.axes import Axes
from lorax_fn.errors import LoraError
from lorax_fn.interpreter import RANK, Factor, Term
from lorax_fn.targets import Targets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRAFactors(SummedAdapter):
    """The factors of one weight: ΔW = scale · Σ_r a[…, r] · b[r, …].

    Attributes:
        a: (batch dims…, contract dims…, r), in the weight's own dim order.
        b: (batch dims…, r, out dims…).
        scale: alpha/rank, or alpha/√rank with rsLoRA.
        axes: the roles of the weight's dims.
        dropout: the probability of dropping an input of A while `lora_key` is given.
        freeze_a: whether b alone is trained (LoRA-FA).
        start: frozen (a, b) that are taken off the weight, so that factors which do not start at
            zero (PiSSA, OLoRA, …) start at the base model all the same; or None.
    """

    kind: ClassVar[str] = "LoRA"

    a: Any
    b: Any
    scale: float = static()
    axes: Axes = static()
    dropout: float = static()
    freeze_a: bool = static(False)
    start: tuple[Any, Any] | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[-1]

    def check(self, path: str, leaf: Any) -> None:
        """Raises `StructureError` unless a and b have the shapes that the leaf's shape demands."""
        batch, contract, out = split_shape(leaf.shape, self.axes)
        wanted = {"a": (*batch, *contract, self.rank), "b": (*batch, self.rank, *out)}
        parts = {"a": (self.a, wanted["a"]), "b": (self.b, wanted["b"])}
        if self.start is not None:
            parts |= {f"start {name}": (array, wanted[name])
                      for name, array in zip("ab", self.start, strict=True)}  # fmt: skip
        check_fits(path, leaf, self.axes, parts)

    def dims(self) -> Self:
        """A spans the batch and contract dims, B the batch and out dims."""
        a = (*self.axes.batch, *self.axes.contract, None)
        b = (*self.axes.batch, None, *self.axes.out)
        return dataclasses.replace(self, a=a, b=b, start=None if self.start is None else (a, b))

    def trainable(self) -> LoRAFactors:
        """Both factors are trained, or b alone; what was taken off the weight is not."""
        start = None if self.start is None else (False, False)
        return dataclasses.replace(self, a=not self.freeze_a, b=True, start=start)

    def terms(self, shape: Sequence[int], key: jax.Array | None) -> tuple[Term, ...]:
        """s·A·B, and what is taken off the weight."""
        keys = dropout_keys(self.axes, shape, key, self.dropout)
        a = lax.stop_gradient(self.a) if self.freeze_a else self.a
        term = Term(self._a(a), self._b(self.b), keys, self.scale, self.dropout)
        if self.start is None:
            return (term,)
        start_a, start_b = map(lax.stop_gradient, self.start)
        return term, Term(self._a(start_a), self._b(start_b), None, -self.scale, 0.0)

    def unscaled(self) -> Self:
        """With s·B for B."""
        start = None if self.start is None else (self.start[0], self.scale * self.start[1])
        return dataclasses.replace(self, b=self.scale * self.b, start=start, scale=1.0)

    def plain(self) -> Self:
        """The same change without a `start`: factors of rank 2r, [A, A₀] and [B, -B₀].

        What other libraries and files can hold; to be served, not trained on.
        """
        if self.start is None:
            return self
        start_a, start_b = self.start
        a = jnp.concatenate([self.a, start_a], -1)
        b = jnp.concatenate([self.b, -start_b], len(self.axes.batch))
        return dataclasses.replace(self, a=a, b=b, start=None)

    def _a(self, array: Any) -> Factor:
        return Factor(array, (*self.axes.batch, *self.axes.contract, RANK))

    def _b(self, array: Any) -> Factor:
        return Factor(array, (*self.axes.batch, RANK, *self.axes.out))


@dataclasses.dataclass(frozen=True)
class LoRA(Rule):
    """Rule: adapt the targeted weights with trainable low-rank factors.

    Args:
        targets: which leaves. A regex has to match the whole "/"-joined path; a list of names,
            each one or more whole components of it ("query", "attn/query"), picks matrices and
            never biases or norms' scales; a function (path, leaf) -> bool decides for itself.
        rank: r, the number of columns of A; at most min(prod(contract), prod(out)) of a weight.
        alpha: the update is scaled by alpha/rank. None means alpha = rank.
        rslora: scale by alpha/√rank instead (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: probability of dropping an input of A; acts when `lora_key` is given to the
            wrapped function.
        init: how the factors start. "kaiming", "gaussian", "orthogonal" or a function
            (key, (fan_in, rank), dtype) -> array draw A, and B starts at zero. "pissa",
            "pissa_niter_4" (any number of iterations) and "olora" take both from W itself. "eva"
            takes A from W's inputs, "corda", "corda_kpm" and "lora_ga" take both from W's inputs or
            gradients: `lorax_fn.init` is then given a function and batches. Where B does not start
            at zero, s·A·B of the start is taken off again, by a frozen product in the adapter: your
            params stay as they are. Weight decay then pulls towards W less that product, not
            towards W. "loftq" alone keeps s·A·B, for what quantising takes off W: `lorax_fn.loftq`
            makes the factors, and the base.
        dtype: the factors' dtype, whatever the weight's; float32 keeps half-precision bases stable.
        freeze_a: train B alone (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303).
        exclude: leaves to leave out, in any form that `targets` takes.
        axes: the roles of the dims of every targeted weight, in place of what `init` is given.

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
    init: str | Initializer | Start = "kaiming"
    dtype: DTypeLike = jnp.float32
    freeze_a: bool = False
    exclude: Targets | None = None
    axes: Axes | None = None

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_alpha(self.alpha)
        check_probability("dropout", self.dropout)
        known = isinstance(self.init, str) and (
            self.init in (*INITIALIZERS, *PROBES, "loftq") or SPECTRAL.fullmatch(self.init)
        )
        if not known and not callable(self.init) and not isinstance(self.init, Start):
            names = sorted([*INITIALIZERS, *PROBES, "loftq", "olora", "pissa", "pissa_niter_4"])
            raise LoraError(
                f"init={self.init!r} is unknown; wanted one of {names} or a "
                "function (key, shape, dtype) -> array."
            )
        check_dtype(self.dtype)
        if known and self.init not in INITIALIZERS:
            check_positive(str(self.init), self.scale)

    @property
    def scale(self) -> float:
        """What A·B is multiplied by."""
        alpha = self.rank if self.alpha is None else self.alpha
        return float(alpha) / (math.sqrt(self.rank) if self.rslora else float(self.rank))

    def probe(self, key: jax.Array, path: str, leaf: Any, axes: Axes | None) -> Probe | None:
        """What is to be shown batches before `make`, where the factors start from data."""
        kind = PROBES.get(self.init) if isinstance(self.init, str) else None
        if kind is None:
            return None
        axes = self.roles(path, leaf, axes)
        _, contract, out = map(math.prod, split_shape(leaf.shape, axes))
        largest = kind.largest_rank(contract, out)
        if self.rank > largest:
            raise LoraError(
                f"rank={self.rank} is above {largest}, the most that init={self.init!r} can give "
                f"{path!r} of shape {list(leaf.shape)}. Lower the rank, or choose another init."
            )
        return kind.of(key, leaf, axes, self.rank)

    def make(self, key: jax.Array, path: str, leaf: Any, axes: Axes | None) -> LoRAFactors:
        """The factors of one weight: A drawn and B zero, or both from the weight or from data."""
        axes = self.roles(path, leaf, axes)
        a, b = self._start(key, path, leaf, axes)
        # Copies: a training step that donates its factors may not donate an array twice.
        kept = isinstance(self.init, Start) and not self.init.taken_off
        start = None if b is None or kept else (jnp.copy(a), jnp.copy(b))
        if b is None:
            batch, _, out = split_shape(leaf.shape, axes)
            b = jnp.zeros((*batch, self.rank, *out), self.dtype)
        return LoRAFactors(a, b, self.scale, axes, float(self.dropout), self.freeze_a, start)

    def roles(self, path: str, leaf: Any, axes: Axes | None) -> Axes:
        """The roles of a weight's dims: the rule's own, or those that are given.

        Raises:
            TargetError, AxesError: as `make`.
            LoraError: if the rank is above what the weight can have.
        """
        axes = resolve_axes(type(self).__name__, path, leaf, self.axes or axes)
        check_largest_rank(path, leaf, axes, self.rank)
        return axes

    def _start(self, key: jax.Array, path: str, leaf: Any, axes: Axes) -> tuple[Any, Any | None]:
        """(a, b), b None where it is zero."""
        if isinstance(self.init, Start):
            return jax.tree.map(lambda array: array.astype(self.dtype), (self.init.a, self.init.b))
        if isinstance(self.init, str) and self.init in PROBES:
            name = "loss_fn" if PROBES[self.init].needs_loss else "apply_fn"
            raise LoraError(
                f"init={self.init!r} looks at data; wanted lora.init(key, params, rules, "
                f"apply_fn={name}, batches=[(x,), …]), which calls {name}(params, *batch)."
            )
        if self.init == "loftq":
            raise LoraError(
                "init='loftq' finds the quantised base together with the factors; wanted base, "
                "factors = lora.loftq(key, params, rules, axes=axes), of floating params."
            )
        if isinstance(self.init, str) and SPECTRAL.fullmatch(self.init):
            options: dict[str, Any] = {"rank": self.rank, "scale": self.scale, "dtype": self.dtype}
            return start_from(self.init, key, path, leaf, axes, **options)
        batch, contract, _ = split_shape(leaf.shape, axes)
        return draw(self.init, key, batch, contract, self.rank, self.dtype), None
