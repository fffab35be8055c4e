"""Adapters by name, in a stack with a fixed number of slots: adding one compiles nothing.

An adapter travels as a safetensors file of its arrays by their paths, `…/kernel/a`, `…/kernel/b`,
`…/bias/delta`, with the scale in b. Ranks up to the stack's fit, padded with zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lorax_fn.adapters import is_adapter

Pytree = Any


class BadAdapterError(ValueError):
    """A file that is no adapter for this base; the message says why."""


class FullError(RuntimeError):
    """No slot is free."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where an adapter lies, and the names of the classes that its logits stand for."""

    slot: int
    labels: tuple[str, ...]


def to_bytes(factors: Pytree) -> bytes:
    """An adapter's file."""
    unscaled = jax.tree.map(lambda node: node.unscaled(), factors, is_leaf=is_adapter)
    return save({name: np.asarray(array) for name, array in _named(unscaled)})


class Slots:
    """Which adapter lies in which slot of `stacked`.

    `entries` changes at once; `stacked` only by `write`, which whoever computes with it calls.
    """

    def __init__(self, blank: Pytree, capacity: int) -> None:
        """Takes factors of the largest rank, with scale 1; shapes will do."""
        self._blank = blank
        self.entries: dict[str, Entry] = {}
        self.free = list(range(capacity))
        self.stacked = jax.tree.map(lambda s: jnp.zeros((capacity, *s.shape), s.dtype), blank)
        self._write = jax.jit(
            lambda stacked, slot, new: jax.tree.map(lambda s, n: s.at[slot].set(n), stacked, new),
            donate_argnums=0,
        )

    def write(self, slot: int, padded: Pytree) -> None:
        """Puts an adapter, as `read` gives it, into a slot; in place."""
        self.stacked = self._write(self.stacked, np.int32(slot), padded)

    def reserve(self) -> int:
        """Takes a slot out of the free ones.

        Raises:
            FullError: if there is none.
        """
        if not self.free:
            raise FullError("every slot is taken; remove an adapter first")
        return self.free.pop()

    def blank(self) -> Pytree:
        """An adapter of zeros."""
        return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), self._blank)

    def read(self, data: bytes) -> Pytree:
        """The adapter in a file, padded to the stack's rank; by numpy, which compiles nothing.

        Raises:
            BadAdapterError: if it is not one for this base.
        """
        try:
            arrays = load(data)
        except (SafetensorError, ValueError, KeyError, TypeError) as e:
            raise BadAdapterError(f"the body is no safetensors file of arrays: {e}") from e
        wanted = _named(self._blank)
        if set(arrays) != {name for name, _ in wanted}:
            odd = min(set(arrays) ^ {name for name, _ in wanted})
            raise BadAdapterError(f"missing or unexpected: {odd!r}")
        dims = jax.tree.map(lambda node: node.dims(), self._blank, is_leaf=is_adapter)
        spans = jax.tree.leaves(dims, is_leaf=lambda leaf: isinstance(leaf, tuple))
        padded = [
            _padded(name, arrays[name], like.shape, span)
            for (name, like), span in zip(wanted, spans, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(self._blank), padded)


def _padded(name: str, array: np.ndarray, shape: Sequence[int], span: Sequence[Any]) -> np.ndarray:
    """The array in float32, filled up with zeros along its rank, whose `span` is None."""
    fits = array.ndim == len(shape) and all(
        n <= wanted if dim is None else n == wanted
        for n, wanted, dim in zip(array.shape, shape, span, strict=True)
    )
    if not fits or array.dtype.kind != "f":
        raise BadAdapterError(
            f"{name!r} is {array.dtype}{list(array.shape)}; wanted floats {list(shape)}, "
            "or of lower rank"
        )
    if not np.isfinite(array).all():
        raise BadAdapterError(f"{name!r} is not finite")
    padded = np.zeros(shape, np.float32)
    padded[tuple(slice(n) for n in array.shape)] = array
    return padded


def _named(tree: Pytree) -> list[tuple[str, Any]]:
    keyed, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in keyed]
