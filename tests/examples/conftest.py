"""Makes `minilm` and `finetune_minilm` importable, as they are for a script in `examples/`."""

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from minilm import data

_collect_once = functools.cache(data.collect)


@pytest.fixture(autouse=True)
def sources_read_once(monkeypatch):
    """Reading the standard library's sources takes seconds, and many of these tests do it."""
    monkeypatch.setattr(data, "collect", lambda *folder: list(_collect_once(*folder)))
