"""What a partitioned program sends between devices, loop bodies counted as often as they run.

Reads the HLO text that XLA's SPMD partitioner leaves: there every array still has the dtype of the
model (the CPU backend later widens bfloat16). Bytes are those that one device sends in a ring of n:

    all-gather          the result      · (n - 1)/n
    reduce-scatter      the operand     · (n - 1)/n
    all-to-all          the operand     · (n - 1)/n
    all-reduce          the operand     · 2 (n - 1)/n
    collective-permute  the operand
"""

from __future__ import annotations

import dataclasses
import math
import re

from benchmarks.hlo import Instruction, nbytes, parse, trip_count

WEIGHTS = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,  # its result is an n-th of the operand
    "all-to-all": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "collective-permute": lambda n: 1,
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that a collective moves, and how often."""

    kind: str
    dtype: str
    shape: tuple[int, ...]  # of the result, on one device
    group: int  # devices that take part together
    times: int

    @property
    def size(self) -> int:
        """How many numbers the result has."""
        return math.prod(self.shape)

    @property
    def sent(self) -> float:
        """Bytes that each device sends, all times together."""
        return self.times * nbytes(self.dtype, self.shape) * WEIGHTS[self.kind](self.group)


def collectives(hlo: str) -> list[Collective]:
    """Every array that the program moves between devices.

    Raises:
        ValueError: where a loop's trip count, or a group's size, is unknown.
    """
    computations, entry = parse(hlo)
    found: list[Collective] = []

    def visit(name: str, times: int) -> None:
        for i in computations[name]:
            kind = i.opcode.removesuffix("-start")
            if kind in WEIGHTS:
                n = group_size(i)
                found.extend(Collective(kind, d, s, n, times) for d, s in i.arrays if n > 1)
            inner = times * (trip_count(i, computations) if i.opcode == "while" else 1)
            for called in i.called:
                visit(called, inner)

    visit(entry, 1)
    return found


def group_size(i: Instruction) -> int:
    """How many devices of a collective exchange with each other."""
    if i.opcode.startswith("collective-permute"):
        return 2
    text = i.attributes
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        lengths = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(lengths[name]) for name in re.findall(r"'(\w+)'", axes[2]))
    if shape := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):
        return int(shape[2])
    if first := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(first[1].split(","))
    raise ValueError(f"the replica groups of {i.name} are not understood: {text[:120]}")
