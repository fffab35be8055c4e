"""A dot product whose gradient never moves a fat array.

`thin_dot` computes what `lax.dot_general` computes. They differ in reverse mode: JAX always puts
the cotangent `g` on the left. For `y = t @ b`, with `t` (n, r) and `b` (r, out), that makes
`db = (gᵀ @ t)ᵀ`, and XLA, whose matrix product wants rows contracted last on the left and first
on the right, copies all of `gᵀ` (out, n) to find an (r, out) result. Here

    db = tᵀ @ g        only tᵀ (r, n) is ever copied

because each gradient is taken in the operand order that moves the fewest elements; a fence keeps
XLA from swapping the operands back. On a CPU that makes one such product up to 7 times cheaper.

`thin_dot_p` is bilinear: its JVP emits the primal as a plain `dot_general` (rematerialisation
policies know that one) and the tangents as `thin_dot_p`, for its transpose rule to meet. A
`custom_vjp` would have been shorter, but forbids forward mode; `linear_call` cannot be batched.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from lorax_fn.interpreter import compat
from lorax_fn.interpreter.explicit import dot_sharding, explicit_spec
from lorax_fn.interpreter.fence import fence

Dims = tuple[int, ...]
DimensionNumbers = tuple[
    tuple[Sequence[int], Sequence[int]],  # contracting dims of lhs, of rhs
    tuple[Sequence[int], Sequence[int]],  # batch dims of lhs, of rhs
]


def thin_dot(
    lhs: ArrayLike,
    rhs: ArrayLike,
    dimension_numbers: DimensionNumbers,
    *,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Array:
    """`lax.dot_general` with gradients that leave the larger operand where it lies.

    Args:
        lhs: any array.
        rhs: any array.
        dimension_numbers: `((lhs_contract, rhs_contract), (lhs_batch, rhs_batch))`.
        precision: as in `lax.dot_general`.
        preferred_element_type: dtype of the result; gradients have their operand's dtype.

    Returns:
        Array of dims (batch…, lhs free…, rhs free…).

    Raises:
        TypeError: if shapes and dimension numbers do not fit, in `lax.dot_general`'s words.

    >>> import jax, jax.numpy as jnp
    >>> t, b = jnp.ones((4, 3, 2)), jnp.ones((2, 5))
    >>> jax.grad(lambda b: thin_dot(t, b, (((2,), (0,)), ((), ()))).sum())(b).shape
    (2, 5)
    """
    contract, batch = dimension_numbers
    lhs, rhs = operands = compat.unify_varying_axes(lhs, rhs)
    free = [_others(np.ndim(x), c, b) for x, c, b in zip(operands, contract, batch, strict=True)]
    return thin_dot_p.bind(
        *operands,
        dimension_numbers=(tuple(map(tuple, contract)), tuple(map(tuple, batch))),
        precision=compat.canonical_precision(precision),
        preferred_element_type=preferred_element_type and jax.numpy.dtype(preferred_element_type),
        out_sharding=dot_sharding(lhs, rhs, dimension_numbers, free),
    )


def _jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Array, Array]:
    (lhs, rhs), (lhs_dot, rhs_dot) = primals, tangents
    terms = []
    if not isinstance(lhs_dot, ad.Zero):
        terms.append(thin_dot_p.bind(lhs_dot, rhs, **params))
    if not isinstance(rhs_dot, ad.Zero):
        terms.append(thin_dot_p.bind(lhs, rhs_dot, **params))
    return lax.dot_general_p.bind(lhs, rhs, **params), functools.reduce(ad.add_tangents, terms)


def _transpose_lhs(g: Array, lhs: Any, rhs: Array, **params: Any) -> Array:
    (lhs_contract, _), (lhs_batch, _) = numbers = params["dimension_numbers"]
    kept = range(len(lhs_batch), lhs.aval.ndim - len(lhs_contract))
    return _cotangent(g, kept, lhs.aval, rhs, numbers, params)


def _transpose_rhs(g: Array, lhs: Array, rhs: Any, **params: Any) -> Array:
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = params["dimension_numbers"]
    kept = range(lhs.ndim - len(lhs_contract), g.ndim)
    flipped = (rhs_contract, lhs_contract), (rhs_batch, lhs_batch)
    return _cotangent(g, kept, rhs.aval, lhs, flipped, params)


def _cotangent(
    g: Array, g_kept: Sequence[int], aval: Any, known: Array, numbers: Any, params: Any
) -> Array:
    """Cotangent of the linear operand of a product, in the cheaper of the two operand orders.

    `g` is the product's cotangent, whose dims `g_kept` are the linear operand's own free dims;
    `aval` describes the linear operand, `known` is the other one, and `numbers` the product's
    dimension numbers with the linear operand first.
    """
    (contract, known_kept), (batch, known_batch) = numbers
    # The product will keep `known`'s formerly contracted dims in their order in `known`.
    pairs = sorted(zip(known_kept, contract, strict=True))
    known_kept, contract = tuple(k for k, _ in pairs), tuple(c for _, c in pairs)
    free = _others(aval.ndim, contract, batch)
    known_summed = _others(known.ndim, known_kept, known_batch)
    g_batch = range(len(batch))
    g_summed = _others(g.ndim, g_kept, g_batch)

    # XLA's matrix product reads (batch, rows, sum) @ (batch, sum, columns); anything else is moved.
    g_left_moves = (
        _moved(g, g_batch, g_kept, g_summed)
        + _moved(known, known_batch, known_summed, known_kept)
        + _moved(aval, batch, free, contract)
    )
    g_right_moves = (
        _moved(known, known_batch, known_kept, known_summed)
        + _moved(g, g_batch, g_summed, g_kept)
        + _moved(aval, batch, contract, free)
    )
    if g_left_moves <= g_right_moves:
        operands, sums, batches = (g, known), (g_summed, known_summed), (g_batch, known_batch)
        order = (*batch, *free, *contract)
    else:
        operands, sums, batches = (known, g), (known_summed, g_summed), (known_batch, g_batch)
        order = (*batch, *contract, *free)

    out = lax.dot_general(
        *operands,
        (sums, batches),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
        out_sharding=_explicit_sharding(aval, order),
    )
    if order != tuple(range(aval.ndim)):
        # Without the fence XLA turns (t @ x)ᵀ into xᵀ @ t and moves the fat x after all.
        inverse = tuple(order.index(d) for d in range(aval.ndim))
        out = lax.transpose(out if batch else fence(out), inverse)
    return lax.convert_element_type(out, aval.dtype)


def _others(ndim: int, *dims: Sequence[int]) -> Dims:
    return tuple(d for d in range(ndim) if not any(d in group for group in dims))


def _moved(array: Any, *order: Sequence[int]) -> int:
    """Elements copied to bring the dims of `array` into `order` (symbolic sizes count as 1)."""
    dims = [d for group in order for d in group]
    return 0 if dims == sorted(dims) else math.prod(n for n in array.shape if isinstance(n, int))


def _explicit_sharding(aval: Any, order: Dims) -> NamedSharding | None:
    """Under a mesh with explicit axes: the sharding of `aval` with its dims in `order`."""
    mesh = jax.sharding.get_abstract_mesh() if aval.sharding.mesh.empty else aval.sharding.mesh
    if AxisType.Explicit not in (mesh.axis_types or ()):
        return None
    return NamedSharding(mesh, PartitionSpec(*(aval.sharding.spec[d] for d in order)))


def _batch(operands: Any, dims: Any, **params: Any) -> tuple[Array, int]:
    (lhs, rhs), (lhs_dim, rhs_dim) = operands, dims
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = params.pop("dimension_numbers")
    lhs_contract, lhs_batch = _insert(lhs_dim, lhs_contract), _insert(lhs_dim, lhs_batch)
    rhs_contract, rhs_batch = _insert(rhs_dim, rhs_contract), _insert(rhs_dim, rhs_batch)
    if rhs_dim is None:  # one more free dim of lhs
        out_dim = len(lhs_batch) + _others(lhs.ndim, lhs_contract, lhs_batch).index(lhs_dim)
    elif lhs_dim is None:  # one more free dim of rhs
        out_dim = lhs.ndim - len(lhs_contract)
        out_dim += _others(rhs.ndim, rhs_contract, rhs_batch).index(rhs_dim)
    else:
        lhs_batch, rhs_batch, out_dim = (lhs_dim, *lhs_batch), (rhs_dim, *rhs_batch), 0
    numbers = (lhs_contract, rhs_contract), (lhs_batch, rhs_batch)
    if params["out_sharding"] is not None:
        mapped, dim = (lhs, lhs_dim) if rhs_dim is None else (rhs, rhs_dim)
        axes = (explicit_spec(mapped) or ())[dim]
        params["out_sharding"] = _with_dim(params["out_sharding"], out_dim, axes)
    return thin_dot_p.bind(lhs, rhs, dimension_numbers=numbers, **params), out_dim


def _with_dim(sharding: NamedSharding, dim: int, axes: Any) -> NamedSharding:
    """The sharding of an array that has gained a dim, cut along `axes` of the mesh."""
    spec = [*sharding.spec]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec[:dim], axes, *spec[dim:]))


def _insert(dim: int | None, dims: Dims) -> Dims:
    """Renumbers `dims` for an array that has gained a dim at `dim`."""
    return dims if dim is None else tuple(d + (d >= dim) for d in dims)


thin_dot_p = Primitive("thin_dot")
thin_dot_p.def_impl(lax.dot_general_p.bind)
thin_dot_p.def_effectful_abstract_eval(lax.dot_general_p.abstract_eval)
mlir.register_lowering(thin_dot_p, mlir.lower_fun(lax.dot_general_p.bind, multiple_results=False))
ad.defbilinear(thin_dot_p, _transpose_lhs, _transpose_rhs)
ad.primitive_jvps[thin_dot_p] = _jvp  # defbilinear's own would emit thin_dot_p for the primal too
batching.primitive_batchers[thin_dot_p] = _batch
