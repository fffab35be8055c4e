"""Meshes with explicit axes, where an array's sharding is part of its type.

There `dot_general` refuses to guess how a result lies whose contracted dims are cut, and addition
refuses operands that lie differently. What the interpreter multiplies and adds beyond the user's
own equations has to say both. On other meshes, and without one, nothing here does anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def explicit_spec(array: Any) -> tuple[Any, ...] | None:
    """The mesh axes of each dim of an array (or of its aval), None without a mesh of that kind."""
    sharding = jax.typeof(array).sharding
    if AxisType.Explicit not in (sharding.mesh.axis_types or ()):
        return None
    return (*sharding.spec, *[None] * (array.ndim - len(sharding.spec)))


def parts_of(cut: Any, sizes: Any) -> int:
    """Into how many parts the entry of a `PartitionSpec` cuts a dim, on a mesh of these sizes."""
    names = () if cut is None else cut if isinstance(cut, tuple) else (cut,)
    return math.prod(sizes[name] for name in names)


def placed_like(array: jax.Array, model: jax.Array) -> jax.Array:
    """The array with the model's sharding; both have the same shape."""
    if explicit_spec(model) is None or jax.typeof(array).sharding == jax.typeof(model).sharding:
        return array
    return jax.sharding.reshard(array, jax.typeof(model).sharding)


def laid_out_by_compiler(fn: Callable[..., Any], shardings: Any, *arrays: Any) -> Any:
    """`fn(*arrays)`, told how its results lie; the compiler finds how its steps do."""
    mesh = jax.tree.leaves(shardings)[0].mesh.abstract_mesh
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(fn, axes=mesh.explicit_axes, out_sharding=shardings)(*arrays)


def dot_sharding(
    lhs: Any, rhs: Any, dimension_numbers: Any, free: Sequence[Sequence[int]]
) -> NamedSharding | None:
    """How a product lies: its dims as the operands' own, the first claim on a mesh axis winning.

    None where `dot_general` can tell for itself.
    """
    lhs_spec, rhs_spec = explicit_spec(lhs), explicit_spec(rhs)
    if lhs_spec is None or rhs_spec is None:
        return None
    (lhs_contract, rhs_contract), (lhs_batch, _) = dimension_numbers
    claims = [lhs_spec[d] for d in (*lhs_batch, *free[0])] + [rhs_spec[d] for d in free[1]]
    taken: set[Any] = set()
    granted = []
    for claim in claims:
        axes = set(claim) if isinstance(claim, tuple) else {claim} - {None}
        granted.append(None if axes & taken else claim)
        taken |= axes
    both_cut = any(
        lhs_spec[i] is not None and rhs_spec[j] is not None
        for i, j in zip(lhs_contract, rhs_contract, strict=True)
    )
    if granted == claims and not both_cut:
        return None
    return NamedSharding(jax.typeof(lhs).sharding.mesh, PartitionSpec(*granted))
