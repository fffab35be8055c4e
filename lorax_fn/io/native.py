"""`save` and `load`: factors as one safetensors file that says all there is to know of them.

The tensors are called "<path>:<array>", "params/query/kernel:a". The metadata hold a version, the
outline of the tree, every node's kind and settings (scale, axes, …) as JSON, and a checksum.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lorax_fn.adapters import is_adapter
from lorax_fn.errors import AdapterFileError, StructureError
from lorax_fn.io.nodes import arrays_of, check_node, make_node, settings_of
from lorax_fn.io.outline import fill, outline
from lorax_fn.io.tensors import (
    TensorFile,
    device_array,
    host_array,
    open_tensors,
    replacing,
    write_tensors,
)
from lorax_fn.leaves import structure
from lorax_fn.paths import leaves_with_paths

Pytree = Any
FORMAT = "lorax_fn"
VERSION = 1


def save(path: str | os.PathLike[str], factors: Pytree) -> None:
    """Writes factors of any kinds to one file.

    The file is there whole or not at all: whatever stood at the path stays until the new file is on
    disk. It is a safetensors file of the factors' own dtypes and sizes, with no pickle in it.

    Args:
        path: the file to write, as a rule "….safetensors".
        factors: what `init` made, trained or not.

    Raises:
        StructureError: if factors hold anything but adapter nodes and None.
        LoraError: if an array is not finite, traced, or not on this host.
        OSError: if the folder is missing or the disk full.

    >>> import tempfile, jax, jax.numpy as jnp, lorax_fn as lora
    >>> params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    >>> factors = lora.init(jax.random.key(0), params, [lora.LoRA("w", rank=2, alpha=4)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora.save(f"{folder}/adapter.safetensors", factors)
    ...     loaded = lora.load(f"{folder}/adapter.safetensors")
    >>> loaded["w"].scale, loaded["b"] is None, bool((loaded["w"].a == factors["w"].a).all())
    (2.0, True, True)
    """
    nodes, arrays = {}, {}
    tree = outline(factors)
    for node_path, node in leaves_with_paths(factors, is_leaf=is_adapter):
        if node_path in nodes:
            raise StructureError(
                f"two nodes have the path {node_path!r}; a file needs one for each."
            )
        try:
            check_node(node)
        except AdapterFileError as e:
            raise StructureError(f"at {node_path!r}: {e}") from e
        nodes[node_path] = {"kind": node.kind, "settings": settings_of(node)}
        for name, array in arrays_of(node).items():
            arrays[f"{node_path}:{name}"] = host_array(f"{node_path}:{name}", array)
    content = json.dumps({"tree": tree, "nodes": nodes}, allow_nan=False)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "content": content,
        "checksum": checksum(content, arrays),
    }
    with replacing(path) as temporary:
        write_tensors(temporary, arrays, metadata)


def load(path: str | os.PathLike[str], params: Pytree | None = None) -> Pytree:
    """Reads factors that `save` wrote.

    Args:
        path: the file.
        params: the pytree that the factors are for, arrays or `jax.ShapeDtypeStruct`s. Needed where
            it is more than dicts, lists and tuples (an `nnx.State`, an Equinox module): such a tree
            cannot be built without it, and comes back as nested dicts.

    Returns:
        Factors of the structure that was saved, or, given params, of the structure of params.

    Raises:
        AdapterFileError: if the file is damaged, foreign, of a later version, or holds factors that
            do not fit params.

    >>> import tempfile, jax, jax.numpy as jnp, lorax_fn as lora
    >>> params = {"w": jnp.ones((4, 3))}
    >>> factors = lora.init(jax.random.key(0), params, [lora.LoRA("w", rank=2, alpha=4)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora.save(f"{folder}/adapter.safetensors", factors)
    ...     lora.load(f"{folder}/adapter.safetensors", params)["w"].b.shape
    (2, 3)
    """
    file = open_tensors(path)
    content = _content(file)
    arrays = {name: file.read_finite(name) for name in file.entries}
    if file.metadata.get("checksum") != checksum(file.metadata["content"], arrays):
        raise AdapterFileError(f"{path} is damaged: its checksum does not fit its content.")
    try:
        nodes = _nodes(content["nodes"], arrays)
        if params is not None:
            return _parallel(params, nodes)
        factors = fill(content["tree"], nodes)
    except AdapterFileError as e:
        raise AdapterFileError(f"{path}: {e}") from e
    if nodes:
        raise AdapterFileError(f"{path}: the tree has no place for the node {min(nodes)!r}.")
    return factors


def is_native(file: TensorFile) -> bool:
    """Whether `save` wrote the file, by what it says of itself."""
    return file.metadata.get("format") == FORMAT


def checksum(content: str, arrays: Mapping[str, np.ndarray]) -> str:
    """CRC-32 of the text, and of every tensor's name, dtype, shape and data."""
    total = zlib.crc32(content.encode())
    for name in sorted(arrays):
        array = arrays[name]
        total = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), total)
        total = zlib.crc32(np.ascontiguousarray(array).tobytes(), total)
    return f"crc32:{total:08x}"


def _content(file: TensorFile) -> dict[str, Any]:
    """The metadata's JSON, of a version that is known."""
    if not is_native(file):
        raise AdapterFileError(
            f"{file.path} is no file of lora.save: its format is {file.metadata.get('format')!r}. "
            "lora.load_peft reads the folders of Hugging Face PEFT."
        )
    if file.metadata.get("version") != str(VERSION):
        raise AdapterFileError(
            f"{file.path} has version {file.metadata.get('version')!r}; this lorax_fn reads "
            f"{VERSION}. Install a newer one."
        )
    try:
        content = json.loads(file.metadata.get("content", ""))
    except (ValueError, RecursionError) as e:
        raise AdapterFileError(f"{file.path} is damaged: {e}.") from e
    fits = isinstance(content, dict) and set(content) == {"tree", "nodes"}
    if not fits or not isinstance(content["nodes"], dict):
        raise AdapterFileError(f"{file.path} is damaged: its metadata lack the tree and the nodes.")
    return content


def _nodes(described: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Every node by its path; uses up all arrays."""
    groups: dict[str, dict[str, Any]] = {path: {} for path in described}
    for name, array in arrays.items():
        path, _, part = name.rpartition(":")
        if path not in groups:
            raise AdapterFileError(f"tensor {name!r} belongs to no node.")
        groups[path][part] = device_array(array)
    nodes = {}
    for path, entry in described.items():
        if not isinstance(entry, dict) or set(entry) != {"kind", "settings"}:
            raise AdapterFileError(f"the node {path!r} is damaged.")
        try:
            nodes[path] = make_node(entry["kind"], entry["settings"], groups[path])
        except AdapterFileError as e:
            raise AdapterFileError(f"at {path!r}: {e}") from e
    return nodes


def _parallel(params: Pytree, nodes: dict[str, Any]) -> Pytree:
    """Factors of the structure of params."""
    factors = []
    for path, leaf in leaves_with_paths(params):
        node = nodes.pop(path, None)
        if node is not None:
            try:
                node.check(path, leaf)
            except (StructureError, AttributeError) as e:
                raise AdapterFileError(str(e)) from e
        factors.append(node)
    if nodes:
        raise AdapterFileError(f"the factors adapt {min(nodes)!r}, where params have no leaf.")
    return jax.tree.unflatten(structure(params), factors)
