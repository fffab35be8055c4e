"""Where a weight's factors live, derived from where the weight lives.

A factor is split along each dim that it spans as the weight is; its rank axis is replicated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from lorax_fn.interpreter.factor import Factor
from lorax_fn.interpreter.weight import Weight


def factor_spec(factor: Factor, spec: Sequence[Any], ndim: int) -> PartitionSpec:
    """The factor's share of the spec of a weight with `ndim` dims."""
    full = [*spec, *[None] * (ndim - len(spec))]
    return PartitionSpec(*factor.per_axis(full, rank=lambda r: None))


def constrain_factors(
    weight: Weight, base: Any, sharding: Sharding, unconstrained: Sequence[int] = ()
) -> Weight:
    """The weight with a new base and its factors constrained to follow `sharding`."""
    if not isinstance(sharding, NamedSharding):
        return weight.map(base, lambda factor: factor)
    spec = [*sharding.spec, *[None] * (weight.ndim - len(sharding.spec))]
    for dim in unconstrained:
        spec[dim] = PartitionSpec.UNCONSTRAINED

    def constrain(factor: Factor) -> Factor:
        own = NamedSharding(sharding.mesh, factor_spec(factor, spec, weight.ndim))
        return factor.with_array(lax.with_sharding_constraint(factor.array, own))

    return weight.map(base, constrain)
