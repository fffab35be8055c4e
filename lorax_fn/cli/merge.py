"""Merging an adapter into safetensors files, tensor by tensor: a base larger than memory merges.

A merged file has the names, shapes and dtypes of its base, so that its header is the same to the
byte: what no adapter touches is copied, the rest is computed and written in its place, large
tensors by blocks of rows. Each file is there whole or not at all. A folder remembers what is being
merged into it, and the same command goes on where it was cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from lorax_fn.adapters import AdaLoRAFactors, DoRAFactors, FullDelta, LoRAFactors, VeRAFactors
from lorax_fn.cli.adapters import peft_reader, read_nodes
from lorax_fn.cli.base import Base, open_base
from lorax_fn.cli.output import check_output
from lorax_fn.errors import AdapterFileError
from lorax_fn.io.tensors import TensorFile, replacing
from lorax_fn.transform import merge

STATE = ".lorax-fn-merge.json"
BLOCK = 4 * 2**20  # bytes of a tensor that are merged at a time
COPIED = {".json", ".txt", ".model", ".jinja", ".md", ".py", ".tiktoken", ""}
Advance = Callable[[int], Any]


def merge_files(
    base_path: Path,
    adapter_path: Path,
    out: Path,
    progress: Callable[[int], Any],
    *,
    force: bool = False,
) -> dict[str, Any]:
    """Writes the merged model to `out`, a file or a folder as the base is.

    Args:
        base_path: a safetensors file, or a folder of them.
        adapter_path: a PEFT folder, or a file of `save`.
        out: what to write.
        progress: given a number of bytes, returns a progress bar (a context manager with `update`).
        force: whether a file that is there may be replaced; a folder never is.

    Returns:
        What was done, as plain data.

    Raises:
        AdapterFileError: if a file is damaged, or adapter and base do not belong together.
        OSError: if the disk is full; no half file is left.
    """
    base = open_base(base_path)
    targets = _targets(base, adapter_path, out, force)
    nodes = _Nodes(adapter_path, base)
    total = sum(file.path.stat().st_size for file in base.files)
    _check_space(out, [t for t in targets if not base.is_folder or not t[1].exists()])
    if base.is_folder:
        _begin(out, base, adapter_path)
    skipped = 0
    with progress(total) as bar:
        for file, target in targets:
            size = file.path.stat().st_size
            if base.is_folder and target.exists():  # finished before the last run was cut off
                skipped += 1
                bar.update(size)
                continue
            with replacing(target) as temporary, temporary.open("wb") as written:
                _write(file, nodes, written, bar.update)
    if base.is_folder:
        _finish(base.path, out)
    return {
        "out": str(out),
        "files": len(targets),
        "already_done": skipped,
        "bytes": total,
        "merged": len(nodes.names),
    }


class _Nodes:
    """The nodes of an adapter by the base's names, each made when it is asked for."""

    def __init__(self, adapter: Path, base: Base) -> None:
        self._get: Callable[[str], Any]
        if adapter.is_dir():
            reader = peft_reader(adapter, base)
            self.names, self._get = reader.paths, reader.node
            return
        matched = _match(read_nodes(adapter), base.tensors(), adapter)
        self.names, self._get = set(matched), matched.__getitem__

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> Any:
        return self._get(name)


def _match(nodes: dict[str, Any], tensors: dict[str, Any], adapter: Path) -> dict[str, Any]:
    """Nodes by the tensor that each belongs to: called as its path is, with "/" or "."."""
    dotted = {name.replace("/", "."): name for name in tensors}
    found = {}
    for path, node in nodes.items():
        spelled = path.replace("/", ".")
        name = dotted.get(spelled, dotted.get(spelled.removeprefix("params.")))
        if name is None:
            raise AdapterFileError(
                f"{adapter} adapts {path!r}, and the base has no tensor of that name. Convert an "
                "adapter of another naming first: lorax-fn convert."
            )
        found[name] = node
        leaf = tensors[name]
        node.check(path, leaf)
    return found


def _write(file: TensorFile, nodes: _Nodes, out: BinaryIO, advance: Advance) -> None:
    """Writes the file, merged."""
    with file.path.open("rb") as source:
        end = min((entry.start for entry in file.entries.values()), default=None)
        size = file.path.stat().st_size if end is None else end
        advance(_copy(source, out, 0, size))
        for name, entry in file.entries.items():
            if name not in nodes:
                advance(_copy(source, out, entry.start, entry.size))
                continue
            for block in _merged(file, name, nodes[name]):
                out.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
                advance(block.nbytes)
        out.flush()


def _merged(file: TensorFile, name: str, node: Any) -> Iterator[np.ndarray]:
    """The merged tensor, by blocks of rows where its node can be cut."""
    entry = file.entries[name]
    if node is None:  # the file has the base's own values of it
        yield file.read(name)
        return
    if entry.size <= BLOCK or not _can_be_cut(node):
        yield _sum(name, file.read(name), node)
        return
    rows = max(1, BLOCK * entry.shape[0] // entry.size)
    for start in range(0, entry.shape[0], rows):
        stop = min(start + rows, entry.shape[0])
        yield _sum(name, file.read(name, (start, stop)), _rows(node, start, stop))


def _sum(name: str, array: np.ndarray, node: Any) -> np.ndarray:
    return np.asarray(merge({name: array}, {name: node}, check_finite=True)[name])


def _can_be_cut(node: Any) -> bool:
    """Whether rows of the sum need rows of the factors alone."""
    if isinstance(node, DoRAFactors):  # the norm of an output is over all of its inputs
        return 0 not in node.axes.contract
    return isinstance(node, LoRAFactors | FullDelta | VeRAFactors | AdaLoRAFactors)


def _rows(node: Any, start: int, stop: int) -> Any:
    """The node of a block of rows."""

    def cut(array: Any, dims: tuple[Any, ...]) -> Any:
        return array[tuple(slice(start, stop) if d == 0 else slice(None) for d in dims)]

    return jax.tree.map(cut, node, node.dims())


def _copy(source: BinaryIO, out: BinaryIO, start: int, size: int) -> int:
    """Copies bytes, within the kernel where it can; returns how many."""
    out.flush()
    done = 0
    while done < size:
        try:
            count = os.copy_file_range(
                source.fileno(), out.fileno(), min(size - done, 2**28), start + done
            )
        except (AttributeError, OSError):  # not on this system, or not between these
            source.seek(start + done)
            data = source.read(min(size - done, 2**24))
            count = out.write(data)
            out.flush()
        if not count:
            raise AdapterFileError(f"{source.name} was cut off while it was read.")
        done += count
    out.seek(0, os.SEEK_END)
    return size


def _targets(base: Base, adapter: Path, out: Path, force: bool) -> list[tuple[TensorFile, Path]]:
    if not base.is_folder:
        target = out / base.path.name if out.is_dir() else out
        check_output(target, [adapter], base, force=force)
        return [(base.files[0], target)]
    if out.exists() and not out.is_dir():
        raise AdapterFileError(f"{out} is a file, the base a folder; wanted a folder.")
    check_output(out, [adapter], base, force=True)  # what it holds is looked at when it is begun
    return [(file, out / file.path.name) for file in base.files]


def _check_space(out: Path, targets: list[tuple[TensorFile, Path]]) -> None:
    """Raises `AdapterFileError` if the disk has no room for what is to be written."""
    needed = sum(file.path.stat().st_size for file, _ in targets)
    place = next(parent for parent in (out, *out.resolve().parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise AdapterFileError(
            f"{out} needs {needed / 2**30:.1f} GiB, and its disk has {free / 2**30:.1f} GiB free."
        )


def _begin(out: Path, base: Base, adapter: Path) -> None:
    """Makes the folder, or goes on in it if it was begun for the same files."""
    out.mkdir(parents=True, exist_ok=True)
    state = out / STATE
    current = {"base": _fingerprint(file.path for file in base.files), "adapter": _digest(adapter)}
    if state.exists():
        if state.read_text(encoding="utf-8") != json.dumps(current):
            raise AdapterFileError(
                f"{out} holds an unfinished merge of other files; wanted another folder, or this "
                "one removed."
            )
        for half in out.glob(".*.tmp"):  # of a run that was killed
            half.unlink()
        return
    begun = set(out.glob(f".{STATE}.*.tmp"))  # of a run that was killed before it had a state
    if set(out.iterdir()) - begun:
        raise AdapterFileError(f"{out} is not empty; wanted a new folder.")
    for half in begun:
        half.unlink()
    with replacing(state) as temporary:
        temporary.write_text(json.dumps(current), encoding="utf-8")


def _finish(base: Path, out: Path) -> None:
    """Copies what else the folder has, the index last, and forgets the state."""
    others = [
        path
        for path in sorted(base.iterdir(), key=lambda path: path.name.endswith(".index.json"))
        if path.is_file() and path.suffix in COPIED and not path.name.startswith(".")
    ]
    for path in others:
        with replacing(out / path.name) as temporary:
            shutil.copyfile(path, temporary)
    (out / STATE).unlink()


def _fingerprint(paths: Iterator[Path]) -> list[list[Any]]:
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in paths]


def _digest(adapter: Path) -> str:
    """Of the adapter's content."""
    digest = hashlib.sha256()
    names = ("adapter_config.json", "adapter_model.safetensors")
    for path in [adapter / name for name in names] if adapter.is_dir() else [adapter]:
        digest.update(path.read_bytes())
    return digest.hexdigest()
