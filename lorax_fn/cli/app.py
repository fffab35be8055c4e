"""The commands. Exit codes: 0 done, 1 adapters differ or the system failed, 2 bad input."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

import lorax_fn
from lorax_fn.cli.adapters import compare, describe, read_nodes
from lorax_fn.cli.base import open_base
from lorax_fn.cli.combine import combine_files
from lorax_fn.cli.convert import convert as convert_adapter
from lorax_fn.cli.merge import merge_files
from lorax_fn.errors import LoraError
from lorax_fn.io.ready_names import READY
from lorax_fn.report import aligned

app = typer.Typer(
    name="lorax-fn",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Adapter = Annotated[Path, typer.Argument(help="A file of lora.save, or a PEFT folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace a file that is there.")]
BasePath = Annotated[
    Path | None,
    typer.Option("--base", help="The base: a safetensors file, or a folder of shards."),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        _print(f"lorax-fn {lorax_fn.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """LoRA adapters in files: the library's own, and Hugging Face PEFT's folders."""


@app.command()
def inspect(adapter: Adapter, as_json: AsJson = False) -> None:
    """Show what an adapter holds: kinds, ranks, scales, shapes, sizes.

    lorax-fn inspect adapter
    """
    described = describe(adapter)
    if as_json:
        _print_json(described)
        return
    rows = [
        [
            node["path"],
            node["kind"],
            *("" if node[key] is None else f"{node[key]:g}" for key in ("rank", "scale")),
            " ".join(f"{name}{shape}" for name, shape in node["arrays"].items()),
            " ".join(node["dtype"]),
        ]
        for node in described["nodes"]
    ]
    _print_table(["path", "kind", "rank", "scale", "arrays", "dtype"], rows)
    _print(
        f"{described['format']}, {len(rows)} weights, {described['numbers']:,} numbers, "
        f"{described['bytes']:,} bytes"
    )


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="A safetensors file, or a folder of shards.")],
    adapter: Adapter,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file or folder to write.")],
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Add an adapter into a base, tensor by tensor; a base larger than memory merges.

    The same command resumes a folder whose merge was interrupted. A tensor that the model ties
    (embedding and output head) changes in both uses.

    lorax-fn merge base.safetensors adapter --out merged.safetensors
    """

    @contextlib.contextmanager
    def progress(total: int) -> Iterator[Any]:
        off = True if quiet or as_json else None  # None: off where nobody looks
        with tqdm(total=total, unit="B", unit_scale=True, disable=off) as bar:
            yield bar

    done = merge_files(base, adapter, out, progress, force=force)
    if as_json:
        _print_json(done)
    else:
        _print(f"{done['out']}: {done['merged']} weights merged, {done['files']} files.")


@app.command()
def convert(
    source: Adapter,
    out: Annotated[Path, typer.Argument(help="The folder or file to write, of the other format.")],
    base: BasePath = None,
    names: Annotated[
        str | None,
        typer.Option(help=f"How params are called: {', '.join(READY)}."),
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Convert a PEFT folder to a file, or a file to a PEFT folder.

    Without --names the paths in the file are the parameters' names in PyTorch. DoRA, and modules
    that were trained whole, need --base.

    lorax-fn convert adapter task.safetensors
    """
    opened = None if base is None else open_base(base)
    done = convert_adapter(source, out, opened, names, force=force)
    if as_json:
        _print_json(done)
    else:
        _print(f"{done['out']}: {done['format']}.")


@app.command()
def diff(a: Adapter, b: Adapter, base: BasePath = None, as_json: AsJson = False) -> None:
    """Compare two adapters, of either format. Exit code 0 if they are the same, 1 if not.

    lorax-fn diff adapter task.safetensors
    """
    opened = None if base is None else open_base(base)
    rows = compare(read_nodes(a, opened), read_nodes(b, opened))
    if as_json:
        _print_json({"same": not rows, "differences": rows})
    elif rows:
        cells = [[row["path"], row["difference"], _details(row)] for row in rows]
        _print_table(["path", "difference", "details"], cells)
    else:
        _print("The adapters are the same.")
    if rows:
        raise typer.Exit(1)


@app.command()
def combine(
    adapters: Annotated[list[Path], typer.Argument(help="Files, or PEFT folders, of one base.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="What to write, in the same format.")],
    weights: Annotated[
        list[float] | None,
        typer.Option("--weight", "-w", help="One for each adapter, in order. Default: the mean."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="cat (exact), svd, linear, ties, dare_linear, … as PEFT calls them.")
    ] = "cat",
    rank: Annotated[int | None, typer.Option(help="Of the result, for svd methods.")] = None,
    density: Annotated[float | None, typer.Option(help="The share of entries to keep.")] = None,
    seed: Annotated[int | None, typer.Option(help="For dare methods.")] = None,
    base: BasePath = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Make one adapter of several, weighted.

    lorax-fn combine first second --weight 0.7 --weight 0.3 --out both
    """
    opened = None if base is None else open_base(base)
    options = {"method": method, "rank": rank, "density": density, "seed": seed}
    done = combine_files(adapters, out, weights or [], opened, force=force, **options)
    if as_json:
        _print_json(done)
    else:
        _print(f"{done['out']}: {len(adapters)} adapters combined by {method}.")


def _details(row: dict[str, Any]) -> str:
    parts = [*row.get("settings", {}).items(), *row.get("shapes", {}).items()]
    parts += [(name, f"±{value:.3g}") for name, value in row.get("largest", {}).items()]
    parts += row.get("dtypes", {}).items()
    return ", ".join(f"{name} {value}" for name, value in parts)


def run() -> int:
    """Runs the command that was given; returns its exit code, errors said in one line."""
    try:
        code = app(standalone_mode=False)
    except LoraError as e:
        return _fail(2, str(e))
    except OSError as e:
        return _fail(1, f"{e.strerror or e}{f': {e.filename}' if e.filename else ''}")
    except typer.Abort:
        return _fail(130, "stopped.")
    except Exception as e:
        message = getattr(e, "format_message", None)  # of click, which typer may bring itself
        if message is None:
            raise
        return _fail(getattr(e, "exit_code", 2), message())
    return int(code or 0)


def _fail(code: int, message: str) -> int:
    sys.stderr.write(f"lorax-fn: {_printable(' '.join(message.split()))}\n")
    return code


def _print(text: str) -> None:
    sys.stdout.write(f"{_printable(text)}\n")


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    cells = [[_printable(cell) for cell in row] for row in rows]
    sys.stdout.write(f"{aligned(header, cells)}\n")


def _printable(text: str) -> str:
    """The text, for a terminal: names out of files may hold what moves its cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _print_json(value: Any) -> None:
    sys.stdout.write(f"{json.dumps(value, indent=2)}\n")  # which escapes what is no letter
