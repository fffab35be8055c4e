"""The weights of a model in safetensors files: one file, or a folder of shards. Read on demand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lorax_fn.errors import AdapterFileError
from lorax_fn.io.tensors import TensorFile, open_tensors

INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file, as good as an array to whoever asks for its shape; read when used."""

    file: TensorFile
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.file.entries[self.name].shape

    @property
    def ndim(self) -> int:
        """The number of its dims."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """Its dtype."""
        return self.file.dtype(self.name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.file.read(self.name)
        return array if dtype is None else array.astype(dtype, copy=bool(copy))


@dataclasses.dataclass(frozen=True)
class Base:
    """The files of one model."""

    path: Path
    files: tuple[TensorFile, ...]

    @property
    def is_folder(self) -> bool:
        """Whether the model is a folder of files."""
        return self.path.is_dir()

    def tensors(self) -> dict[str, Any]:
        """Every tensor that a factor could belong to, by its name."""
        return {
            name: LazyTensor(file, name)
            for file in self.files
            for name, entry in file.entries.items()
            if entry.dtype in ("F64", "F32", "F16", "BF16")
        }


def open_base(path: Path) -> Base:
    """Opens the safetensors file, or all of a folder.

    Raises:
        AdapterFileError: if there are none, they are damaged, or the index names others.
    """
    if not path.is_dir():
        return Base(path, (open_tensors(path),))
    shards = sorted(path.glob("*.safetensors"))
    index = path / INDEX
    if index.exists():
        wanted = _shards_of(index)
        missing = sorted(wanted - {shard.name for shard in shards})
        if missing:
            raise AdapterFileError(f"{path} lacks {missing[0]!r}, which its index names.")
        shards = [shard for shard in shards if shard.name in wanted]
    if not shards:
        raise AdapterFileError(f"{path} holds no safetensors file.")
    base = Base(path, tuple(open_tensors(shard) for shard in shards))
    _check_once(base.files)
    return base


def _shards_of(index: Path) -> set[str]:
    """The files that an index names; names alone, for they are looked up in its folder."""
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
        raise AdapterFileError(f"{index} is no index of shards: {e!r}.") from e
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise AdapterFileError(f"{index} names the file {shard!r}; wanted a name without path.")
    return shards


def _check_once(files: Iterable[TensorFile]) -> None:
    seen: dict[str, Path] = {}
    for file in files:
        for name in file.entries:
            if name in seen:
                raise AdapterFileError(f"{file.path} and {seen[name]} both hold {name!r}.")
            seen[name] = file.path
