"""The command line, called as its entry point calls it."""

import dataclasses
import json

import pytest

typer = pytest.importorskip("typer")

from lorax_fn.cli.app import run


@dataclasses.dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def cli(monkeypatch, capfd):
    """`cli("inspect", path)`: the exit code, and what was printed."""

    def call(*words):
        capfd.readouterr()
        monkeypatch.setattr("sys.argv", ["lorax-fn", *map(str, words)])
        code = run()
        out, err = capfd.readouterr()
        return Done(code, out, err)

    return call
