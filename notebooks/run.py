"""Executes the notebooks from scratch, each in a fresh kernel; `--write` stores their outputs.

    python notebooks/run.py                 # all of them, as CI does
    python notebooks/run.py --write 02      # those whose names begin so, and keep what they print

What is stored has no times, no execution counts of this run and no machine's paths.
"""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
LARGEST = 400_000  # bytes of a stored notebook
TIMEOUT = 900  # seconds of a cell
_BAR = re.compile(r"\d+%\|")  # a progress bar tells the time it took


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=[""], help="how their files' names begin")
    parser.add_argument("--write", action="store_true", help="store what they print and draw")
    options = parser.parse_args(arguments)
    files = [f for f in sorted(FOLDER.glob("*.ipynb")) if f.name.startswith(tuple(options.names))]
    if not files:
        parser.error(f"no notebook begins with {' or '.join(options.names)}")
    for file in files:
        started = time.perf_counter()
        notebook = execute(file)
        if options.write:
            write(file, notebook)
        print(f"{file.name:24} {time.perf_counter() - started:5.0f} s", flush=True)


def execute(file: Path) -> Any:
    """The notebook with new outputs.

    Raises:
        CellExecutionError: if a cell raises; the message shows the cell and its traceback.
    """
    notebook = nbformat.read(file, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=TIMEOUT, resources=resources, record_timing=False).execute()
    return clean(notebook)


def clean(notebook: Any) -> Any:
    """Takes out what differs from run to run and from machine to machine."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if not _is_bar(out)]
            for output in cell.outputs:
                output.pop("metadata", None) if output.output_type == "stream" else None
                if "execution_count" in output:
                    output.execution_count = cell.execution_count
    return notebook


def _is_bar(output: Any) -> bool:
    return output.output_type == "stream" and bool(_BAR.search(output.text))


def write(file: Path, notebook: Any) -> None:
    """Stores it, if it is small enough to keep in a repository."""
    text = nbformat.writes(notebook) + "\n"
    if len(text) > LARGEST:
        raise SystemExit(f"{file.name} would have {len(text):,} bytes, more than {LARGEST:,}")
    file.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
