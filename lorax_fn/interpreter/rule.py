"""The table of rules, and what a rule may ask of the evaluation it is part of.

A rule is a function `(ctx, eqn, *operands) -> result` for one primitive, called when at least one
operand is a `Weight`. It returns what `eqn.primitive.bind` would (a list if the primitive has
several results), where any result may be a `Weight` again, or `NotImplemented` to have the weights
added up instead.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lorax_fn.interpreter import compat
from lorax_fn.interpreter.kronecker import NotFactoredError
from lorax_fn.interpreter.quantized import recomputed
from lorax_fn.interpreter.weight import Weight

RULES: dict[Any, Callable] = {}
"""Rules by primitive object; a name would outlive the primitive it once meant."""


@dataclasses.dataclass(frozen=True)
class Event:
    """One meeting of a weight and an operation: consumed in factored form, or added up.

    A weight that is not `adapted` is quantised, and dequantised where it is to be added up.
    """

    path: str
    primitive: str
    source: str
    dense: bool
    adapted: bool = True


@dataclasses.dataclass(frozen=True)
class Context:
    """One evaluation of a jaxpr.

    Attributes:
        on_event: hears of every meeting, once per leaf of params.
        uses: numbers the contractions.
        enclosing: the source line of the `jit` equation around, for equations that have none: those
            within a jitted function of `jax.numpy` do not.
    """

    on_event: Callable[[Event], None]
    uses: Iterator[int] = dataclasses.field(default_factory=itertools.count)
    enclosing: str = "an unknown line"

    def within(self, eqn: Any) -> Context:
        """The context of a jaxpr that an equation holds."""
        return dataclasses.replace(self, enclosing=self._line(eqn))

    def factored(self, weight: Weight, eqn: Any) -> None:
        """Says that the equation consumed the weight without adding it up."""
        self._tell(weight, eqn, dense=False)

    def add_up(self, value: Any, eqn: Any) -> jax.Array:
        """Adds a weight up because the equation needs the sum; other values pass."""
        if not isinstance(value, Weight):
            return value
        self._tell(value, eqn, dense=True)
        return value.add_up()

    def returned(self, value: Any) -> Any:
        """Adds a weight up because the function returns it."""
        if not isinstance(value, Weight):
            return value
        for path in value.paths if value.is_adapted else ():
            self.on_event(Event(path, "return", "the function's results", dense=True))
        return value.add_up()

    def _tell(self, weight: Weight, eqn: Any, *, dense: bool) -> None:
        for path in weight.paths:
            name = eqn.primitive.name
            self.on_event(Event(path, name, self._line(eqn), dense, weight.is_adapted))

    def _line(self, eqn: Any) -> str:
        return compat.source_line(eqn) or self.enclosing


def apply_rule(ctx: Context, eqn: Any, operands: list[Any]) -> Any:
    """Evaluates an equation that has a weight among its operands."""
    rule = RULES.get(eqn.primitive)
    try:
        result = NotImplemented if rule is None else rule(ctx, eqn, *operands)
    except NotFactoredError:
        result = NotImplemented
    if result is NotImplemented:
        result = recomputed(eqn, [_operand(ctx, eqn, value) for value in operands])
    return result


def _operand(ctx: Context, eqn: Any, value: Any) -> Any:
    """What an equation without a rule gets: a sum, or a base that is quantised and nothing more.

    Not within `jax.checkpoint`, though, where the equation holds a loop or a derivative of its own.
    """
    if not isinstance(value, Weight) or value.is_adapted or compat.has_body(eqn):
        return ctx.add_up(value, eqn)
    ctx.factored(value, eqn)
    return value.base
