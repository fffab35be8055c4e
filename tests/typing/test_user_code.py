"""The code that mypy checks is code that runs, and mypy would see a mistake in it."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from . import user_code

ROOT = Path(__file__).parents[2]
PARAMS = {"up": jnp.ones((4, 3)), "down": jnp.ones((3, 2))}


def test_it_runs():
    with jax.numpy_dtype_promotion("standard"):  # as a user has it
        merged, losses = user_code.fine_tune(PARAMS, jnp.ones((2, 4)), steps=3)
    assert set(merged) == {"up", "down"}
    assert losses[-1] < losses[0]
    assert "up" in user_code.what_went_wrong(PARAMS)


MISTAKES = [
    ('dense="error"', 'dense="never"', "incompatible type"),
    ("rank=2, alpha=4)", 'rank="two", alpha=4)', "incompatible type"),
    ("lora.Full(r", "lora.Fool(r", "has no attribute"),
    ("check_finite=True", "check_finight=True", "Unexpected keyword"),
]


def test_mypy_sees_mistakes(tmp_path):
    text = (ROOT / "tests" / "typing" / "user_code.py").read_text()
    lines = {}
    for good, bad, said in MISTAKES:
        lines[text[: text.index(good)].count("\n") + 1] = said
        text = text.replace(good, bad, 1)
    file = tmp_path / "user_code.py"
    file.write_text(text)
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", file]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(lines) == len(MISTAKES)
    for line, said in lines.items():
        assert re.search(rf":{line}: error: .*{said}", done.stdout), done.stdout
