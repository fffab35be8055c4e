"""A quantised array that is cut and permuted before it is dequantised.

Of a stack of layers one is wanted, of an embedding some rows: dequantising those alone means to cut
the codes and the scales apart. Dim d of the scales is as long as the array's, or one block long for
every so many of its entries, so each cut of the codes has one of the scales beside it, unless it
runs through the middle of a block. A rule below returns `NotImplemented` then, or where it knows no
way, and the operation is done on the dequantised array.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core.primitives as primitives
import jax.numpy as jnp
import numpy as np
from jax import lax

from lorax_fn.interpreter import compat
from lorax_fn.interpreter.explicit import explicit_spec, laid_out_by_compiler
from lorax_fn.interpreter.tie import tied


def dequantize(array: Any) -> jax.Array:
    """The floating array that a `qwix.QArray` stands for, in the dtype of its scales.

    It lies as the codes do, also on a mesh with explicit axes, where qwix's own reshapes and
    gathers would not say how their results lie.
    """
    if explicit_spec(array.qvalue) is None:
        return _by_rows(array)
    return laid_out_by_compiler(_by_rows, jax.typeof(array.qvalue).sharding, array)


def _by_rows(array: Any) -> jax.Array:
    """Row by row: qwix looks NF4's codes up in one long row.

    For that row a mesh would have to gather the codes of all its devices.
    """
    import qwix

    if array.zero_point is not None or array.qvalue.size == 0:
        with qwix_promotion():
            return qwix.dequantize(array)

    def dequantize_rows(codes: jax.Array, scales: jax.Array) -> jax.Array:
        with qwix_promotion():
            return qwix.dequantize(qwix.QArray(codes, scales, None, array.qtype))

    split: list[int] = []
    for length, count in zip(array.shape[:-1], array.scale.shape[:-1], strict=True):
        split += [count, _tile(length, count)]
        dequantize_rows = jax.vmap(jax.vmap(dequantize_rows, (0, None)))
    rows = array.qvalue.reshape(*split, array.shape[-1])  # (count, tile, count, tile, …, last)
    return dequantize_rows(rows, array.scale).reshape(array.shape)


def _tile(length: int, count: int) -> int:
    """How many entries of a dim share each of so many scales."""
    return length // count if count else 1


@contextlib.contextmanager
def qwix_promotion() -> Iterator[None]:
    """The promotion of dtypes and ranks that qwix counts on, whatever the user's own setting."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@dataclasses.dataclass(frozen=True)
class Codes:
    """`after` done, in turn, on the dequantised array with its dim `order[i]` as dim i."""

    array: Any
    order: tuple[int, ...]
    after: tuple[Callable[[jax.Array], jax.Array], ...] = ()

    @classmethod
    def of(cls, array: Any) -> Codes:
        """A quantised array as it is."""
        return cls(array, tuple(range(array.ndim)))

    @property
    def in_order(self) -> bool:
        """Whether no dim has changed its place."""
        return self.order == tuple(range(self.array.ndim))

    def dense(self, ready: Any = None) -> jax.Array:
        """The floating array, made once `ready` is there."""
        array = self.array
        if ready is not None:
            array = dataclasses.replace(array, qvalue=tied(array.qvalue, ready))
        result = dequantize(array)
        if not self.in_order:
            result = lax.transpose(result, self.order)
        for operation in self.after:
            result = operation(result)
        return result

    def by_array_dim(self, values: Sequence[Any]) -> list[Any]:
        """What is given for each dim, for each dim of the array."""
        return [values[self.order.index(dim)] for dim in range(self.array.ndim)]

    def map(self, fn: Callable[[jax.Array], jax.Array]) -> Codes:
        """`fn` done on the codes, the scales and the zero points."""
        return dataclasses.replace(self, array=jax.tree.map(fn, self.array))

    def squeeze(self, dims: Sequence[int]) -> Codes:
        """Without dims of length one."""
        gone = [self.order[dim] for dim in dims]
        kept = [dim for dim in self.order if dim not in gone]
        order = tuple(sorted(kept).index(dim) for dim in kept)
        return dataclasses.replace(self.map(lambda x: lax.squeeze(x, gone)), order=order)

    def slice(self, start: Sequence[int], limit: Sequence[int], strides: Sequence[int]) -> Any:
        """The part within these limits, or `NotImplemented` if it cuts a block or is empty."""
        spans = self.by_array_dim(list(zip(start, limit, strides, strict=True)))

        def block(dim: int, part: Any) -> tuple[int, int, int] | None:
            begin, end, stride = spans[dim]
            length, count = self.array.shape[dim], part.shape[dim]
            tile = _tile(length, count)
            if end <= begin:
                return None
            if tile == 1:
                return begin, end, stride
            if begin // tile == (end - 1) // tile:
                return begin // tile, begin // tile + 1, 1
            if stride != 1 or begin % tile or end % tile:
                return None
            return begin // tile, end // tile, 1

        parts = jax.tree.leaves(self.array)
        cuts = [[block(dim, part) for dim in range(part.ndim)] for part in parts]
        if any(None in spans for spans in cuts):
            return NotImplemented
        cut = [lax.slice(part, *zip(*spans, strict=True))
               for part, spans in zip(parts, cuts, strict=True)]  # fmt: skip
        array = jax.tree.unflatten(jax.tree.structure(self.array), cut)
        return dataclasses.replace(self, array=array)

    def dynamic_slice(self, starts: Sequence[Any], sizes: Sequence[int]) -> Any:
        """The part of these sizes from traced starts on, or `NotImplemented` if it cuts a block."""
        spans = self.by_array_dim(list(zip(starts, sizes, strict=True)))
        for dim, (_, size) in enumerate(spans):
            length, count = self.array.shape[dim], self.array.scale.shape[dim]
            if size not in (1, length) and count not in (1, length):
                return NotImplemented

        def cut(part: jax.Array) -> jax.Array:
            begins, lengths = [], []
            for dim, (start, size) in enumerate(spans):
                tile = _tile(self.array.shape[dim], part.shape[dim])
                begins.append(start // tile if tile > 1 else start)
                lengths.append(min(size, part.shape[dim]))
            # Not lax.dynamic_slice: it would count a start that is negative still from the end.
            operands = compat.unify_varying_axes(part, *begins)
            return primitives.dynamic_slice_p.bind(*operands, slice_sizes=tuple(lengths))

        return self.map(cut)


# ------------------------------------------------------------------------------------------
# Rules: (equation, codes, other operands) to the list of results

ON_CODES: dict[Any, Callable[..., Any]] = {}


def _pointwise(eqn: Any, codes: Codes) -> list[Codes]:
    operation = lambda x: compat.bind(eqn, [x])  # noqa: E731
    return [dataclasses.replace(codes, after=(*codes.after, operation))]


def _transpose(eqn: Any, codes: Codes) -> list[Codes]:
    order = tuple(codes.order[dim] for dim in eqn.params["permutation"])
    return [dataclasses.replace(codes, order=order)]


def _squeeze(eqn: Any, codes: Codes) -> list[Codes]:
    return [codes.squeeze(eqn.params["dimensions"])]


def _reshape(eqn: Any, codes: Codes, *dynamic_shape: Any) -> Any:
    if not codes.in_order or eqn.params["dimensions"] is not None or dynamic_shape:
        return NotImplemented
    shape = eqn.params["new_sizes"]
    try:
        array = codes.array.reshape(*shape)
    except ValueError:  # it would break blocks
        return NotImplemented
    return [dataclasses.replace(codes, array=array, order=tuple(range(len(shape))))]


def _slice(eqn: Any, codes: Codes) -> Any:
    strides = eqn.params["strides"] or (1,) * len(codes.order)
    cut = codes.slice(eqn.params["start_indices"], eqn.params["limit_indices"], strides)
    return cut if cut is NotImplemented else [cut]


def _dynamic_slice(eqn: Any, codes: Codes, *starts: Any) -> Any:
    cut = codes.dynamic_slice(starts, eqn.params["slice_sizes"])
    return cut if cut is NotImplemented else [cut]


def _split(eqn: Any, codes: Codes) -> Any:
    ends = np.cumsum(eqn.params["sizes"]).tolist()
    return _parts(codes, eqn.params["axis"], list(zip([0, *ends[:-1]], ends, strict=True)))


def _unstack(eqn: Any, codes: Codes) -> Any:
    dim = eqn.params["axis"]
    length = codes.array.shape[codes.order[dim]]
    parts = _parts(codes, dim, [(i, i + 1) for i in range(length)])
    return parts if parts is NotImplemented else [part.squeeze([dim]) for part in parts]


def _parts(codes: Codes, dim: int, spans: Sequence[tuple[int, int]]) -> Any:
    """The parts of these spans along one dim."""
    shape = [codes.array.shape[d] for d in codes.order]
    ones = (1,) * len(shape)

    def part(begin: int, end: int) -> Any:
        start = [begin if d == dim else 0 for d in range(len(shape))]
        limit = [end if d == dim else n for d, n in enumerate(shape)]
        return codes.slice(start, limit, ones)

    parts = [part(*span) for span in spans]
    return NotImplemented if any(p is NotImplemented for p in parts) else parts


def _gather(eqn: Any, codes: Codes, indices: jax.Array) -> Any:
    """Whole slices picked by one index for each of some dims: rows, layers, experts."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape, indexed = codes.array.shape, numbers.start_index_map
    is_whole = all(
        sizes[dim] == (1 if dim in indexed else length) for dim, length in enumerate(shape)
    )
    fills = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    has_value = eqn.params["fill_value"] is not None or codes.array.zero_point is not None
    if not codes.in_order or not is_whole or numbers.operand_batching_dims or (fills and has_value):
        return NotImplemented

    def pick(part: jax.Array) -> jax.Array:
        tiles = [_tile(shape[dim], part.shape[dim]) for dim in indexed]
        by_block = any(tile > 1 for tile in tiles)
        return lax.gather(
            part,
            # Rounded down, an index out of bounds stays out of bounds.
            indices // _row(tiles, indices) if by_block else indices,
            numbers,
            [1 if dim in indexed else length for dim, length in enumerate(part.shape)],
            unique_indices=eqn.params["unique_indices"] and not by_block,
            indices_are_sorted=eqn.params["indices_are_sorted"] and not by_block,
            mode=eqn.params["mode"],
            fill_value=math.nan if jnp.issubdtype(part.dtype, jnp.floating) else 0,
        )

    array = jax.tree.map(pick, codes.array)
    return [dataclasses.replace(codes, array=array, order=tuple(range(array.ndim)))]


def _row(values: Sequence[int], like: jax.Array) -> jax.Array:
    """The values along the last dim of an array of as many dims."""
    return jnp.array(values, like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


for _primitive in (
    primitives.convert_element_type_p,
    primitives.reduce_precision_p,
    primitives.neg_p,
    compat.name_p,
):
    ON_CODES[_primitive] = _pointwise
ON_CODES[primitives.transpose_p] = _transpose
ON_CODES[primitives.squeeze_p] = _squeeze
ON_CODES[primitives.reshape_p] = _reshape
ON_CODES[primitives.slice_p] = _slice
ON_CODES[primitives.dynamic_slice_p] = _dynamic_slice
ON_CODES[primitives.gather_p] = _gather
ON_CODES[compat.split_p] = _split
if compat.unstack_p is not None:
    ON_CODES[compat.unstack_p] = _unstack
