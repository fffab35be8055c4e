"""Independent numpy reference, in float64: what an adapted weight is and what each operation yields.

Nothing here calls JAX or the library. An adapted weight is W + scale·A·B with the dims of W spelled by
`roles`, one letter a dim: "b" batch, "c" contract, "o" out. Derivatives are central differences, which
are exact up to rounding for the (multi)linear functions that most cases are.
"""

import itertools
import math
import string

import numpy as np


def low_rank_sum(a, b, roles, scale):
    """scale·A·B in the dim order of the weight; a: (batch…, contract…, r), b: (batch…, r, out…)."""
    dims = string.ascii_lowercase[: len(roles)]
    batch, contract, out = (
        "".join(dim for dim, role in zip(dims, roles, strict=True) if role == wanted)
        for wanted in "bco"
    )
    return scale * np.einsum(f"{batch}{contract}Z,{batch}Z{out}->{dims}", a, b)


def float64(array):
    """The array in float64 where it is floating (bfloat16 too), untouched where it is not."""
    array = np.asarray(array)
    is_float = np.issubdtype(array.dtype, np.floating) or array.dtype.kind == "V"
    return array.astype(np.float64) if is_float else array


def central_difference(scalar_fn, arrays, wanted=None, step=1e-5):
    """Gradient of `scalar_fn(arrays)` with respect to each float64 array of the list `arrays`.

    It is zero for those that `wanted`, a list of bools, leaves out.
    """
    gradients = []
    for position, array in enumerate(arrays):
        gradient = np.zeros_like(array)
        skipped = wanted is not None and not wanted[position]
        for index in [] if skipped else np.ndindex(array.shape):
            plus, minus = array.copy(), array.copy()
            plus[index] += step
            minus[index] -= step
            before, after = arrays[:position], arrays[position + 1 :]
            rise = scalar_fn([*before, plus, *after]) - scalar_fn([*before, minus, *after])
            gradient[index] = rise / (2 * step)
        gradients.append(gradient)
    return gradients


def directional_difference(fn, arrays, directions, step=1e-5):
    """Derivative of the list of arrays `fn(arrays)` along the list `directions`."""
    plus = fn([x + step * v for x, v in zip(arrays, directions, strict=True)])
    minus = fn([x - step * v for x, v in zip(arrays, directions, strict=True)])
    return [(up - down) / (2 * step) for up, down in zip(plus, minus, strict=True)]


def dot_general(lhs, rhs, contract, batch=((), ())):
    """Output dims: batch, then what is left of lhs, then what is left of rhs, as XLA orders them."""
    letters = iter(string.ascii_letters)
    left, right = [""] * lhs.ndim, [""] * rhs.ndim
    for i, j in itertools.chain(
        zip(*contract, strict=True),
        zip(*batch, strict=True),
    ):
        left[i] = right[j] = next(letters)
    left = [letter or next(letters) for letter in left]
    right = [letter or next(letters) for letter in right]
    shared = [left[i] for i in batch[0]]
    kept_left = [x for i, x in enumerate(left) if i not in {*contract[0], *batch[0]}]
    kept_right = [x for i, x in enumerate(right) if i not in {*contract[1], *batch[1]}]
    spec = f"{''.join(left)},{''.join(right)}->{''.join(shared + kept_left + kept_right)}"
    return np.einsum(spec, lhs, rhs)


def same_padding(size, kernel, stride=1, dilation=1):
    """(low, high) padding under which a strided window yields ceil(size / stride) positions."""
    reach = (kernel - 1) * dilation + 1
    total = max((math.ceil(size / stride) - 1) * stride + reach - size, 0)
    return total // 2, total - total // 2


def _dilate(x, dim, factor):
    shape = list(x.shape)
    shape[dim] = (shape[dim] - 1) * factor + 1
    spread = np.zeros(shape)
    spread[(slice(None),) * dim + (slice(None, None, factor),)] = x
    return spread


def _pad(x, dim, low, high):
    """Pads with zeros; a negative amount crops."""
    widths = [(0, 0)] * x.ndim
    widths[dim] = (max(low, 0), max(high, 0))
    x = np.pad(x, widths)
    stop = x.shape[dim] + min(high, 0)
    return x[(slice(None),) * dim + (slice(max(-low, 0), stop),)]


def _grouped_conv(x, w, strides, rhs_dilation, groups):
    """x: (N, C, spatial…) padded already, w: (O, C/groups, kernel…): one slice per kernel position."""
    count, kernel = x.shape[0], w.shape[2:]
    sizes = [
        (n - (k - 1) * d - 1) // s + 1
        for n, k, d, s in zip(x.shape[2:], kernel, rhs_dilation, strides, strict=True)
    ]
    x = x.reshape(count, groups, -1, *x.shape[2:])  # (N, G, C/G, spatial…)
    w = w.reshape(groups, -1, *w.shape[1:])  # (G, O/G, C/G, kernel…)
    total = np.zeros((count, groups, w.shape[1], *sizes))
    for offset in np.ndindex(*kernel):
        window = tuple(
            slice(k * d, k * d + (n - 1) * s + 1, s)
            for k, d, s, n in zip(offset, rhs_dilation, strides, sizes, strict=True)
        )
        seen = x[(slice(None),) * 3 + window]  # (N, G, C/G, out spatial…)
        total += np.einsum("ngi...,goi->ngo...", seen, w[(slice(None),) * 3 + offset])
    return total.reshape(count, -1, *sizes)


def conv(
    x,
    w,
    layout,
    *,
    strides=None,
    padding=None,
    lhs_dilation=None,
    rhs_dilation=None,
    groups=1,
    batch_groups=1,
):
    """Cross-correlation; `layout` is (lhs, rhs, out) in letters, e.g. ("NHWC", "HWIO", "NHWC").

    `strides`, `padding` ((low, high) pairs) and the dilations follow the spatial letters of rhs.
    """
    lhs_spec, rhs_spec, out_spec = layout
    spatial = [letter for letter in rhs_spec if letter not in "IO"]
    ones = (1,) * len(spatial)
    strides, rhs_dilation = strides or ones, rhs_dilation or ones
    x = np.transpose(x, [lhs_spec.index(letter) for letter in ["N", "C", *spatial]])
    w = np.transpose(w, [rhs_spec.index(letter) for letter in ["O", "I", *spatial]])
    for dim, factor in enumerate(lhs_dilation or ones, start=2):
        x = _dilate(x, dim, factor)
    for dim, (low, high) in enumerate(padding or ((0, 0),) * len(spatial), start=2):
        x = _pad(x, dim, low, high)
    parts = [
        _grouped_conv(part, kernel, strides, rhs_dilation, groups)
        for part, kernel in zip(np.split(x, batch_groups), np.split(w, batch_groups), strict=True)
    ]
    y = np.concatenate(parts, axis=1)  # (N, O, out spatial…)
    canonical = ["N", "C", *spatial]
    return np.transpose(y, [canonical.index(letter) for letter in out_spec])


def lookup(table, ids, *, mode="clip", fill=np.nan):
    """Rows of `table`; an id out of range is clipped to the last row, or yields `fill`."""
    ids = np.where(ids < 0, ids + len(table), ids)
    rows = table[np.clip(ids, 0, len(table) - 1)]
    if mode == "clip":
        return rows
    inside = (ids >= 0) & (ids < len(table))
    return np.where(inside.reshape(inside.shape + (1,) * (table.ndim - 1)), rows, fill)


def ragged_dot(x, w, group_sizes):
    """x: (m, k), w: (g, k, n): consecutive rows of x meet consecutive matrices; the rest is zero."""
    y = np.zeros((x.shape[0], w.shape[2]))
    start = 0
    for matrix, size in zip(w, group_sizes, strict=True):
        y[start : start + size] = x[start : start + size] @ matrix
        start += size
    return y


def ragged_contraction(x, w, group_sizes):
    """x: (m, k), w: (k, n), ragged along k: one partial product per group, (g, m, n)."""
    edges = np.concatenate([[0], np.cumsum(group_sizes)])
    return np.stack([x[:, i:j] @ w[i:j] for i, j in itertools.pairwise(edges)])


def relu(x):
    return np.maximum(x, 0)


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
