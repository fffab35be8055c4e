"""Adapter nodes as plain data, and back: a known kind, its settings, and its arrays by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.adapters import (
    AdaLoRAFactors,
    Adapter,
    DoRAFactors,
    FullDelta,
    IA3Gain,
    LoHaFactors,
    LoKrFactors,
    LoRAFactors,
    TokenRows,
    VeRAFactors,
)
from lorax_fn.axes import Axes
from lorax_fn.errors import AdapterFileError, LoraError

KINDS: dict[str, type[Any]] = {
    cls.kind: cls
    for cls in (
        LoRAFactors,
        DoRAFactors,
        VeRAFactors,
        LoHaFactors,
        LoKrFactors,
        IA3Gain,
        AdaLoRAFactors,
        FullDelta,
        TokenRows,
    )
}


def settings_of(node: Adapter) -> dict[str, Any]:
    """The static fields of a node, as JSON has them."""
    fields = (f.name for f in dataclasses.fields(_dataclass(node)) if f.metadata.get("static"))
    return {name: _as_json(getattr(node, name)) for name in fields}


def arrays_of(node: Adapter) -> dict[str, Any]:
    """The arrays of a node by name, such as "a", "b" and "start.0"."""
    keyed, _ = jax.tree_util.tree_flatten_with_path(node)
    return {".".join(_part(entry) for entry in key_path): array for key_path, array in keyed}


def make_node(kind: Any, settings: Any, arrays: Mapping[str, Any]) -> Adapter:
    """The node of a kind with exactly these settings and arrays.

    Raises:
        AdapterFileError: if the kind is unknown, or settings or arrays are not exactly those that
            it has, or do not fit each other.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise AdapterFileError(f"adapter kind {kind!r} is unknown; wanted one of {sorted(KINDS)}.")
    if not isinstance(settings, dict):
        raise AdapterFileError(f"the settings of a {kind} are {settings!r}; wanted a dict.")
    fields = dataclasses.fields(KINDS[kind])
    static = {field.name for field in fields if field.metadata.get("static")}
    if set(settings) != static:
        raise AdapterFileError(
            f"a {kind} has the settings {sorted(settings)}; wanted {sorted(static)}."
        )
    values: dict[str, Any] = {name: SETTINGS[name](settings[name]) for name in static}
    rest = dict(arrays)
    for field in fields:
        if field.name not in static:
            values[field.name] = _take(rest, kind, field.name)
    if rest:
        raise AdapterFileError(f"a {kind} has no arrays {sorted(rest)}.")
    node = KINDS[kind](**values)
    check_node(node)
    return node


def check_node(node: Any) -> None:
    """Raises `AdapterFileError` unless the arrays of a node fit each other and its settings."""
    axes = getattr(node, "axes", None)
    if axes is not None and not (axes.contract and axes.out):
        raise AdapterFileError(f"a {node.kind} has {axes}; wanted a dim to contract and one out.")
    if isinstance(node, LoKrFactors) and {node.a is None, node.b is None} != {
        node.right is not None
    }:
        raise AdapterFileError("a LoKr has either `right`, or both a and b.")
    try:
        shape = shape_for(node)
        node.check("", jax.ShapeDtypeStruct(shape, jnp.float32))
    except (LoraError, ValueError, TypeError, IndexError, AttributeError) as e:
        raise AdapterFileError(f"the arrays of a {node.kind} do not fit each other: {e}") from e


def shape_for(node: Any) -> tuple[int, ...]:
    """The shape of a weight that the node may belong to, read off its arrays."""
    if isinstance(node, LoKrFactors):
        return _kronecker_shape(node)
    lengths: dict[int, int] = {}

    def see(array: Any, dims: tuple[Any, ...]) -> None:
        if len(dims) != array.ndim:
            raise AdapterFileError(
                f"an array has shape {list(array.shape)}, wanted {len(dims)} dims. Factors made by "
                "lora.stack hold several adapters: save each, lora.take(stacked, i)."
            )
        for dim, length in zip(dims, array.shape, strict=True):
            if dim is None and length == 0:
                raise AdapterFileError("a rank is 0; wanted at least 1.")
            if isinstance(dim, int) and lengths.setdefault(dim, length) != length:
                raise AdapterFileError(f"dim {dim} is {lengths[dim]} in one array, {length} here.")

    jax.tree.map(see, node, node.dims())
    if isinstance(node, TokenRows):
        lengths[node.axes.contract[0]] = max(node.tokens) + 1
    n_dims = node.axes.ndim if hasattr(node, "axes") else len(lengths)
    return tuple(lengths.get(dim, 1) for dim in range(n_dims))


def _kronecker_shape(node: LoKrFactors) -> tuple[int, ...]:
    """The dims of the left part times those of the right one."""
    dims = (*node.axes.batch, *node.axes.contract, *node.axes.out)
    n_batch, n_in = len(node.axes.batch), len(node.axes.contract)
    if node.right is not None:
        right = node.right.shape
    else:
        right = (*node.a.shape[: n_batch + n_in], *node.b.shape[n_batch + 1 :])
    if not len(node.left.shape) == len(right) == len(dims) or 0 in right:
        raise AdapterFileError(f"the parts have shapes {list(node.left.shape)}, {list(right)}")
    shape = {
        dim: left * (1 if i < n_batch else r)
        for i, (dim, left, r) in enumerate(zip(dims, node.left.shape, right, strict=True))
    }
    return tuple(shape[dim] for dim in range(len(dims)))


def _take(rest: dict[str, Any], kind: str, name: str) -> Any:
    """The array of a field, the pair that it is, or None where it may be."""
    if name == "start":
        pair = [rest.pop(f"start.{i}", None) for i in range(2)]
        if any(part is None for part in pair):
            if all(part is None for part in pair):
                return None
            raise AdapterFileError(f"a {kind} has half a start.")
        return tuple(pair)
    optional = kind == LoKrFactors.kind and name in ("right", "a", "b")
    if name not in rest and not optional:
        raise AdapterFileError(f"a {kind} lacks its array {name!r}.")
    return rest.pop(name, None)


def _scale(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise AdapterFileError(f"a scale is {str(value)[:80]}; wanted a finite number.")
    return float(value)


def _probability(value: Any) -> float:
    if not 0 <= _scale(value) < 1:
        raise AdapterFileError(f"a dropout is {value!r}; wanted a probability below 1.")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise AdapterFileError(f"a flag is {value!r}; wanted true or false.")
    return value


def _side(value: Any) -> str:
    if value not in ("in", "out"):
        raise AdapterFileError(f"a gain is on {value!r}; wanted 'in' or 'out'.")
    return value


def _indices(value: Any) -> tuple[int, ...]:
    valid = isinstance(value, list) and all(type(i) is int and 0 <= i < 2**31 for i in value)
    if not valid or len(set(value)) < len(value):
        raise AdapterFileError(f"got indices {str(value)[:80]}; wanted distinct ones from 0.")
    return tuple(value)


def _tokens(value: Any) -> tuple[int, ...]:
    tokens = _indices(value)
    if not tokens:
        raise AdapterFileError("there are no tokens; wanted at least one.")
    return tokens


def _axes(value: Any) -> Axes:
    if not isinstance(value, dict) or set(value) != {"batch", "contract", "out"}:
        raise AdapterFileError(f"axes are {str(value)[:80]}; wanted batch, contract and out.")
    try:
        return Axes(**{role: _indices(dims) for role, dims in value.items()})
    except LoraError as e:
        raise AdapterFileError(str(e)) from e


SETTINGS: dict[str, Callable[[Any], Any]] = {
    "scale": _scale,
    "dropout": _probability,
    "freeze_a": _flag,
    "on": _side,
    "tokens": _tokens,
    "axes": _axes,
}


def _dataclass(node: Adapter) -> Any:
    if KINDS.get(node.kind) is not type(node):
        raise LoraError(
            f"a {type(node).__name__} of the kind {node.kind!r} has no form in a file; wanted one "
            f"of {sorted(KINDS)}."
        )
    return node


def _as_json(value: Any) -> Any:
    if isinstance(value, Axes):
        return {role: list(getattr(value, role)) for role in ("batch", "contract", "out")}
    if isinstance(value, np.generic):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _part(entry: Any) -> str:
    return str(getattr(entry, "name", getattr(entry, "idx", entry)))
