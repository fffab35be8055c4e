"""Reading XLA's HLO text: its computations, their instructions, how often loops run."""

from __future__ import annotations

import dataclasses
import math
import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
    r"|\bbranch_computations=\{([^}]*)\}"
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_BYTES = {"pred": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "c64": 8, "c128": 16}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: `%name = type opcode(operands), attributes`."""

    name: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]  # (dtype, shape): of a tuple, each part's
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    literal: str = ""  # of a constant

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result, or of the first part of a tuple."""
        return self.arrays[0][1] if self.arrays else ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def called(self) -> list[str]:
        """The computations named by attributes such as `calls=%f` and `branch_computations={…}`."""
        named = [name for found in _CALLED.findall(self.attributes) for name in found if name]
        return [name.strip(" %") for names in named for name in names.split(",")]

    def dims(self, key: str) -> list[int]:
        """The numbers of an attribute such as `lhs_contracting_dims={0,1}` (or, quoted, JSON's)."""
        match = re.search(rf'{key}"?[=:][{{\[]([\d,"]*)[}}\]]', self.attributes)
        return [int(d) for d in re.findall(r"\d+", match[1])] if match else []


def trip_count(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
    """How often a `while` runs: as XLA noted, or what its counter from zero is compared with.

    Raises:
        ValueError: if neither is to be found.
    """
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(found[1])
    condition = computations[re.search(r"condition=%?([\w.\-]+)", loop.attributes)[1]]
    limits = [i.literal for i in condition if i.opcode == "constant" and i.literal.isdigit()]
    tests = [i for i in condition if i.opcode == "compare"]
    if len(limits) == len(tests) == 1 and "direction=LT" in tests[0].attributes:
        return int(limits[0])
    raise ValueError(f"the loop {loop.name} has no trip count; wanted one to count by.")


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """The bytes of an array of one of HLO's dtypes (`f32`, `s8`, `pred`, …)."""
    width = _BYTES.get(dtype) or int(re.sub(r"\D", "", dtype)) // 8
    return width * math.prod(shape)


def parse(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            entry = name if header[1] else entry
            computations[name] = []
        elif found := _INSTRUCTION.match(line):
            computations[name].append(_instruction(found[1], found[2]))
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    """Splits `type opcode(operands), attributes`; a tuple's type is itself in parentheses."""
    type_end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    opcode, _, rest = text[type_end:].strip().partition("(")
    end = _closing("(" + rest, 0) - 2
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
    arrays = tuple(
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _ARRAY.findall(text[:type_end])
    )
    literal = rest[:end] if opcode == "constant" else ""
    return Instruction(name, arrays, opcode, operands, rest[end:], literal)


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return index + 1
    raise ValueError(f"No closing parenthesis in HLO: {text[start : start + 80]}…")
