"""Floating-point operations of a compiled program, loop bodies counted as often as they run.

XLA's own `cost_analysis()["flops"]` counts the body of a loop once, whatever its trip count, so a
model that scans over its layers seems to cost a single layer. `count` walks the optimised HLO text
instead and multiplies by the trip counts that XLA found; on programs without loops it agrees with
`cost_analysis`, which the tests check.

Counted as XLA counts: two operations for each multiply-add of dots, convolutions and cuBLAS calls,
one for each element of an elementwise operation, none for transcendentals and data movement.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

from benchmarks.hlo import Instruction, parse, trip_count

ELEMENTWISE = frozenset({
    "abs", "add", "and", "ceil", "clamp", "compare", "complex", "convert", "divide", "floor",
    "imag", "is-finite", "maximum", "minimum", "multiply", "negate", "not", "or", "popcnt", "real",
    "remainder", "round-nearest-afz", "round-nearest-even", "select", "shift-left",
    "shift-right-arithmetic", "shift-right-logical", "sign", "subtract", "xor",
})  # fmt: skip


def count(hlo: str) -> int:
    """FLOPs of optimised HLO text, as `compiled.as_text()` gives it.

    Raises:
        ValueError: where a loop's trip count is unknown.
    """
    computations, entry = parse(hlo)

    @functools.cache
    def of_computation(name: str) -> int:
        body = {instruction.name: instruction for instruction in computations[name]}
        return sum(of_instruction(i, body) for i in body.values())

    def of_instruction(i: Instruction, body: dict[str, Instruction]) -> int:
        operands = [body[name] for name in i.operands]
        called = [of_computation(name) for name in i.called]
        if i.opcode == "while":
            return trip_count(i, computations) * sum(called)
        if i.opcode in ELEMENTWISE:
            return i.size
        return RULES.get(i.opcode, _calls)(i, operands, called)

    return of_computation(entry)


def _calls(_: Instruction, __: list[Instruction], called: list[int]) -> int:
    return sum(called)  # fusion, call, async; nothing for all that only moves data


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
    "conditional": _conditional,
    "reduce": _reduce,
    "reduce-window": _reduce_window,
    "scatter": _scatter,
    "dot": _dot,
    "convolution": _convolution,
    "custom-call": _custom_call,
}
