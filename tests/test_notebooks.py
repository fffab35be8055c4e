"""The stored notebooks: run, small, and free of what differs between runs and machines."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda file: file.name)
def notebook(request):
    return request.param, json.loads(request.param.read_text())


def test_there_are_the_notebooks_that_the_readers_are_sent_to():
    texts = [file.read_text() for file in [*NOTEBOOKS, *(ROOT / "docs").rglob("*.md")]]
    linked = {name for text in texts for name in re.findall(r"\b(\d\d_\w+)\.ipynb", text)}
    assert linked <= {file.stem for file in NOTEBOOKS}
    assert len(NOTEBOOKS) >= 5


def test_it_was_run_from_top_to_bottom_without_an_error(notebook):
    _, content = notebook
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds <= {"stream", "display_data", "execute_result"}


def test_it_has_pictures_and_words(notebook):
    _, content = notebook
    outputs = [output for cell in content["cells"] for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert sum(cell["cell_type"] == "markdown" for cell in content["cells"]) >= 5


def test_it_is_small_and_names_no_machine_and_no_time(notebook):
    file, content = notebook
    text = file.read_text()
    assert len(text) < 400_000
    assert not re.search(r"(?<![\w.~/-])/(?:work|root|home|opt|tmp)/", text)
    assert set(content["metadata"]) == {"kernelspec", "language_info"}
    assert content["metadata"]["language_info"] == {"name": "python"}
    assert not any(cell["metadata"] for cell in content["cells"])
    streams = [
        output
        for cell in content["cells"]
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream"
    ]
    assert all(output["name"] == "stdout" for output in streams), "a warning or a progress bar"
