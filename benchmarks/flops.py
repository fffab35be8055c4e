"""Floating-point operations of a compiled program, loop bodies counted as often as they run.

XLA's own `cost_analysis()["flops"]` counts the body of a loop once, whatever its trip count, so a
model that scans over its layers seems to cost a single layer. `count` walks the optimised HLO text
instead and multiplies by the trip counts that XLA found; on programs without loops it agrees with
`cost_analysis`, which the tests check.

Counted as XLA counts: two operations for each multiply-add of dots, convolutions and cuBLAS calls,
one for each element of an elementwise operation, none for transcendentals and data movement.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable

ELEMENTWISE = frozenset({
    "abs", "add", "and", "ceil", "clamp", "compare", "complex", "convert", "divide", "floor",
    "imag", "is-finite", "maximum", "minimum", "multiply", "negate", "not", "or", "popcnt", "real",
    "remainder", "round-nearest-afz", "round-nearest-even", "select", "shift-left",
    "shift-right-arithmetic", "shift-right-logical", "sign", "subtract", "xor",
})  # fmt: skip
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
    r"|\bbranch_computations=\{([^}]*)\}"
)
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: `%name = type opcode(operands), attributes`."""

    name: str
    shape: tuple[int, ...]  # of the result, or of the first part of a tuple
    opcode: str
    operands: tuple[str, ...]
    attributes: str

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


def count(hlo: str) -> int:
    """FLOPs of optimised HLO text, as `compiled.as_text()` gives it.

    Raises:
        ValueError: where a loop's trip count is unknown.
    """
    computations, entry = _parse(hlo)

    @functools.cache
    def of_computation(name: str) -> int:
        body = {instruction.name: instruction for instruction in computations[name]}
        return sum(of_instruction(i, body) for i in body.values())

    def of_instruction(i: Instruction, body: dict[str, Instruction]) -> int:
        operands = [body[name] for name in i.operands]
        called = [of_computation(name) for name in i.called]
        if i.opcode in ELEMENTWISE:
            return i.size
        return RULES.get(i.opcode, _calls)(i, operands, called)

    return of_computation(entry)


def _calls(_: Instruction, __: list[Instruction], called: list[int]) -> int:
    return sum(called)  # fusion, call, async; nothing for all that only moves data


def _while(i: Instruction, _: list[Instruction], called: list[int]) -> int:
    if trips := re.search(r'"known_trip_count":\{"n":"(\d+)"', i.attributes):
        return int(trips[1]) * sum(called)
    raise ValueError(f"XLA knows no trip count for the loop {i.name}; wanted one to count FLOPs.")


def _conditional(_: Instruction, __: list[Instruction], called: list[int]) -> int:
    return max(called)


def _reduce(i: Instruction, operands: list[Instruction], called: list[int]) -> int:
    return max(operands[0].size - i.size, 0) * sum(called)


def _reduce_window(i: Instruction, _: list[Instruction], called: list[int]) -> int:
    window = re.search(r"size=([\dx]+)", i.attributes)[1]
    return i.size * (math.prod(map(int, window.split("x"))) - 1) * sum(called)


def _scatter(_: Instruction, operands: list[Instruction], called: list[int]) -> int:
    return operands[-1].size * sum(called)


def _dot(i: Instruction, operands: list[Instruction], _: list[int]) -> int:
    summed = i.dims("lhs_contracting_dims") or i.dims("lhs_contracting_dimensions")
    return 2 * i.size * math.prod(operands[0].shape[d] for d in summed)


def _convolution(i: Instruction, operands: list[Instruction], _: list[int]) -> int:
    kernel = operands[1]
    labels = re.search(r"dim_labels=\w+_(\w+)->", i.attributes)[1]
    return 2 * i.size * kernel.size // kernel.shape[labels.index("o")]


def _custom_call(i: Instruction, operands: list[Instruction], _: list[int]) -> int:
    """cuBLAS and its like: their configuration holds the dimension numbers of the dot."""
    is_matmul = re.search(r'custom_call_target="[^"]*(gemm|matmul)', i.attributes)
    return _dot(i, operands, []) if is_matmul else 0


RULES: dict[str, Callable[[Instruction, list[Instruction], list[int]], int]] = {
    "while": _while,
    "conditional": _conditional,
    "reduce": _reduce,
    "reduce-window": _reduce_window,
    "scatter": _scatter,
    "dot": _dot,
    "convolution": _convolution,
    "custom-call": _custom_call,
}


def _parse(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
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
    shape = _SHAPE.search(text[:type_end])
    dims = tuple(int(n) for n in shape[1].split(",") if n) if shape else ()
    return Instruction(name, dims, opcode, operands, rest[end:])


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return index + 1
    raise ValueError(f"No closing parenthesis in HLO: {text[start : start + 80]}…")
