"""Frozen bases that stay quantised until an operation consumes them.

A `Weight`'s base may be `Lazy`: a quantised array, or what shape operations, casts and cuts have
made of it, which are noted and not done. A contraction does them and dequantises, and so does its
backward pass, which needs the weight again: what is kept for it is the codes.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lorax_fn.interpreter import compat
from lorax_fn.interpreter.codes import ON_CODES, Codes
from lorax_fn.interpreter.explicit import parts_of
from lorax_fn.interpreter.frozen_dot import frozen_dot
from lorax_fn.interpreter.kronecker import NotFactoredError


class Lazy(abc.ABC):
    """A floating array that is not there yet; like an array in its shape, dtype and `astype`."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def ndim(self) -> int:
        """The number of dims."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    def astype(self, dtype: Any) -> jax.Array:
        """The array itself, dequantised here and now."""
        return computed(self).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized(Lazy):
    """A `qwix.QArray`."""

    array: Any

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The shape of the floating array."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the floating array."""
        return self.array.dtype


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """An operation that waits; two are the same if they are one object.

    Attributes:
        compute: from arrays to the list of results.
        on_codes: from `Codes` and arrays to the list of results, or to `NotImplemented`.
    """

    compute: Callable[..., list[Any]]
    on_codes: Callable[..., Any] | None = None

    @classmethod
    def of(cls, eqn: Any) -> Step:
        """The operation of an equation."""

        def compute(*operands: Any) -> list[Any]:
            with eqn.ctx.manager:  # long after the interpreter has left the equation
                results = compat.bind(eqn, operands)
            return list(results) if eqn.primitive.multiple_results else [results]

        rule = ON_CODES.get(eqn.primitive)
        return cls(compute, rule and functools.partial(rule, eqn))

    def __call__(self, operands: Sequence[Any], ready: Any) -> list[Any]:
        """The results: `Codes` where they are still codes."""
        first, *rest = operands
        if self.on_codes and isinstance(first, Codes) and not any(map(_is_codes, rest)):
            results = self.on_codes(first, *rest)
            if results is not NotImplemented:
                return list(results)
        return self.compute(*[_dense(operand, ready) for operand in operands])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Deferred(Lazy):
    """Result `index` of a step that waits; of its operands at least one is lazy."""

    operands: tuple[Any, ...]
    step: Step = dataclasses.field(metadata={"static": True})
    index: int = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})


def carried(eqn: Any, operands: Sequence[Any]) -> Any:
    """Evaluates an equation, or notes it for later if an operand is lazy."""
    if not any(isinstance(operand, Lazy) for operand in operands):
        return compat.bind(eqn, operands)
    step = Step.of(eqn)
    results = [
        Deferred(tuple(operands), step, index, var.aval.shape, var.aval.dtype)
        for index, var in enumerate(eqn.outvars)
    ]
    return results if eqn.primitive.multiple_results else results[0]


def consumed(eqn: Any, operands: Sequence[Any], at: int) -> Any:
    """Evaluates a contraction of operand `at` with other, frozen operands, lazy ones too."""
    if not any(isinstance(operand, Lazy) for operand in operands):
        return compat.bind(eqn, operands)
    contract, constants = product_with(eqn, operands, at)
    return frozen_dot(contract, operands[at], constants)


def product_with(
    eqn: Any, operands: Sequence[Any], at: int
) -> tuple[Callable[..., Any], list[Any]]:
    """A contraction as `frozen_dot` wants it: (contract(ready, x, *constants), the constants).

    x is operand `at`, the constants are the arrays in the others. Of those the first is the weight:
    `contract` takes a function `scale` to apply to it.
    """
    constants, treedef = jax.tree.flatten([*operands[:at], *operands[at + 1 :]])

    def contract(ready: Any, x: Any, *constants: Any, scale: Any = None) -> Any:
        others = [computed(value, ready) for value in jax.tree.unflatten(treedef, constants)]
        if scale is not None:
            others[0] = scale(others[0])
        return compat.bind(eqn, [*others[:at], x, *others[at:]])

    return contract, constants


def recomputed(eqn: Any, operands: Sequence[Any]) -> Any:
    """Evaluates any equation, whose backward pass computes lazy operands again."""
    if not any(isinstance(operand, Lazy) for operand in operands):
        return compat.bind(eqn, operands)
    arrays, treedef = jax.tree.flatten(list(operands))

    @jax.checkpoint
    def compute(*arrays: Any) -> Any:
        return compat.bind(eqn, list(map(computed, jax.tree.unflatten(treedef, arrays))))

    return compute(*arrays)


def computed(value: Any, ready: Any = None) -> Any:
    """A value with nothing waiting: the floating array, made once `ready` is there."""
    return _dense(_cut(value, ready), ready)


def constrained(base: Any, sharding: Any) -> Any:
    """The base laid out by a sharding, once it is there."""
    if not isinstance(base, Lazy):
        return lax.with_sharding_constraint(base, sharding)
    step = Step(lambda x: [lax.with_sharding_constraint(x, sharding)])
    return Deferred((base,), step, 0, base.shape, base.dtype)


def picked(base: Lazy, index: Any) -> Lazy:
    """Entry `index` along the first dim."""
    return Deferred((base, index), _PICK, 0, base.shape[1:], base.dtype)


def check_picks(base: Any) -> None:
    """Raises `NotFactoredError` if picking would dequantise more than the entry that is picked."""
    found: list[bool] = []

    def look(base: Any) -> None:
        found.append(_is_codes(_cut(picked(base, 0), None)))

    jax.eval_shape(look, base)
    if not found[0]:
        raise NotFactoredError


def _pick(codes: Codes, index: Any) -> Any:
    shape = [codes.array.shape[dim] for dim in codes.order]
    starts = [index, *[jnp.zeros_like(index)] * (len(shape) - 1)]
    cut = codes.dynamic_slice(starts, [1, *shape[1:]])
    return cut if cut is NotImplemented else [cut.squeeze([0])]


_PICK = Step(lambda x, index: [lax.dynamic_index_in_dim(x, index, 0, keepdims=False)], _pick)


def split_specs(base: Any, spec: Any, sizes: Any) -> Any:
    """The base with each of its arrays replaced by how it is cut over a mesh of these sizes.

    Raises:
        NotFactoredError: if blocks would be cut, or operations wait that know the whole shape.
    """
    if not isinstance(base, Lazy):
        return spec
    if not isinstance(base, Quantized):
        raise NotFactoredError
    cuts = [*spec, *[None] * (base.ndim - len(spec))]

    def own(part: Any) -> PartitionSpec:
        return PartitionSpec(*[
            None if count == 1 != length else _checked(cut, count, sizes)
            for cut, count, length in zip(cuts, part.shape, base.shape, strict=True)
        ])  # fmt: skip

    return Quantized(jax.tree.map(own, base.array))


def _checked(cut: Any, count: int, sizes: Any) -> Any:
    if count % parts_of(cut, sizes):
        raise NotFactoredError
    return cut


def _cut(value: Any, ready: Any) -> Any:
    """A value with what waits done on its codes, as far as that goes: `Codes` or an array."""
    if isinstance(value, Quantized):
        return Codes.of(value.array)
    if isinstance(value, Deferred):
        return value.step([_cut(v, ready) for v in value.operands], ready)[value.index]
    return value


def _dense(value: Any, ready: Any) -> Any:
    return value.dense(ready) if isinstance(value, Codes) else value


def _is_codes(value: Any) -> bool:
    return isinstance(value, Codes)
