"""Results that wait for what becomes of them before their low-rank shares are added on.

**Sums.** In `x @ W + bias` the shares are best added last. XLA:CPU may compute an addition anew in
each of its consumers, keeping the two operands alive in its place; it does so with
`(x·W + low) + bias`, whose last addition has one large operand, and not with `(x·W + bias) + low`.
In the training step of a small transformer under remat the first takes 12 % more temporary memory
and 3 % more time. Hence a result waits, if its one use is an addition, until that is done.

**Lookups.** `E[ids]` of an embedding is an activation, whose two parts are best added up at once.
In `x @ w[permutation]` the same operation only moves a weight about, and its next use contracts the
rows: a dense sum would be as large as the weight, and so would its gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core.primitives as primitives

from lorax_fn.interpreter import compat
from lorax_fn.interpreter.explicit import placed_like
from lorax_fn.interpreter.quantized import carried
from lorax_fn.interpreter.weight import Weight, wide_dtype


@dataclasses.dataclass(frozen=True)
class PendingSum:
    """`base` + Σ shares, all of one shape."""

    base: jax.Array
    shares: tuple[jax.Array, ...]

    def settle(self) -> jax.Array:
        """Adds the shares on, in float32 or wider, and casts once to the base's dtype.

        The shares come together first: two that cancel (PiSSA at init) then leave the base exact.
        """
        if not self.shares:
            return self.base
        wide = wide_dtype(self.base.dtype)
        first, *others = [share.astype(wide) for share in self.shares]
        total = functools.reduce(operator.add, [placed_like(s, first) for s in others], first)
        base = self.base.astype(wide)
        return (base + placed_like(total, base)).astype(self.base.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class PendingLookup:
    """Rows looked up in a weight: factored still, or their sum, which is formed at most once.

    Attributes:
        weight: the rows as a symbolic sum.
        rows: its dims that come from the indices.
        add_up: forms the sum.
    """

    weight: Weight
    rows: frozenset[int]
    add_up: Callable[[], jax.Array]

    def settle(self) -> jax.Array:
        """The sum, an activation."""
        return self._sum

    @functools.cached_property
    def _sum(self) -> jax.Array:
        return self.add_up()

    def transpose(self, eqn: Any) -> PendingLookup:
        """The same rows with their dims in another order."""
        order = eqn.params["permutation"]
        weight = self.weight.relabel(carried(eqn, [self.weight.base]), order.index)
        rows = frozenset(order.index(d) for d in self.rows)

        def transposed() -> jax.Array:
            with compat.equation_context(eqn):
                return compat.bind(eqn, [self.settle()])

        return PendingLookup(weight, rows, transposed)


def settled(value: Any) -> Any:
    """A value with nothing pending."""
    return value.settle() if isinstance(value, PendingSum | PendingLookup) else value


def accepted(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """An equation's operands: lookups as weights where it sums over their rows, else settled."""
    if eqn.primitive is primitives.jit_p:  # its own equations will tell
        return [value if isinstance(value, PendingLookup) else settled(value) for value in values]
    contracted: Sequence[Sequence[int]] = ((),) * len(values)
    if eqn.primitive is primitives.dot_general_p:
        contracted, _ = eqn.params["dimension_numbers"]
    meets_weight = any(isinstance(value, Weight) for value in values)
    operands = []
    for value, summed in zip(values, contracted, strict=True):
        if isinstance(value, PendingLookup) and value.rows <= {*summed} and not meets_weight:
            operands.append(value.weight)
            meets_weight = True
        else:
            operands.append(settled(value))
    return operands


def is_addition(eqn: Any, values: Sequence[Any]) -> bool:
    """Whether the equation adds arrays to a pending sum of the result's shape."""
    return (
        eqn.primitive is primitives.add_p
        and any(isinstance(value, PendingSum) for value in values)
        and all(
            value.base.shape == eqn.outvars[0].aval.shape
            for value in values
            if isinstance(value, PendingSum)
        )
    )


def add_before_shares(eqn: Any, values: Sequence[Any]) -> jax.Array:
    """Performs an addition on the bases and adds all shares on after it."""
    pending = [value for value in values if isinstance(value, PendingSum)]
    bases = [value.base if isinstance(value, PendingSum) else settled(value) for value in values]
    shares = tuple(share for value in pending for share in value.shares)
    return PendingSum(compat.bind(eqn, bases), shares).settle()
