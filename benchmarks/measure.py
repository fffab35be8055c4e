"""Compiling the variants and measuring them side by side."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import flops
from benchmarks.variants import Variant

REFERENCE = "handwritten"
SHORTEST_SAMPLE = 0.05  # seconds: faster steps are timed several at a time
TRAINED_ALIKE = (REFERENCE, "lorax_fn", "added_up")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one variant costs. Times in seconds, sizes in bytes."""

    flops: int
    temp_bytes: int
    trace_and_lower: float
    compile: float
    loss: float
    step: float
    step_ratio: float  # to the hand-written step of the same round; the median over rounds
    step_ratio_quartiles: tuple[float, float]


def costs(variants: dict[str, Variant], *, rounds: int, tolerance: float) -> dict[str, Cost]:
    """Compiles all variants, checks that they agree, and times their steps.

    Raises:
        ValueError: if the losses differ by more than `tolerance`.
    """
    tracing = trace_and_lower_times(variants, repeats=min(3, rounds))
    compiled, compile_times = {}, {}
    for name, variant in variants.items():
        lowered = jax.jit(variant.step).lower(*variant.operands)
        begin = time.perf_counter()
        compiled[name] = lowered.compile()
        compile_times[name] = time.perf_counter() - begin
    losses = {name: losses_of(compiled[name], variants[name]) for name in variants}
    check_agreement(losses, tolerance)

    steps = step_times(compiled, variants, rounds)
    ratios = {name: steps[name] / steps[REFERENCE] for name in steps}
    return {
        name: Cost(
            flops=flops.count(compiled[name].as_text()),
            temp_bytes=compiled[name].memory_analysis().temp_size_in_bytes,
            trace_and_lower=tracing[name],
            compile=compile_times[name],
            loss=losses[name][0],
            step=float(np.median(steps[name])),
            step_ratio=float(np.median(ratios[name])),
            step_ratio_quartiles=tuple(np.quantile(ratios[name], [0.25, 0.75]).tolist()),
        )
        for name in variants
    }


def trace_and_lower_times(variants: dict[str, Variant], *, repeats: int) -> dict[str, float]:
    """The least processor time (tracing uses one thread) of some traces from empty caches."""
    times = dict.fromkeys(variants, math.inf)
    for _ in range(repeats):
        for name, variant in variants.items():
            jax.clear_caches()
            begin = time.process_time()
            jax.jit(variant.step).lower(*variant.operands)
            times[name] = min(times[name], time.process_time() - begin)
    return times


def losses_of(compiled: Any, variant: Variant) -> tuple[float, float]:
    """The loss of the first step, and of one that starts where the first one ended."""
    trained, state, loss = compiled(*variant.operands)
    _, _, later = compiled(trained, state, *variant.operands[2:])
    return float(loss), float(later)


def check_agreement(losses: dict[str, tuple[float, float]], tolerance: float) -> None:
    """All variants start from one loss; those that train the same factors go the same way."""
    for step, names in ((0, tuple(losses)), (1, TRAINED_ALIKE)):
        for name in names:
            got, wanted = losses[name][step], losses[REFERENCE][step]
            if not abs(got - wanted) <= tolerance:
                raise ValueError(
                    f"{name} has loss {got:.6f} after {step} steps, {REFERENCE} {wanted:.6f}; "
                    f"wanted the same to {tolerance}. They do not compute the same thing, so their "
                    "times cannot be compared."
                )


def step_times(
    compiled: dict[str, Any], variants: dict[str, Variant], rounds: int
) -> dict[str, np.ndarray]:
    """Seconds of a step, (rounds,) for each variant."""
    steps = {
        name: functools.partial(compiled[name], *variant.operands)
        for name, variant in variants.items()
    }
    return interleaved(steps, rounds)


def interleaved(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of a call, (rounds,) for each function: every round times each of them once.

    A disturbance of the machine so meets neighbours alike, and ratios within a round stay true.
    """

    def sample(name: str, calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            out = steps[name]()
        jax.block_until_ready(out)
        return (time.perf_counter() - begin) / calls

    names = list(steps)
    calls = {name: math.ceil(SHORTEST_SAMPLE / sample(name, 1)) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(sample(name, calls[name]))
    return {name: np.array(seconds) for name, seconds in times.items()}
