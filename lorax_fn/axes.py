"""How a function uses each weight: which dims it contracts, which it outputs, which are a batch.

A low-rank change of a weight factors between its contract and its out dims, once for each index of
its batch dims (layers of a scanned stack, experts). `infer_axes` reads all three off the function.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax

from lorax_fn.axes_flow import Analysis, Kind, Use, Value, leaf_value
from lorax_fn.axes_rules import rule_for
from lorax_fn.errors import AxesError
from lorax_fn.leaves import flatten
from lorax_fn.tracing import is_array, trace

Pytree = Any


@dataclass(frozen=True)
class Axes:
    """The roles of a weight's dims; each dim has exactly one.

    Static and hashable, and a leaf to `jax.tree`. Factors of rank r have the shapes
    a: (batch dims, contract dims, r) and b: (batch dims, r, out dims).

    Attributes:
        batch: dims that index independent weights, such as layers or experts.
        contract: dims that the function sums over.
        out: dims that the function's result keeps.

    Raises:
        AxesError: if a dim is no integer, stands twice, or one between 0 and the last is missing.

    >>> Axes(contract=(0,), out=(1, 2))
    Axes(batch=(), contract=(0,), out=(1, 2))
    """

    batch: tuple[int, ...] = ()
    contract: tuple[int, ...] = ()
    out: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for role in ("batch", "contract", "out"):
            object.__setattr__(self, role, _dims(role, getattr(self, role)))
        dims = (*self.batch, *self.contract, *self.out)
        if sorted(dims) != list(range(len(dims))):
            raise AxesError(
                f"got batch={self.batch}, contract={self.contract}, out={self.out}; wanted each of "
                "the weight's dims, counted from 0, in exactly one of the three."
            )

    @property
    def ndim(self) -> int:
        """The number of dims of the weight."""
        return len(self.batch) + len(self.contract) + len(self.out)


def infer_axes(
    apply_fn: Callable[..., Any], params: Pytree, /, *args: Any, **kwargs: Any
) -> Pytree:
    """Returns a pytree parallel to `params` of `Axes`, or `None` where nothing contracts the leaf.

    `apply_fn(params, *args, **kwargs)` is traced once and never computed, so arrays may be
    `jax.ShapeDtypeStruct`s of any size; leaves that are no arrays are static. A lookup `E[ids]` of
    rows contracts dim 0 of `E`, as its one-hot form would. A weight used twice, such as an
    embedding tied to the output head, gets the split of the lookup, or else of the first use.

    An out dim in front of the contract dims that also indexes the weights of a later contraction
    (experts whose first matmul shares one input) is a batch dim: only that tells it from heads.

    >>> import jax.numpy as jnp
    >>> def apply(params, x):
    ...     x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])
    ...     return x + params["b"]
    >>> f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    >>> infer_axes(apply, {"stack": f32(12, 4096, 4096), "b": f32(4096)}, f32(8, 4096))
    {'b': None, 'stack': Axes(batch=(0,), contract=(1,), out=(2,))}
    """
    traced = trace(apply_fn, params, args, kwargs)
    shapes = [leaf.shape for leaf in traced.param_leaves]
    analysis = Analysis(shapes, rule_for)
    weights = [leaf_value(i, len(shape)) for i, shape in enumerate(shapes)]
    data = [Value(_kind_of_argument(leaf)) for leaf in traced.arg_leaves]
    analysis.run(traced.jaxpr, [*weights, *data])

    leaves, treedef = flatten(params)
    axes: list[Axes | None] = [None] * len(leaves)
    for i, slot in enumerate(traced.param_slots):
        uses = [use for use in analysis.uses if use.leaf == i]
        shared = {dim for leaf, dim in analysis.shared if leaf == i}
        axes[slot] = _settle(uses, shared, len(shapes[i]))
    return jax.tree.unflatten(treedef, axes)


def _settle(uses: list[Use], shared: set[int], ndim: int) -> Axes | None:
    """One split for all uses: a lookup decides, then a use on data, then one on other weights."""
    if not uses:
        return None
    use = min(uses, key=lambda use: use.rank)  # `min` takes the first of equals
    batch = use.batch | (use.leading & shared)
    out = use.out - batch
    for dim in range(ndim):
        if dim not in use.contract | batch and dim - 1 in out:
            out |= frozenset([dim])  # of size 1, squeezed away before the use
    batch = frozenset(range(ndim)) - use.contract - out  # the rest
    return Axes(*(tuple(sorted(dims)) for dims in (batch, use.contract, out)))


def _kind_of_argument(leaf: Any) -> Kind:
    """A random key yields masks and noise, which leave a weight a weight."""
    is_key = is_array(leaf) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return Kind.CONST if is_key else Kind.DATA


def _dims(role: str, dims: Iterable[Any]) -> tuple[int, ...]:
    try:
        return tuple(operator.index(dim) for dim in dims)
    except TypeError as e:
        raise AxesError(
            f"got {role}={dims!r}; wanted a tuple of the weight's dims, such as {role}=(0,)."
        ) from e
