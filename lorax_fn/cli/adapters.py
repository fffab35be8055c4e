"""Adapters of either format, by path: a folder is PEFT's, a file is `save`'s."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lorax_fn.adapters import is_adapter
from lorax_fn.cli.base import Base
from lorax_fn.cli.torch_names import naming_for, pattern_key, shapes_of
from lorax_fn.errors import AdapterFileError
from lorax_fn.io.names import slots_of
from lorax_fn.io.native import load
from lorax_fn.io.nodes import arrays_of, settings_of, shape_for
from lorax_fn.io.peft_config import PREFIX, read_config
from lorax_fn.io.peft_load import open_weights
from lorax_fn.io.peft_reader import Reader
from lorax_fn.paths import leaves_with_paths


def read_nodes(path: Path, base: Base | None = None) -> dict[str, Any]:
    """Every node of an adapter, by its path; a PEFT adapter's are called as PyTorch's parameters.

    Raises:
        AdapterFileError: if it is damaged, or a PEFT adapter that only its base explains, without.
    """
    if not path.is_dir():
        return dict(leaves_with_paths(load(path), is_leaf=is_adapter))
    reader = peft_reader(path, base)
    nodes = {name: reader.node(name) for name in sorted(reader.paths)}
    return {name: node for name, node in nodes.items() if node is not None}


def peft_reader(path: Path, base: Base | None) -> Reader:
    """The reader of a PEFT folder on PyTorch's own weights, or on what its tensors tell of them."""
    config, file = read_config(path), open_weights(path)
    tensors = shapes_of(file, config) if base is None else base.tensors()
    naming = naming_for(tensors, file, config)
    return Reader(file, config, slots_of(tensors, naming))


def describe(path: Path) -> dict[str, Any]:
    """What an adapter holds, as plain data; a PEFT folder is described by its own words."""
    return _describe_peft(path) if path.is_dir() else _describe_native(path)


def _describe_native(path: Path) -> dict[str, Any]:
    rows = []
    for name, node in read_nodes(path).items():
        arrays = arrays_of(node)
        rows.append(
            {
                "path": name,
                "kind": node.kind,
                "rank": getattr(node, "rank", None),
                "scale": getattr(node, "scale", None),
                "arrays": {part: list(array.shape) for part, array in arrays.items()},
                "dtype": sorted({str(array.dtype) for array in arrays.values()}),
                "settings": settings_of(node),
                "numbers": sum(array.size for array in arrays.values()),
            }
        )
    return {"format": "lorax_fn", "path": str(path), **_totals(path, rows)}


def _describe_peft(path: Path) -> dict[str, Any]:
    config, file = read_config(path), open_weights(path)
    groups: dict[str, list[str]] = {}
    for tensor in file.entries:
        module = tensor.removeprefix(PREFIX).partition(".lora_")[0]
        groups.setdefault(module, []).append(tensor)
    rows = []
    for module, tensors in groups.items():
        adapted = any(".lora_" in tensor for tensor in tensors)
        shapes = {
            t.removeprefix(PREFIX).removeprefix(f"{module}."): list(file.entries[t].shape)
            for t in tensors
        }
        key = pattern_key(module, config)
        rows.append(
            {
                "path": module,
                "kind": ("DoRA" if config.use_dora else "LoRA") if adapted else "whole",
                "rank": config.rank(key) if adapted else None,
                "scale": config.scale(key) if adapted else None,
                "arrays": shapes,
                "dtype": sorted({file.entries[t].dtype for t in tensors}),
                "numbers": sum(map(math.prod, shapes.values())),
            }
        )
    return {"format": "PEFT", "path": str(path), **_totals(path, rows)}


def _totals(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    files = path.iterdir() if path.is_dir() else [path]
    return {
        "bytes": sum(file.stat().st_size for file in files if file.is_file()),
        "numbers": sum(row["numbers"] for row in rows),
        "nodes": rows,
    }


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """Where two adapters differ: a row for each path that is not the same in both."""
    rows = []
    for path in sorted({*a, *b}):
        if path not in a or path not in b:
            rows.append({"path": path, "difference": f"only in {'A' if path in a else 'B'}"})
            continue
        difference = _node_difference(a[path], b[path])
        if difference is not None:
            rows.append({"path": path, **difference})
    return rows


def _node_difference(a: Any, b: Any) -> dict[str, Any] | None:
    if type(a) is not type(b):
        return {"difference": f"{a.kind} against {b.kind}"}
    settings = {
        name: [value, settings_of(b)[name]]
        for name, value in settings_of(a).items()
        if value != settings_of(b)[name]
    }
    of_a, of_b = arrays_of(a), arrays_of(b)
    shapes = {
        name: [_shape(of_a.get(name)), _shape(of_b.get(name))]
        for name in sorted({*of_a, *of_b})
        if _shape(of_a.get(name)) != _shape(of_b.get(name))
    }
    if settings or shapes:
        return {"difference": "settings or shapes", "settings": settings, "shapes": shapes}
    largest = {
        name: _largest_difference(np.asarray(array), np.asarray(of_b[name]))
        for name, array in of_a.items()
    }
    dtypes = {
        name: [str(array.dtype), str(of_b[name].dtype)]
        for name, array in of_a.items()
        if array.dtype != of_b[name].dtype
    }
    if max(largest.values()) == 0.0:
        return {"difference": "dtypes", "dtypes": dtypes} if dtypes else None
    return {"difference": "values", "largest": largest, **({"dtypes": dtypes} if dtypes else {})}


def _largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """In the wider of both dtypes, and in float32 at least."""
    wide = np.float64 if np.float64 in (a.dtype, b.dtype) else np.float32
    return float(abs(a.astype(wide) - b.astype(wide)).max(initial=0))


def _shape(array: Any) -> list[int] | None:
    return None if array is None else list(array.shape)


def as_tree(nodes: dict[str, Any]) -> dict[str, Any]:
    """Nodes by path as nested dicts, which is what they are saved as."""
    tree: dict[str, Any] = {}
    for path, node in nodes.items():
        *parents, own = path.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
            if not isinstance(branch, dict):
                raise AdapterFileError(f"{path!r} lies within a path that is a node itself.")
        branch[own] = node
    return tree


def params_of(nodes: dict[str, Any]) -> dict[str, Any]:
    """Shapes of the weights that nodes belong to, as far as the nodes tell."""
    return {path: jax.ShapeDtypeStruct(shape_for(node), "float32") for path, node in nodes.items()}
