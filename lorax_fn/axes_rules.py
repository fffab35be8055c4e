"""How each primitive moves the dims of the weights that it meets: the rules behind `infer_axes`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.extend import core as jax_core
from jax.extend.core import primitives as prims

from lorax_fn.axes_flow import (
    LOOKUP,
    ON_DATA,
    ON_WEIGHTS,
    PICK,
    Analysis,
    Dims,
    Kind,
    Rule,
    Trace,
    Value,
    join,
    make_value,
)
from lorax_fn.interpreter import compat

# --- Contractions ---------------------------------------------------------------------------------


def _contraction(values: Sequence[Value]) -> tuple[Kind, int]:
    """The kind of a product and the rank of the uses in it."""
    kinds = {v.kind for v in values}
    kind = kinds.pop() if len(kinds) == 1 else Kind.DATA
    return kind, ON_DATA if kind == Kind.DATA else ON_WEIGHTS


def _dot_general(analysis: Analysis, eqn: Any, values: list[Value]) -> list[Value]:
    contracts, batches = eqn.params["dimension_numbers"]
    frees = [
        [d for d in range(var.aval.ndim) if d not in {*contract, *batch}]
        for var, contract, batch in zip(eqn.invars, contracts, batches, strict=True)
    ]
    kind, rank = _contraction(values)
    results = []
    for side, other in ((0, 1), (1, 0)):
        for t in values[side].weights:
            if analysis.use(rank, t, batches[side], contracts[side]):
                kept = [[t.dims[d] if s == side else () for d in frees[s]] for s in (0, 1)]
                # (batch…, lhs free…, rhs free…)
                dims = (*[()] * len(batches[0]), *kept[0], *kept[1])
                results.append(Trace(t.leaf, dims, is_result=True))
        if values[other].kind == Kind.WEIGHT and values[other].weights:
            for t in values[side].results:
                analysis.shared |= {(t.leaf, o) for o in t.origins(batches[side])}
    return [make_value(kind, results)]


def _conv_general_dilated(analysis: Analysis, eqn: Any, values: list[Value]) -> list[Value]:
    numbers = eqn.params["dimension_numbers"]
    out_dim, *contract = numbers.rhs_spec
    groups = max(eqn.params["feature_group_count"], eqn.params["batch_group_count"])
    kind, rank = _contraction(values)
    results = []
    for t in values[1].weights:
        # vmap of a convolution folds the mapped dim of the kernels into their output features, as
        # groups; the output features of an ordinary grouped convolution have a single origin.
        # So have those of a depthwise kernel reshaped to it, which has no dim of input features.
        mapped = _leading_of_size(t.dims[out_dim], analysis.shapes[t.leaf], groups)
        if mapped and t.dims[contract[0]]:
            dims = list(t.dims)
            dims[out_dim] = dims[out_dim][len(mapped) :]
            t = t._replace(dims=tuple(dims), batch=t.batch | {*mapped})
            for r in values[0].results:
                features = r.dims[numbers.lhs_spec[1]]
                indexed = _leading_of_size(features, analysis.shapes[r.leaf], groups)
                analysis.shared |= {(r.leaf, o) for o in indexed}
        if analysis.use(rank, t, (), contract):
            features = numbers.out_spec[1]
            dims = [t.dims[out_dim] if d == features else () for d in range(len(t.dims))]
            results.append(Trace(t.leaf, tuple(dims), is_result=True))
    return [make_value(kind, results)]


def _leading_of_size(
    origins: tuple[int, ...], sizes: Sequence[int], product: int
) -> tuple[int, ...]:
    """The outermost origins, not all, whose sizes multiply to `product`; else none."""
    for n in range(1, len(origins)):
        if math.prod(sizes[o] for o in origins[:n]) == product:
            return origins[:n]
    return ()


def _ragged_dot_general(analysis: Analysis, eqn: Any, values: list[Value]) -> list[Value]:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contract), (_, batch) = numbers.dot_dimension_numbers
    kind, rank = _contraction(values[:2])
    for t in values[1].weights:
        analysis.use(rank, t, (*batch, *numbers.rhs_group_dimensions), contract)
    return [Value(kind)]


# --- Lookups and picks ----------------------------------------------------------------------------


def _gather(analysis: Analysis, eqn: Any, values: list[Value]) -> list[Value]:
    numbers, slices = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape, ndim = eqn.invars[0].aval.shape, eqn.outvars[0].aval.ndim
    mapped = numbers.operand_batching_dims
    picked = [
        d
        for d in range(len(shape))
        if d in numbers.collapsed_slice_dims or (slices[d] == 1 < shape[d] and d not in mapped)
    ]
    offset = [d for d in range(len(shape)) if d not in {*numbers.collapsed_slice_dims, *mapped}]

    def follow(t: Trace) -> Trace:
        dims: list[tuple[int, ...]] = [()] * ndim
        for out_dim, d in zip(numbers.offset_dims, offset, strict=True):
            dims[out_dim] = () if d in picked else t.dims[d]
        return t._replace(dims=tuple(dims), batch=analysis.pick(t, [*picked, *mapped]))

    many = ndim > len(numbers.offset_dims)
    return [_look_up(analysis, values[0], picked, mapped, follow, many=many)]


def _dynamic_slice(analysis: Analysis, eqn: Any, values: list[Value]) -> list[Value]:
    shape, starts = eqn.invars[0].aval.shape, eqn.invars[1:]
    picked = [
        d
        for d, size in enumerate(eqn.params["slice_sizes"])
        if size == 1 < shape[d] and not isinstance(starts[d], jax_core.Literal)
    ]
    return [_look_up(analysis, values[0], picked, (), lambda t: t)]


def _look_up(
    analysis: Analysis,
    value: Value,
    picked: Sequence[int],
    mapped: Sequence[int],
    follow: Callable[[Trace], Trace],
    *,
    many: bool = False,
) -> Value:
    """Picking entries that are vectors looks them up; larger ones are weights (layers, experts).

    If nothing contracts the larger ones later, picking `many` of them was a lookup too.
    """
    followed, found = [], False
    for t in value.traces:
        rest = [d for d in range(len(t.dims)) if d not in {*picked, *mapped} and t.dims[d]]
        if not t.is_result and len(rest) == 1 and t.origins(picked):
            analysis.use(LOOKUP, t, mapped, picked)
            found = True
            continue
        followed.append(follow(t))
        if many and not t.is_result and t.origins(picked):
            analysis.use(PICK, t, mapped, picked)
    return make_value(Kind.DATA if found else value.kind, followed)


# --- Shape operations -----------------------------------------------------------------------------


def _transpose(analysis: Analysis, eqn: Any, values: list[Value]) -> list[Value]:
    order = eqn.params["permutation"]
    return [values[0].map(lambda t: t._replace(dims=tuple(t.dims[d] for d in order)))]


def _broadcast_in_dim(analysis: Analysis, eqn: Any, values: list[Value]) -> list[Value]:
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    source = {to: d for d, to in enumerate(eqn.params["broadcast_dimensions"]) if old[d] == new[to]}

    def follow(t: Trace) -> Trace:
        dims = tuple(t.dims[source[d]] if d in source else () for d in range(len(new)))
        repeated = set(range(len(old))) - set(source.values())
        return t._replace(dims=dims, batch=analysis.pick(t, repeated))

    return [values[0].map(follow)]


def _drop(analysis: Analysis, value: Value, dropped: Iterable[int]) -> Value:
    dropped = set(dropped)

    def follow(t: Trace) -> Trace:
        kept = tuple(origins for d, origins in enumerate(t.dims) if d not in dropped)
        return t._replace(dims=kept, batch=analysis.pick(t, dropped))

    return value.map(follow)


def _squeeze(analysis: Analysis, eqn: Any, values: list[Value]) -> list[Value]:
    return [_drop(analysis, values[0], eqn.params["dimensions"])]


def _stack(analysis: Analysis, eqn: Any, values: list[Value]) -> list[Value]:
    at = eqn.params["axis"]
    stacked = [v.map(lambda t: t._replace(dims=(*t.dims[:at], (), *t.dims[at:]))) for v in values]
    return [join(*stacked)]


def _unstack(analysis: Analysis, eqn: Any, values: list[Value]) -> list[Value]:
    return [_drop(analysis, values[0], [eqn.params["axis"]])] * len(eqn.outvars)


def _reshape(analysis: Analysis, eqn: Any, values: list[Value]) -> list[Value]:
    shape, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    order = eqn.params["dimensions"] or range(len(shape))  # vmap transposes on the way

    def follow(t: Trace) -> Trace:
        old = [(shape[d], t.dims[d]) for d in order]
        dims = _regroup(old, new, analysis.shapes[t.leaf])
        kept = {o for origins in dims for o in origins}
        gone = [d for d, origins in enumerate(t.dims) if kept.isdisjoint(origins)]
        return t._replace(dims=dims, batch=analysis.pick(t, gone))

    return [values[0].map(follow)]


def _regroup(
    old: Sequence[tuple[int, tuple[int, ...]]], new: Sequence[int], sizes: Sequence[int]
) -> Dims:
    """The origins after a reshape of dims (size, origins) of a leaf with these `sizes`.

    The shortest runs of old and of new dims with the same product belong together.
    """
    if 0 in new:
        return (tuple(o for _, origins in old for o in origins),) * len(new)
    parts: list[tuple[int, tuple[int, ...]]] = []
    for size, origins in old:
        if origins and math.prod(sizes[o] for o in origins) == size:
            parts += [(sizes[o], (o,)) for o in origins]  # merged before, taken apart again
        else:
            parts.append((size, origins))
    have = iter([part for part in parts if part[0] != 1])
    want = iter([(d, size) for d, size in enumerate(new) if size != 1])
    regrouped: list[tuple[int, ...]] = [()] * len(new)
    for d, missing in want:
        run, present, origins = [d], 1, ()
        while present != missing:
            if present < missing:
                size, more = next(have)
                present, origins = present * size, origins + more
            else:
                d, size = next(want)
                missing *= size
                run.append(d)
        for d in run:
            regrouped[d] = origins
    return tuple(regrouped)


def _all_gather(analysis: Analysis, eqn: Any, values: list[Value]) -> list[Value]:
    if eqn.params["tiled"]:
        return _same_rank(analysis, eqn, values)
    at = eqn.params["all_gather_dimension"]
    return [v.map(lambda t: t._replace(dims=(*t.dims[:at], (), *t.dims[at:]))) for v in values]


def _same_rank(analysis: Analysis, eqn: Any, values: list[Value]) -> list[Value]:
    """Elementwise operations, and those that slice, pad, join or sort: dims stay where they are.

    What a weight becomes by masking, quantising or adding to it is still that weight. What data
    become is data, unless the weight merely scales them.
    """
    if len(values) == len(eqn.outvars) > 1:  # one output for each operand
        return [_stay(eqn, [v], out) for v, out in zip(values, eqn.outvars, strict=True)]
    return [_stay(eqn, values, out) for out in eqn.outvars]


def _stay(eqn: Any, values: list[Value], outvar: Any) -> Value:
    kind, ndim = max((v.kind for v in values), default=Kind.CONST), len(outvar.aval.shape)
    linear = kind != Kind.DATA or eqn.primitive in LINEAR
    traces = (t for v in values for t in v.traces if len(t.dims) == ndim)
    return make_value(kind, (t for t in traces if linear or t.is_result))


# --- Control flow ---------------------------------------------------------------------------------


def _scan(analysis: Analysis, eqn: Any, values: list[Value]) -> list[Value]:
    n_consts, n_carry = compat.scan_counts(eqn.params)
    consts, carry = values[:n_consts], values[n_consts : n_consts + n_carry]
    stacks = values[n_consts + n_carry :]
    slices = [
        v.map(lambda t: t._replace(dims=t.dims[1:], batch=t.batch | t.origins([0]))) for v in stacks
    ]
    scanned = {(t.leaf, t.dims[0]) for v in stacks for t in v.traces}

    def restack(t: Trace) -> Trace:
        """Gives a slice that comes back out its leading dim again."""
        leading = next((d for leaf, d in scanned if leaf == t.leaf and t.batch >= {*d}), ())
        return t._replace(dims=(leading, *t.dims), batch=t.batch - {*leading})

    def body(carry: list[Value]) -> list[Value]:
        return analysis.run(eqn.params["jaxpr"], [*consts, *carry, *slices])

    carry, outputs = _fixed_point(body, carry)
    return [*carry, *(v.map(restack) for v in outputs[n_carry:])]


def _while(analysis: Analysis, eqn: Any, values: list[Value]) -> list[Value]:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    consts = values[n_cond : n_cond + n_body]

    def body(carry: list[Value]) -> list[Value]:
        return analysis.run(eqn.params["body_jaxpr"], [*consts, *carry])

    carry, _ = _fixed_point(body, values[n_cond + n_body :])
    analysis.run(eqn.params["cond_jaxpr"], [*values[:n_cond], *carry])
    return carry


def _fixed_point(
    body: Callable[[list[Value]], list[Value]], carry: list[Value]
) -> tuple[list[Value], list[Value]]:
    """Runs a loop's body until its carry holds all that it ever may: (carry, last outputs)."""
    while True:
        outputs = body(carry)
        grown = [join(*pair) for pair in zip(carry, outputs[: len(carry)], strict=True)]
        if grown == carry:
            return carry, outputs
        carry = grown


def _cond(analysis: Analysis, eqn: Any, values: list[Value]) -> list[Value]:
    outputs = [analysis.run(branch, values[1:]) for branch in eqn.params["branches"]]
    return [join(*alternatives) for alternatives in zip(*outputs, strict=True)]


LINEAR = {
    prims.mul_p,
    prims.div_p,
    prims.neg_p,
    prims.select_n_p,
    prims.convert_element_type_p,
    prims.reduce_precision_p,
    prims.copy_p,
    prims.slice_p,
    prims.rev_p,
    compat.split_p,
    prims.stop_gradient_p,
    prims.sharding_constraint_p,
    compat.reshard_p,
    compat.optimization_barrier_p,
}

RULES: dict[Any, Rule] = {
    prims.dot_general_p: _dot_general,
    prims.conv_general_dilated_p: _conv_general_dilated,
    compat.ragged_dot_general_p: _ragged_dot_general,
    prims.gather_p: _gather,
    prims.dynamic_slice_p: _dynamic_slice,
    prims.transpose_p: _transpose,
    prims.broadcast_in_dim_p: _broadcast_in_dim,
    prims.squeeze_p: _squeeze,
    prims.reshape_p: _reshape,
    prims.all_gather_p: _all_gather,
    prims.scan_p: _scan,
    prims.while_p: _while,
    prims.cond_p: _cond,
}
if compat.stack_p is not None:
    RULES[compat.stack_p] = _stack
    RULES[compat.unstack_p] = _unstack


def rule_for(eqn: Any) -> Rule:
    """The rule for an equation: by its primitive, or by what its params show."""
    if eqn.primitive in RULES:
        return RULES[eqn.primitive]
    for param in eqn.params.values():  # jit, remat, custom_jvp, shard_map, …
        jaxpr = getattr(param, "jaxpr", param)
        if isinstance(jaxpr, jax_core.Jaxpr) and (
            (len(jaxpr.invars), len(jaxpr.outvars)) == (len(eqn.invars), len(eqn.outvars))
        ):
            return lambda analysis, eqn, values: analysis.run(jaxpr, values)
    return _same_rank
