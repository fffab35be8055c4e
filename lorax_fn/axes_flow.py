"""What the analysis behind `infer_axes` knows of a variable, and how it walks a jaxpr.

Each variable holds traces. A trace says of one leaf of `params` which of the leaf's dims (the
*origins*) each dim of the variable came from; a reshape may merge or split them. Contractions and
lookups turn traces into uses: sets of origins that are batch, contract or out.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jax.extend import core as jax_core

Dims = tuple[tuple[int, ...], ...]  # for each dim of a variable, its origins, outermost first
Rule = Callable[["Analysis", Any, list["Value"]], list["Value"]]
LOOKUP, ON_DATA, ON_WEIGHTS, PICK = range(4)  # ranks of uses: which has most to say about the split


class Kind(enum.IntEnum):
    """What a value is made of, the later the stronger."""

    CONST = 0
    WEIGHT = 1
    DATA = 2


class Trace(NamedTuple):
    """A leaf, the origins of each dim, and the origins picked from or scanned over on the way.

    With `is_result`, not the weight itself but what came of contracting it: the origins of its out
    dims, some of which may turn out to index experts.
    """

    leaf: int
    dims: Dims
    batch: frozenset[int] = frozenset()
    is_result: bool = False

    def origins(self, dims: Iterable[int]) -> frozenset[int]:
        """The origins of these dims, together."""
        return frozenset(o for d in dims for o in self.dims[d])

    @property
    def is_live(self) -> bool:
        """Whether this can still become a use: that takes a contract and an out dim."""
        return len({o for origins in self.dims for o in origins}) > (not self.is_result)


class Value(NamedTuple):
    """What is known of a variable."""

    kind: Kind
    traces: tuple[Trace, ...] = ()

    @property
    def weights(self) -> list[Trace]:
        """The traces of weights, without those of results."""
        return [t for t in self.traces if not t.is_result]

    @property
    def results(self) -> list[Trace]:
        """The traces of what came of contracting weights."""
        return [t for t in self.traces if t.is_result]

    def map(self, fn: Callable[[Trace], Trace]) -> Value:
        """Follows the traces through a shape operation."""
        return make_value(self.kind, map(fn, self.traces))


class Use(NamedTuple):
    """One contraction or lookup of a leaf; of several, the one of the lowest rank decides."""

    rank: int
    leaf: int
    batch: frozenset[int]
    contract: frozenset[int]
    out: frozenset[int]

    @property
    def leading(self) -> frozenset[int]:
        """The out dims before the contract dims, unless there are no others."""
        leading = frozenset(o for o in self.out if o < min(self.contract))
        return leading if leading < self.out else frozenset()


def make_value(kind: Kind, traces: Iterable[Trace]) -> Value:
    """A value with each live trace once."""
    return Value(kind, tuple(dict.fromkeys(t for t in traces if t.is_live)))


def leaf_value(leaf: int, ndim: int) -> Value:
    """The value of an untouched leaf of `params`."""
    return make_value(Kind.WEIGHT, [Trace(leaf, tuple((d,) for d in range(ndim)))])


def join(*values: Value) -> Value:
    """A value that may be any of these."""
    return make_value(max(v.kind for v in values), (t for v in values for t in v.traces))


class Analysis:
    """Runs a jaxpr on values and gathers what it does with the leaves.

    Attributes:
        shapes: the leaves' shapes.
        rule_for: the rule for an equation.
        uses: every use that has contract and out dims, in program order.
        shared: (leaf, dim) of each out dim that later indexes other weights, as experts do.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], rule_for: Callable[[Any], Rule]) -> None:
        self.shapes = shapes
        self.rule_for = rule_for
        self.uses: list[Use] = []
        self.shared: set[tuple[int, int]] = set()

    def run(self, jaxpr: Any, inputs: Sequence[Value]) -> list[Value]:
        """Returns the values of the outputs of an open or closed jaxpr."""
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        env = dict.fromkeys(jaxpr.constvars, Value(Kind.CONST))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(var: Any) -> Value:
            return Value(Kind.CONST) if isinstance(var, jax_core.Literal) else env[var]

        for eqn in jaxpr.eqns:
            rule = self.rule_for(eqn)
            env.update(zip(eqn.outvars, rule(self, eqn, list(map(read, eqn.invars))), strict=True))
        return [read(var) for var in jaxpr.outvars]

    def use(self, rank: int, trace: Trace, batch: Iterable[int], contract: Iterable[int]) -> bool:
        """Notes that these dims of a weight are a batch and contracted, and the others output.

        Returns whether the result is to be followed: whether an out dim might index experts.
        """
        rest = set(range(len(trace.dims))) - {*batch, *contract}
        # A reshaped origin may play two roles. Half contracted, it has to be contracted, or A could
        # not be applied first; half batch and half output, only an output covers both.
        contracted = trace.origins(contract)
        out = trace.origins(rest) - contracted
        indices = (trace.batch | trace.origins(batch)) - contracted - out
        if not (contracted and out):
            return False
        self.uses.append(Use(rank, trace.leaf, indices, contracted, out))
        return bool(self.uses[-1].leading)

    def pick(self, trace: Trace, picked: Iterable[int]) -> frozenset[int]:
        """The origins of dims of size 1 that vanish: batch if they were longer in the leaf."""
        sizes = self.shapes[trace.leaf]
        return trace.batch | {o for o in trace.origins(picked) if sizes[o] > 1}
