"""safetensors files: opened with every size checked before it is allocated, written whole or not.

The library parses the header and refuses offsets that overlap, leave holes or go beyond the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.errors import AdapterFileError, LoraError
from lorax_fn.interpreter import dequantize
from lorax_fn.leaves import check_installed, is_quantized

LARGEST_HEADER = 16 * 2**20  # bytes; 100,000 tensors need about 10 MiB

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
"""The dtypes of factors, by their names in a header."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor of a file lies: `size` bytes from `start`; dtype is the header's word."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """An opened file: what its header says. The data is read tensor by tensor."""

    path: Path
    metadata: dict[str, str]
    entries: dict[str, Entry]  # in the order of their data

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor.

        Raises:
            AdapterFileError: if it is one that no factor has.
        """
        word = self.entries[name].dtype
        if word not in DTYPES:
            raise AdapterFileError(
                f"{self.path}: tensor {name!r} has dtype {word}; wanted one of {', '.join(DTYPES)}."
            )
        return DTYPES[word]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """One tensor, or its rows from the first number up to the second.

        Raises:
            AdapterFileError: if it has a dtype that no factor has.
        """
        entry, dtype = self.entries[name], self.dtype(name)
        start, size, shape = entry.start, entry.size, entry.shape
        if rows is not None:
            row = size // shape[0]
            start, size = start + rows[0] * row, (rows[1] - rows[0]) * row
            shape = (rows[1] - rows[0], *shape[1:])
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(size)
        if len(data) != size:
            raise AdapterFileError(f"{self.path} was cut off while it was read.")
        return np.frombuffer(data, dtype).reshape(shape)

    def read_finite(self, name: str) -> np.ndarray:
        """One tensor of finite numbers.

        Raises:
            AdapterFileError: if it holds a NaN or an infinity, or has a dtype that no factor has.
        """
        array = self.read(name)
        if not is_finite(array):
            raise AdapterFileError(
                f"{self.path}: tensor {name!r} holds a NaN or an infinity: the file is damaged, or "
                "the training that wrote it diverged."
            )
        return array


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Opens a safetensors file and checks its header against its size; reads no data.

    Raises:
        AdapterFileError: if it is no whole safetensors file.
    """
    path = Path(path)
    safetensors = import_safetensors()
    try:
        start = _data_start(path)
        with safetensors.safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
        headers = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (safetensors.SafetensorError, UnicodeError) as e:
        raise AdapterFileError(f"{path} is damaged, or no safetensors file: {e}.") from e
    except OSError as e:
        raise AdapterFileError(f"{path} cannot be read: {e.strerror or e}.") from e
    entries = {}
    for name, (dtype, shape) in headers.items():  # the library has seen that there are no holes
        size = _n_bytes(dtype, shape)
        entries[name] = Entry(dtype, shape, start, size)
        start += size
    return TensorFile(path, metadata, entries)


def write_tensors(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file; to be called on a path that `replacing` gave.

    Raises:
        OSError: if the disk is full, or the folder is missing.
    """
    safetensors = import_safetensors()
    from safetensors.numpy import save_file

    try:
        whole = {  # np.ascontiguousarray alone would give a scalar a dim
            name: array if array.flags.c_contiguous else np.ascontiguousarray(array)
            for name, array in arrays.items()
        }
        save_file(whole, path, dict(metadata))
    except safetensors.SafetensorError as e:  # what the library makes of the system's errors
        raise OSError(f"{path} cannot be written: {e}") from e


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path beside this one to write to, and moves it here if nothing is raised.

    Whatever stood here stays until the new file is on disk.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        sync(temporary)  # on disk before it has the name
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Returns when what was written to a file is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def floating(path: str, leaf: Any) -> Any:
    """The floating array that a leaf is, or stands for where it is quantised.

    Raises:
        LoraError: if it is quantised, and qwix is not installed.
    """
    if not is_quantized(leaf):
        return leaf
    check_installed(path)
    return dequantize(leaf)


def host_array(path: str, array: Any) -> np.ndarray:
    """A factor as numpy has it, fit to be written.

    Raises:
        LoraError: if it is traced, lies on other hosts, is not floating, or is not finite.
    """
    if isinstance(array, jax.core.Tracer):
        raise LoraError(f"{path!r} is traced: files are written outside of jax.jit.")
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        raise LoraError(
            f"{path!r} lies on several hosts; gather the factors first, by "
            "jax.experimental.multihost_utils.process_allgather(factors, tiled=True)."
        )
    if not hasattr(array, "dtype") or isinstance(array, jax.ShapeDtypeStruct):
        raise LoraError(f"{path!r} is a {type(array).__name__}; wanted an array.")
    if array.dtype not in DTYPES.values():
        raise LoraError(f"{path!r} has dtype {array.dtype}; wanted float64, 32, 16 or bfloat16.")
    array = np.asarray(array)
    if not is_finite(array):
        raise LoraError(
            f"{path!r} holds a NaN or an infinity: training has diverged. Save factors of an "
            "earlier step."
        )
    return array


def is_finite(array: np.ndarray) -> bool:
    """Whether no entry is a NaN or an infinity."""
    with np.errstate(invalid="ignore"):  # a signalling NaN in half precision
        return bool(np.isfinite(array).all())


def device_array(array: np.ndarray) -> Any:
    """A JAX array, or the array itself where JAX has disabled its dtype (float64)."""
    enabled = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
    return jax.device_put(array) if enabled else array  # compiles nothing, unlike jnp.asarray


def import_safetensors() -> Any:
    """The library, at the first use of a file."""
    import safetensors

    return safetensors


def _data_start(path: Path) -> int:
    """Where the data begins, once the header's length has been found to be possible."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise AdapterFileError(
            f"{path} has {size} bytes, fewer than its header asks for: it is cut off, or no "
            "safetensors file."
        )
    if length > LARGEST_HEADER:
        raise AdapterFileError(
            f"{path} claims a header of {length} bytes, above the limit of {LARGEST_HEADER}; it "
            "is refused unread."
        )
    return 8 + length


def _n_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    bits = 8 if dtype == "BOOL" else int(re.sub(r"\D", "", dtype.partition("_")[0]))
    return math.prod(shape) * bits // 8
