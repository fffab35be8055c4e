"""Converting adapters between PEFT's folders and the library's own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorax_fn.axes import Axes
from lorax_fn.cli.adapters import as_tree, params_of, read_nodes
from lorax_fn.cli.base import Base
from lorax_fn.cli.output import check_output, check_peft_folder
from lorax_fn.cli.torch_names import is_conv1d
from lorax_fn.errors import AdapterFileError
from lorax_fn.io.names import position_of
from lorax_fn.io.native import save
from lorax_fn.io.peft_load import load_peft
from lorax_fn.io.peft_save import save_peft
from lorax_fn.io.places import Layout, Naming, Place
from lorax_fn.io.ready_names import torch


def convert(
    source: Path, out: Path, base: Base | None, names: str | None, *, force: bool = False
) -> dict[str, Any]:
    """Writes the adapter in the other format: a PEFT folder as a file, a file as a PEFT folder.

    Without names, the paths in the file are the parameters' names in PyTorch. With names, they are
    those of params, which the base's tensors give; from a file to a folder the file itself does.

    Raises:
        LoraError: if the adapter has no form in the other format, the base is needed, or `out` is
            there already and not to be replaced by force.
    """
    if out.exists() and out.is_dir() != (not source.is_dir()):
        raise AdapterFileError(f"{out} exists, and is not what is to be written.")
    check = check_output if source.is_dir() else check_peft_folder
    check(out, [source], base, force=force)
    if source.is_dir():
        return _to_file(source, out, base, names)
    write_folder(out, read_nodes(source), base, names)
    return {"out": str(out), "format": "PEFT"}


def _to_file(source: Path, out: Path, base: Base | None, names: str | None) -> dict[str, Any]:
    if names is None:
        tree = nodes = read_nodes(source, base)
    else:
        if base is None:
            raise AdapterFileError(
                "--names needs --base: the tensors' names are the paths of params."
            )
        nodes = base.tensors()
        tree = load_peft(source, as_tree(nodes), names=names)
    save(out, tree)
    return {"out": str(out), "format": "lorax_fn"}


def write_folder(out: Path, nodes: dict[str, Any], base: Base | None, names: str | None) -> None:
    """Writes nodes as a PEFT folder; where there is no base, they tell the shapes themselves."""
    params = params_of(nodes)
    if base is not None:
        tensors = base.tensors()
        unknown = sorted(set(nodes) - set(tensors))
        if unknown:
            raise AdapterFileError(
                f"the adapter changes {unknown[0]!r}, and the base has no tensor of that name."
            )
        params = tensors
    factors = {path: nodes.get(path) for path in params}
    save_peft(out, params, factors, names=names or _torch_naming(nodes))


def _torch_naming(nodes: dict[str, Any]) -> Naming:
    """PyTorch's names; the nodes' axes tell an embedding from a Linear."""

    def naming(path: str, leaf: Any) -> Place:
        place = torch(path, leaf)
        axes = getattr(nodes.get(path), "axes", None)
        if axes == Axes(contract=(0,), out=(1,)):
            module = path.rpartition(".")[0]
            layout: Layout = "fan_in_fan_out" if is_conv1d(module) else "embedding"
            return Place(place.name, layout, axes)
        if axes is not None and axes.batch:
            own = path.rpartition(".")[2]
            return Place(place.name, "experts", axes, position=position_of(own))
        return place

    return naming
