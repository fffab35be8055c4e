"""Adapters by name, in a stack with a fixed number of slots: adding one compiles nothing.

An adapter travels as the file that `lora.save` writes. Ranks up to the stack's fit, padded with
zeros, and so does every scale: it is multiplied into B.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lorax_fn as lora
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
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            file.write(data)
            file.flush()
            try:
                factors = lora.load(file.name)
            except lora.AdapterFileError as e:
                raise BadAdapterError(str(e).replace(file.name, "the body")) from e
        on_host = jax.tree.map(np.asarray, factors)
        unscaled = jax.tree.map(lambda node: node.unscaled(), on_host, is_leaf=is_adapter)
        arrays, wanted = dict(_named(unscaled)), _named(self._blank)
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
    if not fits or not jnp.issubdtype(array.dtype, jnp.floating):
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
