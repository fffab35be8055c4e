"""Where a leaf of params lies in a PyTorch model: the parameter's name and layout."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

from lorax_fn.axes import Axes
from lorax_fn.errors import LoraError

Layout = Literal["linear", "fan_in_fan_out", "embedding", "conv", "experts", "vector"]


@dataclasses.dataclass(frozen=True)
class Place:
    """One leaf's parameter, or parameters, of a PyTorch model.

    Attributes:
        name: the parameter's whole name, "model.layers.3.mlp.up_proj.weight". A leaf that stacks
            layers has one parameter for each: "{}" stands for each of its batch dims in turn,
            "model.layers.{}.mlp.up_proj.weight"; or a function of their indices makes the name.
        layout: of the parameter. "linear" is (out, in); "fan_in_fan_out" (in, out), as GPT-2's
            Conv1D has it; "embedding" (vocabulary, features); "conv" (out, in, *kernel); "experts"
            a 3-D parameter, expert first, which PEFT adapts by its `target_parameters`; "vector"
            anything that has no product: biases, scales of norms.
        axes: the roles of the leaf's dims, where they are not those that the caller gives. The last
            batch dim of "experts" counts experts and has no "{}".
        swapped: of "experts": whether PEFT's A faces the outputs. It faces the parameter's last
            dim, or the middle one if the module has `is_transposed`.
        position: of "experts": 0 for the first parameter of its module that is adapted, and so on,
            in the order in which the module defines them.
        scale: the parameter is so many times the leaf; above 0.
        shift: of "vector": what is added to it then.
        interleaved: whether the last output dim of the leaf has the two halves of the parameter's
            in turn, first, second, first, …, as some rotary embeddings want them.

    Raises:
        LoraError: if scale is not finite and above 0, or what is no vector has a shift.

    >>> Place("model.layers.{}.mlp.up_proj.weight").slots((2,))[(1,)]
    'model.layers.1.mlp.up_proj.weight'
    """

    name: str | Callable[..., str]
    layout: Layout = "linear"
    axes: Axes | None = None
    swapped: bool = False
    position: int = 0
    scale: float = 1.0
    shift: float = 0.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise LoraError(f"scale={self.scale!r} of a Place; wanted a finite number above 0.")
        if self.shift and (self.layout != "vector" or not math.isfinite(self.shift)):
            raise LoraError(
                f"shift={self.shift!r} of a Place of layout {self.layout!r}; wanted a finite "
                "number, and 0 for all but a vector."
            )

    def slots(self, lengths: tuple[int, ...]) -> dict[tuple[int, ...], str]:
        """The parameter's name for every index of the dims that are numbered in it."""
        indices = list(itertools.product(*map(range, lengths)))
        if callable(self.name):
            return {index: self.name(*index) for index in indices}
        if self.name.count("{}") != len(lengths):
            raise LoraError(
                f"the name {self.name!r} numbers {self.name.count('{}')} dims, the leaf stacks "
                f"{len(lengths)}; wanted one {{}} for each of the leaf's batch dims, as in "
                "'model.layers.{}.mlp.up_proj.weight'. Pass names=, and axes= if they are unknown."
            )
        first, *others = self.name.split("{}")
        return {
            index: first + "".join(f"{i}{part}" for i, part in zip(index, others, strict=True))
            for index in indices
        }

    @property
    def numbered(self) -> int | None:
        """How many dims the name numbers, None where a function decides."""
        return None if callable(self.name) else self.name.count("{}")

    def describe(self) -> str:
        """The name, for messages."""
        return self.name if isinstance(self.name, str) else "made by a function"


Naming = Callable[[str, Any], Place | None]
