"""The table of operations: every case whose weights must stay factored."""

from tests.battery.cases import (
    control,
    conv,
    derivatives,
    dot,
    lookup,
    ragged,
    shapes,
    sharded,
)

FACTORED = [
    *dot.CASES,
    *conv.CASES,
    *lookup.CASES,
    *ragged.CASES,
    *shapes.CASES,
    *control.CASES,
    *derivatives.CASES,
    *sharded.CASES,
]
