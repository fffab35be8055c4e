"""What the low-rank kinds share: the roles of a leaf's dims, shapes that fit, and drawing A."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.adapters.base import Adapter
from lorax_fn.adapters.initializers import INITIALIZERS, Initializer
from lorax_fn.axes import Axes
from lorax_fn.errors import AxesError, LoraError, StructureError, TargetError
from lorax_fn.interpreter import Factor, Weight

Dims = tuple[int, ...]


class SummedAdapter(Adapter):
    """A node whose weight is W + Σ terms: it says which terms, and has `adapt` and `remove`."""

    axes: Any

    @abc.abstractmethod
    def terms(self, shape: Sequence[int], key: jax.Array | None) -> tuple[Any, ...]:
        """The summands for a leaf of this shape; `key` turns dropout on."""

    def adapt(self, leaf: Any, path: str, key: jax.Array | None = None) -> Weight:
        """The symbolic sum of the leaf and the terms."""
        return Weight(leaf, self.terms(leaf.shape, key), (path,))

    def remove(self, merged: Any, path: str) -> jax.Array:
        """W = merged - Σ terms, formed in float32 or wider."""
        terms = self.terms(merged.shape, None)
        negated = tuple(dataclasses.replace(term, scale=-term.scale) for term in terms)
        return Weight(merged, negated, (path,)).add_up()


def dropout_keys(
    axes: Axes, shape: Sequence[int], key: jax.Array | None, dropout: float
) -> Factor | None:
    """A key for each layer and expert of a weight, or None where dropout is off."""
    if key is None or dropout == 0.0:
        return None
    return Factor(jax.random.split(key, tuple(shape[d] for d in axes.batch)), axes.batch)


def alpha_over_rank(alpha: float | None, rank: int) -> float:
    """What an update is scaled by; alpha is the rank where it is None."""
    return float(rank if alpha is None else alpha) / float(rank)


def resolve_axes(kind: str, path: str, leaf: Any, axes: Axes | None) -> Axes:
    """The roles of a leaf's dims; those of a matrix are (contract, out) where nothing is given.

    Raises:
        TargetError: if the leaf is no floating array of at least two dims.
        AxesError: if its axes are unknown or do not fit.
    """
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TargetError(
            f"{path!r} has dtype {leaf.dtype}; {kind} adapts real floating weights. "
            "Exclude the leaf."
        )
    if leaf.ndim < 2:
        raise TargetError(
            f"{path!r} has shape {list(leaf.shape)}; {kind} needs at least two dims to factor. "
            "Exclude the leaf, or train it whole with lora.Full."
        )
    if not isinstance(axes, Axes | None):
        raise AxesError(
            f"axes={axes!r}: wanted lora.Axes, such as lora.Axes(contract=(0,), out=(1,))."
        )
    axes = axes or (Axes(contract=(0,), out=(1,)) if leaf.ndim == 2 else None)
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


def split_shape(shape: Sequence[int], axes: Axes) -> tuple[Dims, Dims, Dims]:
    """The lengths of the batch, contract and out dims; none of a dim that shape does not have."""
    batch, contract, out = (
        tuple(shape[d] for d in dims if d < len(shape))
        for dims in (axes.batch, axes.contract, axes.out)
    )
    return batch, contract, out


def sum_over_contract(array: jax.Array, axes: Axes) -> jax.Array:
    """The sum over the contracted dims: (batch dims…, out dims…)."""
    kept = (*axes.batch, *axes.out)
    return jnp.transpose(array.sum(axes.contract), [sorted(kept).index(d) for d in kept])


def draw(
    init: str | Initializer,
    key: jax.Array,
    batch: Sequence[int],
    fan_in: Sequence[int],
    rank: int,
    dtype: Any,
) -> jax.Array:
    """A factor of shape (batch…, fan_in…, rank), every batch index drawn on its own."""
    function = init if callable(init) else INITIALIZERS[init]
    shape = (math.prod(fan_in), rank)
    if batch:
        keys = jax.random.split(key, math.prod(batch))
        drawn = jax.vmap(lambda k: function(k, shape, dtype))(keys)
    else:
        drawn = function(key, shape, dtype)
    if drawn.shape != ((math.prod(batch),) if batch else ()) + shape:
        raise LoraError(
            f"init={init!r} drew an array of shape {list(drawn.shape)} for "
            f"{[math.prod(batch)] if batch else []} + {list(shape)}; wanted a function "
            "(key, shape, dtype) -> array of that shape."
        )
    return drawn.reshape(*batch, *fan_in, rank)


def check_fits(path: str, leaf: Any, axes: Axes, parts: dict[str, tuple[Any, Dims]]) -> None:
    """Raises `StructureError` unless every part, (array, wanted shape), is floating and fits.

    Wanted shapes are computed from the leaf's, so the leaf must have as many dims as `axes`.
    """
    arrays = {"the weight": leaf} | {name: array for name, (array, _) in parts.items()}
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise StructureError(
                f"at {path!r} {name} has dtype {array.dtype}; wanted a floating one. Were the "
                "factors made for these params? Call lora.init on them again."
            )
    fits = all(tuple(array.shape) == tuple(wanted) for array, wanted in parts.values())
    if leaf.ndim != axes.ndim or not fits:
        got = ", ".join(f"{name}{list(array.shape)}" for name, (array, _) in parts.items())
        raise StructureError(
            f"factors at {path!r} have {got} with {axes}, which do not fit the weight's shape "
            f"{list(leaf.shape)}. Were they made for these params? Call lora.init on them again; "
            "of stacked factors, lora.take one."
        )


def check_abstract(path: str, key: jax.Array) -> None:
    """Raises `LoraError` if values are to be computed from those of an abstract leaf."""
    if not isinstance(key, jax.core.Tracer):
        raise LoraError(
            f"{path!r} is abstract, and its factors start from its values; wanted an array, or all "
            "of lora.init under jax.eval_shape."
        )


def check_positive(name: str, scale: float) -> None:
    """Raises `LoraError` unless the scale is one that a start of its own can be divided by."""
    if scale <= 0:
        raise LoraError(
            f"alpha makes the scale {scale}, and init={name!r} divides by it; wanted alpha above 0."
        )


def check_largest_rank(path: str, leaf: Any, axes: Axes, rank: int) -> None:
    """min(prod(contract), prod(out)) is the most that a weight can have.

    Raises:
        LoraError: if rank is above it.
    """
    _, contract, out = split_shape(leaf.shape, axes)
    largest = min(math.prod(contract), math.prod(out))
    if rank > largest:
        raise LoraError(
            f"rank={rank} is above {largest}, the most that {path!r} of shape "
            f"{list(leaf.shape)} with {axes} can have. Lower the rank, or exclude the leaf."
        )


def check_rank(rank: Any) -> None:
    """Raises `LoraError` unless rank is a positive integer."""
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer):
        raise LoraError(f"rank={rank!r} is no integer; wanted one of at least 1.")
    if rank < 1:
        raise LoraError(f"rank={rank} is below 1; wanted at least 1.")


def check_count(name: str, value: Any) -> None:
    """Raises `LoraError` unless the value is an integer."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise LoraError(f"{name}={value!r}; wanted an integer.")


def check_alpha(alpha: Any) -> None:
    """Raises `LoraError` unless alpha is None or a finite number."""
    if alpha is not None and not is_finite(alpha):
        raise LoraError(f"alpha={alpha!r} is no finite number; None means alpha = rank.")


def check_probability(name: str, value: Any) -> None:
    """Raises `LoraError` unless the value is in [0, 1)."""
    if not is_finite(value) or not 0.0 <= value < 1.0:
        raise LoraError(f"{name}={value!r} is no probability in [0, 1).")


def check_dtype(dtype: Any) -> None:
    """Raises `LoraError` unless dtype is a floating one."""
    try:
        floating = jnp.issubdtype(dtype, jnp.floating)
    except TypeError:  # no dtype at all
        floating = False
    if not floating:
        raise LoraError(f"dtype={dtype!r} is no floating dtype; float32 is the default.")


def is_finite(value: Any) -> bool:
    """Whether the value is a finite Python or numpy number."""
    return isinstance(value, int | float | np.number) and math.isfinite(value)
