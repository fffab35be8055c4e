"""For mkdocstrings: what a docstring shows as `>>>` becomes its section of examples."""

from __future__ import annotations

from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Puts a heading above a docstring's first `>>>`, as griffe's Google style wants it."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:  # noqa: ARG002
        """Rewrites the docstring of each object."""
        if obj.docstring:
            obj.docstring.value = with_heading(obj.docstring.value)


def with_heading(text: str) -> str:
    """The text with all from its first `>>>` on below "Examples:"."""
    before, prompt, after = f"\n{text}".partition("\n>>> ")
    if not prompt:
        return text
    examples = f">>> {after}".split("\n")
    indented = "\n".join(f"    {line}".rstrip() for line in examples)
    return f"{before[1:]}\n\nExamples:\n{indented}"
