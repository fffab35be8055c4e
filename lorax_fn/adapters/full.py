"""Training a leaf itself (heads, norms, biases), and leaving one alone."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lorax_fn.adapters.base import Adapter, Rule
from lorax_fn.axes import Axes
from lorax_fn.errors import StructureError, TargetError
from lorax_fn.interpreter.weight import wide_dtype
from lorax_fn.targets import Targets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullDelta(Adapter):
    """The whole change of one leaf: the function computes with leaf + delta.

    Attributes:
        delta: the leaf's shape, in float32 or the leaf's wider dtype; starts at zero, so weight
            decay pulls towards the pretrained value, and `unmerge` can take it away again.
    """

    kind: ClassVar[str] = "Full"

    delta: Any

    def check(self, path: str, leaf: Any) -> None:
        """Raises `StructureError` unless the leaf is floating and of delta's shape."""
        fits = self.delta.shape == leaf.shape and jnp.issubdtype(leaf.dtype, jnp.inexact)
        if not fits:
            raise StructureError(
                f"factors at {path!r} have delta {self.delta.dtype}{list(self.delta.shape)}, the "
                f"leaf is {leaf.dtype}{list(leaf.shape)}. Were they made for these params? Call "
                "lora.init again; of stacked factors, lora.take one."
            )

    def adapt(self, leaf: Any, path: str, key: jax.Array | None = None) -> jax.Array:
        """leaf + delta in delta's dtype, cast once to the leaf's."""
        return (leaf.astype(self.delta.dtype) + self.delta).astype(leaf.dtype)

    def remove(self, merged: Any, path: str) -> jax.Array:
        """merged - delta."""
        return FullDelta(-self.delta).adapt(merged, path)

    def dims(self) -> FullDelta:
        """The leaf's own."""
        return FullDelta(tuple(range(len(self.delta.shape))))

    def trainable(self) -> FullDelta:
        """The delta is trained."""
        return FullDelta(True)


@dataclasses.dataclass(frozen=True)
class Full(Rule):
    """Rule: train the targeted leaves themselves.

    Args:
        targets: which leaves; names never pick biases and norm scales, a regex does.
        exclude: leaves to leave out.

    >>> import jax, lorax_fn as lora
    >>> params = {"head": jax.numpy.ones((2, 3)), "bias": jax.numpy.ones(3)}
    >>> lora.init(jax.random.key(0), params, [lora.Full("head")])["head"].delta.shape
    (2, 3)
    """

    targets: Targets
    _: dataclasses.KW_ONLY
    exclude: Targets | None = None

    def make(self, key: jax.Array, path: str, leaf: Any, axes: Axes | None) -> FullDelta:
        """A zero delta."""
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TargetError(
                f"{path!r} has dtype {leaf.dtype}, which has no gradient. Exclude the leaf."
            )
        is_complex = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
        return FullDelta(
            jnp.zeros(leaf.shape, leaf.dtype if is_complex else wide_dtype(leaf.dtype))
        )


@dataclasses.dataclass(frozen=True)
class Frozen(Rule):
    """Rule: leave the targeted leaves alone, whatever later rules say.

    Args:
        targets: which leaves.
        exclude: leaves that later rules may still take.
    """

    targets: Targets
    _: dataclasses.KW_ONLY
    exclude: Targets | None = None

    def make(self, key: jax.Array, path: str, leaf: Any, axes: Axes | None) -> None:
        """No node."""
        return
