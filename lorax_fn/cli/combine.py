"""Combining adapters that lie in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from lorax_fn.arithmetic import combine
from lorax_fn.cli.adapters import read_nodes
from lorax_fn.cli.base import Base
from lorax_fn.cli.convert import write_folder
from lorax_fn.cli.output import check_output, check_peft_folder
from lorax_fn.errors import AdapterFileError
from lorax_fn.io.native import load, save


def combine_files(
    adapters: list[Path],
    out: Path,
    weights: list[float],
    base: Base | None,
    *,
    force: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Writes one adapter of several of one format, in that format.

    Args:
        adapters: files of `save`, or PEFT folders.
        out: the file or folder to write.
        weights: one for each adapter; none means the mean.
        base: needed where whole modules of PEFT are among what is combined.
        force: whether a file that is there may be replaced.
        options: of `lorax_fn.combine`; `seed` in place of its key.

    Raises:
        LoraError: if the adapters do not belong together, the method has no such option, or `out`
            is there already.
    """
    if len({path.is_dir() for path in adapters}) > 1:
        raise AdapterFileError("PEFT folders and files are mixed; convert them first.")
    weights = weights or [1 / len(adapters)] * len(adapters)
    if len(weights) != len(adapters):
        raise AdapterFileError(
            f"there are {len(weights)} weights and {len(adapters)} adapters; wanted -w for each."
        )
    check = check_peft_folder if adapters[0].is_dir() else check_output
    check(out, adapters, base, force=force)
    seed = options.pop("seed")
    options["key"] = None if seed is None else jax.random.key(seed)
    if not adapters[0].is_dir():
        save(out, combine([load(path) for path in adapters], weights, **options))
        return {"out": str(out), "format": "lorax_fn"}
    each = [read_nodes(path, base) for path in adapters]
    paths = sorted({path for nodes in each for path in nodes})
    trees = [{path: nodes.get(path) for path in paths} for nodes in each]
    write_folder(out, combine(trees, weights, **options), base, None)
    return {"out": str(out), "format": "PEFT"}
