"""The documentation: each page's code runs, in order; each public name has its place in the API."""

import re
import shlex
import sys
import types
from pathlib import Path

import jax
import pytest

import lorax_fn as lora
from lorax_fn.cli.app import run

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
COMMAND = re.compile(r"^lorax-fn (.*)$", re.MULTILINE)
FENCE = re.compile(r"^([ ]*)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def blocks(page):
    """(language, line number of the first line, code) of each fenced block."""
    text = page.read_text()
    for found in FENCE.finditer(text):
        yield found[2], text[: found.start(3)].count("\n"), found[3]


def name_of(page):
    return page.relative_to(ROOT).as_posix()


RUNNABLE = [page for page in PAGES if any(language == "python" for language, *_ in blocks(page))]


@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_the_code_of_a_page_runs_in_order(page, tmp_path, monkeypatch, capsys):
    """Every `python` block, in one namespace, and `lorax-fn` in those of the shell.

    What cannot run here is fenced as `py`.
    """
    monkeypatch.chdir(tmp_path)
    assert jax.device_count() == 8  # the page on sharding uses them
    namespace = {"__name__": "page"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for language, line, code in blocks(page):
            if language == "python":
                exec(compile("\n" * line + code, name_of(page), "exec"), namespace)
            for command in COMMAND.findall(code) if language == "sh" else ():
                monkeypatch.setattr(sys, "argv", ["lorax-fn", *shlex.split(command)])
                assert run() == 0, (command, capsys.readouterr().err)


def test_most_pages_have_code_that_runs():
    assert len(RUNNABLE) >= 12


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_that_do_not_run_are_marked_and_still_are_python(page):
    for language, line, code in blocks(page):
        assert language in {"python", "py", "sh", "text"}
        if language == "py":
            lines = [
                text.removeprefix("    ") if text.startswith("    ") else text
                for text in code.split("\n")
            ]  # a tab's block is indented
            compile("\n".join(lines), f"{name_of(page)}:{line}", "exec")


def test_what_a_docstring_shows_becomes_its_examples(monkeypatch):
    griffe = types.SimpleNamespace(Extension=object, Object=object)
    monkeypatch.setitem(sys.modules, "griffe", griffe)
    code = (ROOT / "docs" / "doctests.py").read_text()
    namespace: dict = {"__name__": "doctests"}
    exec(compile(code, "doctests.py", "exec"), namespace)
    with_heading = namespace["with_heading"]
    assert with_heading("Says so.\n\n>>> f(1)\n2") == (
        "Says so.\n\n\nExamples:\n    >>> f(1)\n    2"
    )
    assert with_heading("Has none: a >>> b.") == "Has none: a >>> b."


def test_the_reference_has_every_public_name():
    reference = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(r"^::: lorax_fn\.(\w+)$", reference, re.MULTILINE)
    assert sorted(listed) == sorted(lora.__all__)
