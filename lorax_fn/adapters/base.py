"""What every adapter kind provides: a rule, and the node that the rule puts at a leaf of params."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lorax_fn.axes import Axes
from lorax_fn.interpreter import Weight

PART = "part"  # see `Adapter.dims`


def static(default: Any = dataclasses.MISSING) -> Any:
    """A field of a node that is no child of the pytree but part of its structure."""
    return dataclasses.field(default=default, metadata={"static": True})


class Rule(abc.ABC):
    """The recipe for the leaves that its targets select.

    Subclasses are frozen dataclasses with the fields `targets` and `exclude`, and take every
    hyperparameter by keyword.
    """

    targets: Any
    exclude: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Gives each kind the `repr` of this class, which `dataclass` then leaves alone."""
        super().__init_subclass__(**kwargs)
        cls.__repr__ = Rule.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        """The call that makes it, without what stands at its default."""
        return f"{type(self).__name__}({', '.join([repr(self.targets), *_settings(self)])})"

    @abc.abstractmethod
    def make(self, key: jax.Array, path: str, leaf: Any, axes: Axes | None) -> Adapter | None:
        """The node for one leaf (an array, or anything with its shape and dtype), or None.

        Raises:
            TargetError: if the kind cannot adapt this leaf.
            AxesError: if it needs to know the leaf's axes and does not.
        """


class Adapter(abc.ABC):
    """A node of `factors`: the trainable arrays of one leaf of params, and how they change it.

    Subclasses are frozen dataclasses registered as pytrees. `kind` is the name of the rule that
    makes them.
    """

    kind: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Gives each kind the `repr` of this class, which `dataclass` then leaves alone."""
        super().__init_subclass__(**kwargs)
        cls.__repr__ = Adapter.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        """Shapes in place of arrays, and no setting that stands at its default."""
        return f"{type(self).__name__}({', '.join(_settings(self))})"

    @abc.abstractmethod
    def check(self, path: str, leaf: Any) -> None:
        """Raises `StructureError` unless the node belongs to a leaf of this shape and dtype."""

    @abc.abstractmethod
    def adapt(self, leaf: Any, path: str, key: jax.Array | None = None) -> Weight | jax.Array:
        """What the function computes with in place of the frozen leaf; `key` turns dropout on."""

    @abc.abstractmethod
    def remove(self, merged: Any, path: str) -> jax.Array:
        """The frozen leaf, given what `merge` made of it."""

    @abc.abstractmethod
    def dims(self) -> Adapter:
        """The node with each array replaced by a tuple: which dim of the leaf each axis spans.

        None stands for a rank, `PART` for an axis that spans a part of a dim.
        """

    def unscaled(self) -> Adapter:
        """The same change with the scale, if there is one, multiplied into an array."""
        return self

    def neutral(self) -> Adapter:
        """A node of the same arrays' shapes with which the leaf stays as it is."""
        return jax.tree.map(jnp.zeros_like, self)

    @abc.abstractmethod
    def trainable(self) -> Adapter:
        """The node with each of its arrays replaced by whether it is trained."""


def _settings(node: Any) -> list[str]:
    """`name=value` of the fields of a dataclass; `name=float32[4,2]` where it holds an array."""
    shown = []
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if field.name == "targets" or _is_default(value, field.default):
            continue
        shown.append(f"{field.name}={_short(value)}")
    return shown


def _is_default(value: Any, default: Any) -> bool:
    same_kind = type(value) is type(default)  # arrays do not compare to a single answer
    return value is default or (same_kind and not hasattr(value, "shape") and value == default)


def _short(value: Any) -> str:
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return f"({', '.join(map(_short, value))})"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return value.__name__ if isinstance(value, type) else repr(value)


def is_adapter(node: Any) -> bool:
    """Whether a node of a pytree is an adapter; made to be an `is_leaf`."""
    return isinstance(node, Adapter)
