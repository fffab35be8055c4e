"""One library in one process: `python -m benchmarks.rivals.worker NAME`, commands on stdin.

    prepare FOLDER    builds and compiles the training step; what it costs, and its first losses
    time CALLS        seconds of a step by the clock, and of the processor; the mean of so many
    structures        which structures the library can adapt

Answers each with a line of JSON on stdout; all else that is printed goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.rivals import problem


def main(name: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library may print what it likes
    rival = importlib.import_module(f"benchmarks.rivals.{name}")
    step: Any = None
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "prepare":
            step = rival.Step(problem.read(Path(argument)))
            answer: Any = step.costs()
        elif command == "time":
            answer = seconds(step, int(argument))
        else:
            answer = rival.structures()
        print(json.dumps(answer), file=answers, flush=True)


def seconds(step: Callable[[], Any], calls: int) -> tuple[float, float]:
    """Of a call, by the clock and of the processor: the latter counts no other process's work."""
    begin = time.perf_counter(), time.process_time()
    for _ in range(calls):
        step()
    end = time.perf_counter(), time.process_time()
    return (end[0] - begin[0]) / calls, (end[1] - begin[1]) / calls


if __name__ == "__main__":
    main(sys.argv[1])
