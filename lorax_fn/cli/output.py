"""What may be written: nothing that is read, and nothing that is there unless it is forced."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lorax_fn.cli.base import Base
from lorax_fn.errors import AdapterFileError
from lorax_fn.io.peft_config import CONFIG, WEIGHTS


def check_output(out: Path, adapters: Iterable[Path], base: Base | None, *, force: bool) -> None:
    """Raises `AdapterFileError` unless a file may be written at `out`.

    Never in the place of the base or of an adapter, nor in an adapter's folder; in the place of
    another file with `force` alone.
    """
    own = () if base is None else (base.path, *(file.path for file in base.files))
    for path in own:
        if _is_same(out, path):
            raise AdapterFileError(f"{out} is the base itself; wanted another place.")
    for path in adapters:
        if any(_is_same(place, path) for place in (out, *out.resolve().parents)):
            raise AdapterFileError(f"{out} belongs to the adapter {path}; wanted another place.")
    if out.exists() and not force:
        raise AdapterFileError(f"{out} is there already; wanted another place, or --force.")


def check_peft_folder(
    out: Path, adapters: Iterable[Path], base: Base | None, *, force: bool
) -> None:
    """`check_output` for both files of a PEFT folder."""
    adapters = list(adapters)
    for name in (WEIGHTS, CONFIG):
        check_output(out / name, adapters, base, force=force)


def _is_same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve() or (a.exists() and b.exists() and a.samefile(b))
