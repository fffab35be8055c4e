"""Prints pyproject.toml's lower bounds as exact pins, one a line, for `.ci/run oldest`."""

import re
import tomllib
from pathlib import Path

EXTRAS = ("test", "examples", "serve", "checkpoint")

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
requirements = list(project["dependencies"])
for extra in EXTRAS:
    requirements += project["optional-dependencies"][extra]

pins = {}
for requirement in requirements:
    found = re.match(r"([\w.-]+)\s*>=\s*([\w.]+)", requirement)
    if found is None:
        raise SystemExit(f"{requirement!r} has no lower bound: write it as name>=version")
    pins[found[1]] = found[2]
pins["jaxlib"] = pins["jax"]  # jax asks for a range: the oldest of it is the one of its own number
print("\n".join(f"{name}=={version}" for name, version in pins.items()))
