"""PEFT adapters on PyTorch's own weights: which tensor is what, by the evidence of the adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lorax_fn.axes import Axes
from lorax_fn.errors import AdapterFileError
from lorax_fn.io.layouts import MAGNITUDE
from lorax_fn.io.names import position_of
from lorax_fn.io.peft_config import PREFIX, PeftConfig
from lorax_fn.io.places import Naming, Place
from lorax_fn.io.ready_names import torch
from lorax_fn.io.tensors import TensorFile

_A = re.compile(
    re.escape(PREFIX)
    + r"(?P<module>.+?)(?P<depth>(\.base_layer)*)\.lora_(?P<kind>A\.weight|embedding_A)"
)
_GPT2 = re.compile(r".*\.?(c_attn|c_proj|c_fc|q_attn)")


def naming_for(base: Mapping[str, Any], file: TensorFile, config: PeftConfig) -> Naming:
    """The naming of a base whose leaves are called as PyTorch's parameters are, or nearly so."""
    prefix, surplus = _difference(base, file)
    names = {path: prefix + path.removeprefix(surplus) for path in base}
    first = {m["module"] + m["depth"]: (m["kind"], file.entries[m[0]].shape) for m in _as(file)}
    depths = _depths(names.values(), config)

    def naming(path: str, leaf: Any) -> Place:
        name = names[path]
        module, _, own = name.rpartition(".")
        if name in depths and leaf.ndim == 3:
            _, shape = first.get(module + ".base_layer" * depths[name], ("", ()))
            return Place(name, "experts", _facing(name, leaf, shape), position=position_of(own))
        place = torch(name, leaf)
        kind, _ = first.get(module, ("", ()))
        if own == "weight" and kind == "embedding_A":
            return Place(name, "embedding", Axes(contract=(0,), out=(1,)))
        if own == "weight" and leaf.ndim == 2 and kind:
            if config.fan_in_fan_out and is_conv1d(module):
                return Place(name, "fan_in_fan_out", Axes(contract=(0,), out=(1,)))
            return Place(name, "linear", Axes(contract=(1,), out=(0,)))
        return place

    return naming


def is_conv1d(module: str) -> bool:
    """Whether a module is called as GPT-2's Conv1D ones are, whose weights are (in, out)."""
    return _GPT2.fullmatch(module) is not None


def shapes_of(file: TensorFile, config: PeftConfig) -> dict[str, Any]:
    """The weights that an adapter belongs to, as far as its own tensors tell: plain LoRA's.

    Raises:
        AdapterFileError: if it holds more than that, which only the base can tell.
    """
    shapes: dict[str, Any] = {}
    for match in _as(file):
        module, kind = match["module"], match["kind"]
        a = file.entries[match[0]].shape
        b_name = match[0].replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")
        if b_name not in file.entries:
            raise AdapterFileError(f"{file.path}: tensor {match[0]!r} lacks its partner {b_name}.")
        b = file.entries[b_name].shape
        name, shape = f"{module}.weight", (*b[:1], *a[1:])
        if kind == "embedding_A" or (config.fan_in_fan_out and is_conv1d(module)):
            shape = (*a[1:], *b[:1])
        elif match["depth"] or (config.target_parameters and not config.targets(module)):
            name, shape = _parameter(match, a, b, config)
        shapes[name] = jax.ShapeDtypeStruct(shape, np.float32)
    others = [n for n in file.entries if n.endswith(MAGNITUDE) or "lora_" not in n]
    if others:
        raise AdapterFileError(
            f"{file.path}: what {others[0]!r} does depends on the base; give it, by --base."
        )
    return shapes


def _as(file: TensorFile) -> list[re.Match[str]]:
    return [match for name in file.entries if (match := _A.fullmatch(name))]


def _depths(names: Any, config: PeftConfig) -> dict[str, int]:
    """In how many wrappers PEFT nests each parameter that is adapted by itself."""
    by_module: dict[str, list[str]] = {}
    for name in names:
        if config.targets_parameter(name):
            by_module.setdefault(name.rpartition(".")[0], []).append(name)
    depths = {}
    for siblings in by_module.values():
        siblings.sort(key=lambda name: position_of(name.rpartition(".")[2]))
        for i, name in enumerate(siblings):
            depths[name] = len(siblings) - 1 - i
    return depths


def _facing(name: str, leaf: Any, shape: tuple[int, ...]) -> Axes:
    """A faces the last dim of the parameter, or the middle one, as its width says."""
    _, middle, last = leaf.shape
    width = shape[-1] if shape else last
    if middle == last:
        raise AdapterFileError(
            f"{name!r} has shape {list(leaf.shape)}: whether its adapter lies along the last dim "
            "or the middle one cannot be told. Merge in Python, with names= and lora.io.Place."
        )
    if width == middle:
        return Axes(batch=(0,), contract=(1,), out=(2,))
    return Axes(batch=(0,), contract=(2,), out=(1,))


def _parameter(
    match: re.Match[str], a: tuple[int, ...], b: tuple[int, ...], config: PeftConfig
) -> tuple[str, tuple[int, ...]]:
    """Name and shape of an expert-stacked parameter."""
    name = _parameter_name(match["module"], match["depth"].count(".base_layer"), config)
    if name is None:
        raise AdapterFileError(f"tensor {match[0]!r} belongs to no module that the config targets.")
    return name, (a[0] // config.rank(name), b[0], a[1])


def _parameter_name(module: str, depth: int, config: PeftConfig) -> str | None:
    """The parameter that a LoRA so deep in a module's wrappers adapts, if the config names it."""
    owns = {
        target.rpartition(".")[2]
        for target in config.target_parameters
        if f".{module}".endswith(f".{target.rpartition('.')[0]}")
    }
    names = sorted(
        (f"{module}.{own}" for own in owns), key=lambda n: position_of(n.rpartition(".")[2])
    )
    inner = len(names) - 1 - depth
    return names[inner] if 0 <= inner < len(names) else None


def pattern_key(module: str, config: PeftConfig) -> str:
    """What a LoRA's rank and scale are asked by: its module, or the parameter that it adapts."""
    bare = re.sub(r"(\.base_layer)+$", "", module)
    depth = module.count(".base_layer")
    if not depth and config.targets(module):
        return module
    return _parameter_name(bare, depth, config) or module


def _difference(base: Mapping[str, Any], file: TensorFile) -> tuple[str, str]:
    """What to put before the base's names, and what to take off, to have the adapter's."""
    wanted = [m["module"] for m in _as(file)]
    if not wanted:
        return "", ""
    module = wanted[0]
    for name in base:
        parent = name.rpartition(".")[0]
        if parent == module:
            return "", ""
        if parent and module.endswith(f".{parent}"):
            return module.removesuffix(parent), ""
        if parent.endswith(f".{module}"):
            return "", parent.removesuffix(module)
    return "", ""
