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

import numpy as np

from benchmarks.hlo import Instruction, nbytes, parse, trip_count

WEIGHTS = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,  # its result is an n-th of the operand
    "all-to-all": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "collective-permute": lambda _: 1,
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that a collective moves, and how often."""

    kind: str
    dtype: str
    shape: tuple[int, ...]  # of the result, on one device
    devices: tuple[int, ...]  # the first of the groups that exchange with each other
    times: int

    @property
    def size(self) -> int:
        """How many numbers the result has."""
        return math.prod(self.shape)

    @property
    def sent(self) -> float:
        """Bytes that each device sends, all times together."""
        return self.times * nbytes(self.dtype, self.shape) * WEIGHTS[self.kind](len(self.devices))


def collectives(hlo: str) -> list[Collective]:
    """Every array that the program moves between devices.

    Raises:
        ValueError: where a loop's trip count, or a group of devices, is unknown.
    """
    computations, entry = parse(hlo)
    found: list[Collective] = []

    def visit(name: str, times: int) -> None:
        for i in computations[name]:
            kind = i.opcode.removesuffix("-start")
            if kind in WEIGHTS:
                group = first_group(i)
                arrays = i.arrays if len(group) > 1 else ()
                found.extend(Collective(kind, *array, group, times) for array in arrays)
            inner = times * (trip_count(i, computations) if i.opcode == "while" else 1)
            for called in i.called:
                visit(called, inner)

    visit(entry, 1)
    return found


def first_group(i: Instruction) -> tuple[int, ...]:
    """The devices of a collective that exchange with device 0, in any of HLO's three notations."""
    text = i.attributes
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return (int(pairs[1]), int(pairs[2]))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(map(int, listed[1].split(",")))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        lengths = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        named = re.findall(r"'(\w+)'", mesh[2])
        ids = np.arange(math.prod(lengths.values())).reshape(*lengths.values())
        others = tuple(slice(None) if name in named else 0 for name in lengths)
        return tuple(ids[others].ravel().tolist())
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        dims = [int(n) for n in iota[2].split(",")]
        order = [int(n) for n in iota[3].split(",")] if iota[3] else range(len(dims))
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(order).ravel()
        return tuple(ids[: int(iota[1])].tolist())
    raise ValueError(f"the replica groups of {i.name} are not understood: {text[:120]}")
