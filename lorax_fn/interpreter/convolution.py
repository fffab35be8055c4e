"""A symbolic weight as the kernel of a convolution.

ΔW[spatial…, in, out] = s · Σ_r A[spatial…, in, r] · B[r, out], so its share of the output is a
convolution with A (same strides, padding, dilation and groups, r output features) followed by a
product with B at every position.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.extend.core.primitives as primitives
import jax.numpy as jnp
from jax import lax

from lorax_fn.interpreter.contractions import order_factors, scale_smaller
from lorax_fn.interpreter.dropout import drop
from lorax_fn.interpreter.factor import RANK, Factor, Label, labelled_dot
from lorax_fn.interpreter.gains import apply_gains, can_gain, fold, gained_product, gained_share
from lorax_fn.interpreter.observation import enter, observe
from lorax_fn.interpreter.pending import PendingSum
from lorax_fn.interpreter.rule import RULES, Context
from lorax_fn.interpreter.weight import Term, Weight


def _conv(ctx: Context, eqn: Any, x: Any, weight: Any) -> Any:
    if isinstance(x, Weight) or eqn.params["batch_group_count"] != 1:
        return NotImplemented
    x_labels, out_labels = _feature_labels(eqn.params, x.ndim)
    if not can_gain(x, x_labels, weight.gains, eqn.params["dimension_numbers"].rhs_spec[1:]):
        return NotImplemented
    labelled, gains = apply_gains(Factor(x, x_labels), weight.gains)
    x = labelled.array
    terms, left = fold(weight.terms, gains)
    shares = []
    for term in [term.folded() for term in terms]:
        pair = _first_and_second(term, eqn.params, weight.shape)
        if pair is None:
            return NotImplemented
        into = enter(drop(Factor(x, tuple(range(x.ndim))), term, next(ctx.uses)), term)
        share = _share(eqn.params, into.array, weight, term, *pair)
        shares.append(gained_share(share, out_labels, left))
    ctx.factored(weight, eqn)
    base = gained_product(eqn, [x, weight.base], 0, out_labels, gains)
    return PendingSum(base, tuple(shares))


def _feature_labels(params: dict[str, Any], ndim: int) -> tuple[tuple[Label, ...], ...]:
    """The labels of x's and of the result's dims: the features are the kernel's, if not grouped."""
    numbers = params["dimension_numbers"]
    out_dim, in_dim, *_ = numbers.rhs_spec
    grouped = params["feature_group_count"] != 1
    x_features = None if grouped else numbers.lhs_spec[1]
    x = tuple(in_dim if axis == x_features else ("x", axis) for axis in range(ndim))
    out = tuple(out_dim if axis == numbers.out_spec[1] else ("y", axis) for axis in range(ndim))
    return x, out


def _first_and_second(
    term: Term, params: dict[str, Any], shape: tuple[int, ...]
) -> tuple[Factor, Factor] | None:
    """The factor that spans the input features and the window, and the one of the output features.

    None if some dim is on the wrong side; dims of length one are on either.
    """
    out_dim, *summed = params["dimension_numbers"].rhs_spec
    first, second = order_factors(term, frozenset(summed))
    if shape[out_dim] == 1:
        first = first.squeeze([out_dim])
    second = second.squeeze([d for d in summed if shape[d] == 1])
    if out_dim in first.dims or set(summed) & second.spanned:
        return None
    missing = [d for d in summed if d not in first.dims]
    first = first.widen(missing, [shape[d] for d in missing])
    if out_dim not in second.dims:
        second = second.widen([out_dim], [shape[out_dim]])
    return first, second


def _share(
    params: dict[str, Any],
    x: jax.Array,
    weight: Weight,
    term: Term,
    first: Factor,
    second: Factor,
) -> jax.Array:
    """s · conv(x, first) · second, in the layout of the equation's output."""
    numbers = params["dimension_numbers"]
    groups = params["feature_group_count"]
    out_dim = numbers.rhs_spec[0]

    # The thin kernel is laid out as the weight is, with the rank in place of its output features.
    layout = [RANK if d == out_dim else d for d in range(weight.ndim)]
    kernel = _per_group(first.transpose(layout).astype(weight.dtype).array, out_dim, groups)
    convolved = lax.conv_general_dilated(
        x,
        kernel,
        params["window_strides"],
        params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=numbers,
        feature_group_count=groups,
        precision=params["precision"],
    )  # the output's layout, groups·r features
    feature = numbers.out_spec[1]
    labels = tuple(RANK if axis == feature else ("y", axis) for axis in range(x.ndim))
    thin = observe(Factor(convolved, labels), term)
    thin, second = scale_smaller(term.scale, thin, second)
    second = second.astype(weight.dtype)
    if groups == 1:
        return _project(thin, second, feature, params)
    return _project_groups(thin.array, second, params, weight.ndim)


def _per_group(kernel: jax.Array, out_dim: int, groups: int) -> jax.Array:
    """Repeats the thin kernel for every group: all groups share A, each has inputs of its own."""
    if groups == 1:
        return kernel
    return jnp.concatenate([kernel] * groups, axis=out_dim)


def _project(thin: Factor, second: Factor, feature: int, params: dict[str, Any]) -> jax.Array:
    """thin · second over the rank, the output features put where the layout has them."""
    out = [("y", axis) for axis in range(thin.array.ndim)]
    second = second.relabel(lambda _: out[feature])
    product = labelled_dot(
        thin,
        second,
        out,
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    return product.transpose(out).array


def _project_groups(
    thin: jax.Array, second: Factor, params: dict[str, Any], ndim: int
) -> jax.Array:
    """thin · second over the rank group by group: a 1×1 convolution with as many groups."""
    numbers = params["dimension_numbers"]
    _, in_dim, *spatial = numbers.rhs_spec
    kernel = second.widen(spatial, [1] * len(spatial))  # (1…, r, out)
    kernel = kernel.transpose([RANK if d == in_dim else d for d in range(ndim)])
    ones = (1,) * len(spatial)
    return lax.conv_general_dilated(
        thin,
        kernel.array,
        ones,
        [(0, 0)] * len(spatial),
        dimension_numbers=numbers._replace(lhs_spec=numbers.out_spec),
        feature_group_count=params["feature_group_count"],
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )


RULES[primitives.conv_general_dilated_p] = _conv
