"""What one entry of the battery is: a function, its reference, its weights and its inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from tests.battery.kinds import LORA, Kind


@dataclass(frozen=True)
class Weight:
    """A parameter: `roles` has one letter a dim, "b" batch, "c" contract, "o" out.

    Without roles the parameter is left alone, and its factor is None.
    """

    roles: str | None
    shape: tuple[int, ...]
    rank: int = 2
    dtype: Any = jnp.float32

    @property
    def axes(self) -> tuple[tuple[int, ...], ...]:
        """(batch, contract, out): the dims of each role."""
        return tuple(tuple(i for i, role in enumerate(self.roles) if role == x) for x in "bco")


def W(roles, *shape, **kwargs):
    """An adapted weight: W("co", 7, 5) is a dense kernel."""
    return Weight(roles, shape, **kwargs)


def Plain(*shape, **kwargs):
    """A parameter that no rule touches."""
    return Weight(None, shape, **kwargs)


@dataclass(frozen=True)
class Floats:
    """A normally distributed input."""

    shape: tuple[int, ...]
    dtype: Any = jnp.float32


@dataclass(frozen=True)
class Ints:
    """Integers of [low, high): token ids, expert ids, loop bounds."""

    shape: tuple[int, ...]
    high: int
    low: int = 0


@dataclass(frozen=True)
class OneOf:
    """Values spelled out, one for each draw: group sizes, predicates."""

    first: Any
    second: Any


def F(*shape, **kwargs):
    return Floats(shape, **kwargs)


@dataclass(frozen=True, eq=False)
class OpCase:
    """`fn(params, inputs)` in JAX and `reference(params, inputs)` in float64 numpy, on dicts by name.

    Args:
        surrogate: where the derivative is not that of `reference` (stop_gradient, the user's own
            custom derivative), a function with the expected derivative at the point
            (params0, inputs0), called as `surrogate(params, inputs, params0, inputs0)`.
        reverse: whether JAX itself can differentiate `fn` in reverse mode.
        rounding: modes ("eager", "jit") in which XLA rounds `fn` itself otherwise as soon as its weight
            has a second use, or as its parts are compiled together: equal at init to 1e-6 there.
        without: names of transformations that JAX itself does not support on `fn`.
        images: sizes that a product A·B would have on its way through `fn`, beyond those that
            `fn`'s own jaxpr shows (slices picked by a traced index).
        activations: sizes that `fn` legitimately yields although a slice of the weight has them too.
        kind: the adapter kind of all adapted weights.
    """

    name: str
    weights: Mapping[str, Weight]
    inputs: Mapping[str, Floats | Ints | OneOf]
    fn: Callable[[Any, Any], Any]
    reference: Callable[[Any, Any], Any]
    tolerance: float = 1e-4
    surrogate: Callable[[Any, Any, Any, Any], Any] | None = None
    reverse: bool = True
    rounding: frozenset[str] = frozenset()
    without: frozenset[str] = frozenset()
    images: tuple[int, ...] = ()
    activations: tuple[int, ...] = ()
    kind: Kind = LORA

    def __repr__(self) -> str:
        return self.name


HALF = 4e-2  # tolerance where bfloat16 is on the path
