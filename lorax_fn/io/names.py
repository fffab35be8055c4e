"""From what users write for `names=` to the parameters of a PyTorch model that the leaves are."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lorax_fn.axes import Axes
from lorax_fn.errors import AxesError, LoraError, StructureError
from lorax_fn.init import axes_by_path
from lorax_fn.io.maxtext_names import Family
from lorax_fn.io.places import Naming, Place
from lorax_fn.io.ready_names import READY
from lorax_fn.paths import leaves_with_paths
from lorax_fn.tracing import is_array

Pytree = Any
Names = str | Mapping[str, str | Place] | Naming | None

# What a module defines before its other expert-stacked parameters, in transformers.
_LATER = {"down_proj": 1}


def position_of(own: str) -> int:
    """Where a module defines an expert-stacked parameter of this name, among those that it has."""
    return _LATER.get(own, 0)


@dataclasses.dataclass(frozen=True)
class Slot:
    """One parameter of the PyTorch model: which part of which leaf it is."""

    path: str
    leaf: Any
    place: Place
    axes: Axes | None  # None of a vector
    index: tuple[int, ...]  # of the leaf's numbered batch dims
    name: str

    @property
    def module(self) -> str:
        """The module that has the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def own(self) -> str:
        """The parameter's name within its module."""
        return self.name.rpartition(".")[2]

    @property
    def is_product(self) -> bool:
        """Whether PEFT could put LoRA on it."""
        return self.axes is not None and (self.own == "weight" or self.place.layout == "experts")

    def part(self, array: np.ndarray) -> np.ndarray:
        """A view of what the parameter is of the leaf, or of an array of its shape."""
        return np.moveaxis(array, self.numbered, range(len(self.numbered)))[self.index]

    def require_axes(self) -> None:
        """Raises `AxesError` if it is a product whose dims have no known roles."""
        if self.axes is None and self.place.layout != "vector":
            raise AxesError(
                f"the axes of {self.path!r}, shape {list(self.leaf.shape)}, are unknown: they say "
                f"which dims are the inputs of {self.name!r}. Call "
                "axes = lora.infer_axes(apply_fn, params, *args) and pass axes=axes."
            )

    @property
    def numbered(self) -> tuple[int, ...]:
        """The dims of the leaf that the index counts along."""
        if self.axes is None:
            return tuple(range(len(self.index)))
        return self.axes.batch[: len(self.index)]


def slots_of(
    params: Pytree,
    names: Names,
    axes: Pytree | None = None,
    known: Mapping[str, Axes | None] | None = None,
) -> dict[str, Slot]:
    """Every parameter that the leaves of params are, by its name in the PyTorch model.

    The roles of a leaf's dims are those that the names give, or else `axes`, or `known` by path.

    Raises:
        LoraError: if names are none, or name one parameter twice.
        StructureError: if axes are not parallel to params.
    """
    naming, leaves = resolve_names(names), leaves_with_paths(params)
    if isinstance(naming, Family):
        naming = naming.fitted(dict(leaves))
    given = {**(known or {}), **axes_by_path(params, axes)}
    slots: dict[str, Slot] = {}
    for path, leaf in leaves:
        place = naming(path, leaf) if is_array(leaf) else None
        if place is None:
            continue
        roles = place.axes or given.get(path)
        for index, name in place.slots(_numbered_lengths(path, leaf, place, roles)).items():
            dims = _roles(path, leaf, place, roles, len(index))
            _check_interleaved(path, leaf, place, dims)
            slot = Slot(path, leaf, place, dims, index, name)
            if name in slots:
                raise LoraError(
                    f"names give {path!r} and {slots[name].path!r} the one name {name!r}; wanted "
                    "another for each."
                )
            slots[name] = slot
    return slots


def check_positions(siblings: list[Slot]) -> None:
    """Raises `LoraError` unless the expert-stacked parameters of one module have an order."""
    if len({slot.place.position for slot in siblings}) < len(siblings):
        raise LoraError(
            f"the parameters {sorted(slot.name for slot in siblings)} of one module have the same "
            "position; wanted lorax_fn.io.Place(..., position=) of each, in the order in which the "
            "module defines them."
        )


def resolve_names(names: Names) -> Naming:
    """The naming that `names` stand for.

    Raises:
        LoraError: if they are of no kind that is known.
    """
    if names is None:
        return READY["flax"]
    if isinstance(names, str):
        if names not in READY:
            raise LoraError(
                f"names={names!r} is unknown; wanted one of {sorted(READY)}, a table "
                "{regex of paths: name of the parameter}, or a function (path, leaf) -> name."
            )
        return READY[names]
    if isinstance(names, Mapping):
        return _from_table(names)
    if callable(names):
        return lambda path, leaf: _place(path, leaf, names(path, leaf))
    raise LoraError(
        f"names are a {type(names).__name__}; wanted one of {sorted(READY)}, a table or a function."
    )


def _from_table(table: Mapping[str, str | Place]) -> Naming:
    try:
        rows = [(re.compile(pattern), entry) for pattern, entry in table.items()]
    except (re.error, TypeError) as e:
        raise LoraError(f"names hold a pattern that is no regex: {e}.") from e

    def naming(path: str, leaf: Any) -> Place | None:
        for pattern, entry in rows:
            found = pattern.fullmatch(path)
            if found is None:
                continue
            if isinstance(entry, Place) and isinstance(entry.name, str):
                return dataclasses.replace(entry, name=_expanded(found, entry.name))
            return _place(path, leaf, _expanded(found, entry) if isinstance(entry, str) else entry)
        return None

    return naming


def _expanded(found: re.Match[str], name: str) -> str:
    """The name, with what its pattern's groups have found in it."""
    try:
        return found.expand(name)
    except (re.error, IndexError) as e:
        raise LoraError(
            f"names give {found.re.pattern!r} the name {name!r}, which does not fit its groups: "
            f"{e}."
        ) from e


def _place(path: str, leaf: Any, entry: Any) -> Place | None:
    """A place, given one or a mere name, whose layout the leaf's own name tells."""
    if entry is None or isinstance(entry, Place):
        return entry
    if not isinstance(entry, str) or not entry:
        raise LoraError(
            f"names give {path!r} the name {entry!r}; wanted the parameter's whole name, such as "
            "'model.layers.0.mlp.up_proj.weight', a lora.io.Place, or None."
        )
    own = entry.rpartition(".")[2]
    if path.rpartition("/")[2] == "embedding":
        return Place(entry, "embedding", Axes(contract=(0,), out=(1,)))
    if leaf.ndim - entry.count("{}") < 2 or own == "bias":
        return Place(entry, "vector")
    if own != "weight":
        return Place(entry, "experts", position=position_of(own))
    return Place(entry, "linear")


def _numbered_lengths(path: str, leaf: Any, place: Place, roles: Axes | None) -> tuple[int, ...]:
    """The lengths of the dims that the parameter's name numbers."""
    if roles is not None and roles.ndim != leaf.ndim:
        raise StructureError(f"{path!r} has shape {list(leaf.shape)}, which {roles} do not fit.")
    if roles is not None:
        batch = roles.batch
        if place.layout == "experts":
            batch = batch[: len(batch) - 1 if place.numbered is None else place.numbered]
        return tuple(leaf.shape[d] for d in batch)
    return tuple(leaf.shape[: place.numbered or 0])


def _roles(path: str, leaf: Any, place: Place, roles: Axes | None, numbered: int) -> Axes | None:
    """The roles of a product's dims, those of a JAX matrix where nothing else is said.

    A "weight" is no such matrix: that is what Equinox calls its own, which are (out, in).
    """
    if place.layout == "vector":
        return roles
    if roles is None and leaf.ndim == numbered + 2 and path.rpartition("/")[2] != "weight":
        return Axes(tuple(range(numbered)), (numbered,), (numbered + 1,))
    if roles is not None and place.layout == "experts" and len(roles.batch) == numbered:
        return _with_experts(roles, leaf.ndim)
    return roles


def _check_interleaved(path: str, leaf: Any, place: Place, roles: Axes | None) -> None:
    last = leaf.shape[roles.out[-1] if roles is not None and roles.out else -1]
    if place.interleaved and last % 2:
        raise LoraError(
            f"names give {path!r} of shape {list(leaf.shape)} an interleaved place; wanted an even "
            f"number of outputs in its last output dim, which has {last}."
        )


def _with_experts(roles: Axes, ndim: int) -> Axes:
    """The first dim that is no layer's made a batch dim, where all experts share their inputs."""
    first = min(d for d in range(ndim) if d not in roles.batch)
    contract, out = (tuple(d for d in dims if d != first) for dims in (roles.contract, roles.out))
    if not contract or not out:  # a single matrix
        return roles
    return Axes((*roles.batch, first), contract, out)
