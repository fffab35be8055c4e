"""A symbolic weight that the devices of a `shard_map` send each other, as FSDP gathers its shards.

A factor that is the same on every device stays where it is; one that differs is sent as the base
is. Whether it differs is in its type, unless `check_vma=False`; the weight is then added up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core.primitives as primitives

from lorax_fn.interpreter import compat
from lorax_fn.interpreter.factor import Factor
from lorax_fn.interpreter.kronecker import NotFactoredError
from lorax_fn.interpreter.quantized import carried
from lorax_fn.interpreter.rule import RULES, Context
from lorax_fn.interpreter.weight import Weight


def _all_gather(ctx: Context, eqn: Any, weight: Weight) -> Weight:
    if not _varies(weight.base, eqn):
        return NotImplemented  # types do not tell
    dim = eqn.params["all_gather_dimension"]
    base = carried(eqn, [weight.base])
    if eqn.params["tiled"]:
        return weight.map(base, lambda f: _tiled(eqn, f, dim))
    return weight.relabel(base, lambda d: d + (d >= dim)).map(base, lambda f: _stacked(eqn, f, dim))


def _tiled(eqn: Any, factor: Factor, dim: int) -> Factor:
    """The devices' parts of the factor one after another along dim."""
    if dim in factor.dims:
        return factor.with_array(_gathered(eqn, factor.array, factor.dims.index(dim)))
    if _varies(factor.array, eqn):
        raise NotFactoredError  # another one for each part of the dim
    return factor


def _stacked(eqn: Any, factor: Factor, dim: int) -> Factor:
    """The devices' factors stacked along a new dim."""
    if not _varies(factor.array, eqn):
        return factor
    return Factor(_gathered(eqn, factor.array, 0), (dim, *factor.dims))


def _gathered(eqn: Any, array: jax.Array, axis: int) -> jax.Array:
    params = dict(eqn.params, all_gather_dimension=axis)
    return _on_numbers(lambda x: eqn.primitive.bind(x, **params), array)


def _ppermute(ctx: Context, eqn: Any, weight: Weight) -> Weight:
    if not _varies(weight.base, eqn):
        return NotImplemented

    def sent(factor: Factor) -> Factor:
        if not _varies(factor.array, eqn):
            return factor
        return factor.with_array(
            _on_numbers(lambda x: eqn.primitive.bind(x, **eqn.params), factor.array)
        )

    return weight.map(carried(eqn, [weight.base]), sent)


def _varies(value: Any, eqn: Any) -> bool:
    """Whether an array, or a part of a quantised one, may differ between the devices of eqn."""
    names = eqn.params["axis_name"]
    names = set(names) if isinstance(names, tuple | list) else {names}
    return any(compat.varying_axes(array) & names for array in jax.tree.leaves(value))


def _on_numbers(fn: Callable[[jax.Array], jax.Array], array: jax.Array) -> jax.Array:
    """`fn` on an array, or on the numbers that make up an array of PRNG keys."""
    if not jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return fn(array)
    return jax.random.wrap_key_data(fn(jax.random.key_data(array)), impl=jax.random.key_impl(array))


RULES[primitives.all_gather_p] = _all_gather
RULES[primitives.ppermute_p] = _ppermute
