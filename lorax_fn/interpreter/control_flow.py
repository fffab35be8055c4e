"""Equations that hold a jaxpr: the body is interpreted, the equation made again around it.

A `Weight` is a pytree, so JAX's own flattening carries it into and out of the bodies.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core.primitives as primitives
import jax.numpy as jnp
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.sharding import NamedSharding, PartitionSpec

from lorax_fn.interpreter import compat
from lorax_fn.interpreter.dropout import has_dropout, with_step
from lorax_fn.interpreter.loop import interpret, interpret_in_place
from lorax_fn.interpreter.pending import settled
from lorax_fn.interpreter.placement import constrain_factors, factor_spec
from lorax_fn.interpreter.quantized import Lazy, computed, constrained, split_specs
from lorax_fn.interpreter.rule import RULES, Context
from lorax_fn.interpreter.weight import Weight, leading_slices, stack_leading

# ------------------------------------------------------------------------------------------
# Calls


def _jit(ctx: Context, eqn: Any, *operands: Any) -> list[Any]:
    """Interpreted in place, so that a symbolic weight can come back out."""
    params = eqn.params
    placed = list(map(_constrained, operands, params["in_shardings"]))
    with jax.named_scope(f"jit({params['name']})"):
        results = interpret_in_place(ctx.within(eqn), params["jaxpr"], placed)
    return list(map(_constrained, results, params["out_shardings"]))


def _constrained(value: Any, sharding: Any) -> Any:
    """A value as a nested `jit` with explicit shardings would place it."""
    if not isinstance(sharding, NamedSharding):
        return value
    if isinstance(value, Weight):
        return constrain_factors(value, constrained(value.base, sharding), sharding)
    return lax.with_sharding_constraint(settled(value), sharding)


def _closed_call(ctx: Context, eqn: Any, *operands: Any) -> list[Any]:
    return interpret_in_place(ctx, eqn.params["call_jaxpr"], operands)


def _remat(ctx: Context, eqn: Any, *operands: Any) -> list[Any]:
    leaves, treedef = jax.tree.flatten(list(operands))
    counts = [len(jax.tree.leaves(operand)) for operand in operands]
    out_tree = None

    def body(*flat: Any) -> list[Any]:
        nonlocal out_tree
        results = interpret(ctx, eqn.params["jaxpr"], jax.tree.unflatten(treedef, flat))
        flat_results, out_tree = jax.tree.flatten(results)
        return flat_results

    results = compat.rebind_remat(eqn, body, leaves, counts)
    return jax.tree.unflatten(out_tree, results)


RULES[primitives.jit_p] = _jit
RULES[primitives.closed_call_p] = _closed_call
RULES[compat.remat_p] = _remat


# ------------------------------------------------------------------------------------------
# Loops


def _scan(ctx: Context, eqn: Any, *operands: Any) -> list[Any]:
    n_consts, n_carry = compat.scan_counts(eqn.params)
    consts = operands[:n_consts]
    carry = list(operands[n_consts : n_consts + n_carry])
    stacks, rebuild = _split_xs(operands[n_consts + n_carry :])
    index = jnp.arange(eqn.params["length"]) if any(map(has_dropout, consts)) else None

    def step(ctx: Context, carry: list[Any], x: Any) -> tuple[list[Any], list[Any]]:
        slices, i = x
        own = consts if i is None else [with_step(const, i) for const in consts]
        results = interpret(ctx, eqn.params["jaxpr"], [*own, *carry, *rebuild(slices)])
        return results[:n_carry], list(map(_with_base, results[n_carry:]))

    xs = (stacks, index)
    one = jax.tree.map(_abstract_slice, xs)
    carry = _stable_carry(ctx, eqn, lambda trial, c, x: step(trial, c, x)[0], carry, one)

    def stable_step(carry: list[Any], x: Any) -> tuple[list[Any], list[Any]]:
        after, ys = step(ctx, carry, x)
        return _like(ctx, eqn, after, carry), ys

    carry, ys = lax.scan(stable_step, carry, xs, **compat.scan_options(eqn.params))
    return [*carry, *(stack_leading(y) if isinstance(y, Weight) else y for y in ys)]


def _with_base(value: Any) -> Any:
    """A weight that a loop stacks: its base has to be there."""
    if not isinstance(value, Weight):
        return value
    return dataclasses.replace(value, base=computed(value.base))


def _abstract_slice(x: Any) -> Any:
    """What the body sees of x."""
    if x.shape[0] == 0:
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    return jax.eval_shape(lambda x: lax.index_in_dim(x, 0, keepdims=False), x)


def _split_xs(xs: Sequence[Any]) -> tuple[list[list[Any]], Callable[[Any], list[Any]]]:
    """The arrays to scan over, and the function from one step's slices to the body's operands."""
    parts = [leading_slices(x) if isinstance(x, Weight) else ([x], lambda s: s[0]) for x in xs]
    arrays = [arrays for arrays, _ in parts]

    def rebuild(slices: Any) -> list[Any]:
        return [make(part) for (_, make), part in zip(parts, slices, strict=True)]

    return arrays, rebuild


def _while(ctx: Context, eqn: Any, *operands: Any) -> list[Any]:
    params = eqn.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = operands[:n_cond], operands[n_cond : n_cond + n_body]

    def body(ctx: Context, carry: list[Any]) -> list[Any]:
        return interpret(ctx, params["body_jaxpr"], [*body_consts, *carry])

    def proceed(carry: list[Any]) -> jax.Array:
        (result,) = interpret(ctx, params["cond_jaxpr"], [*cond_consts, *carry])
        return result

    carry = _stable_carry(ctx, eqn, body, list(operands[n_cond + n_body :]))
    return lax.while_loop(proceed, lambda c: _like(ctx, eqn, body(ctx, c), c), carry)


def _stable_carry(
    ctx: Context,
    eqn: Any,
    step: Callable[..., list[Any]],
    carry: list[Any],
    *inputs: Any,
) -> list[Any]:
    """Adds up those weights of a loop's carry that the body does not hand on symbolically.

    Those it does hand on may change places, so each gets the paths of all that it may be. The body
    is `step(ctx, carry, *inputs)`; inputs may be abstract.
    """
    trial = Context(on_event=lambda event: None)  # the loop proper will report
    while any(isinstance(value, Weight) for value in carry):
        after = jax.eval_shape(functools.partial(step, trial), carry, *inputs)
        stable = [_held(ctx, eqn, *pair) for pair in zip(carry, after, strict=True)]
        if all(new is old for new, old in zip(stable, carry, strict=True)):
            break
        carry = stable
    return carry


def _held(ctx: Context, eqn: Any, value: Any, after: Any) -> Any:
    """One value of a carry in a form that covers what it is after a step."""
    if not isinstance(value, Weight):
        return value
    if not _same_form(value, after):
        lazy = isinstance(value.base, Lazy)  # and other in each step, such as a weight that fades
        return _with_base(value) if lazy else ctx.add_up(value, eqn)
    paths = tuple(dict.fromkeys((*value.paths, *after.paths)))
    return value if paths == value.paths else dataclasses.replace(value, paths=paths)


def _same_form(weight: Weight, other: Any) -> bool:
    """Whether two values have the same structure, shapes and dtypes, whatever their paths."""
    if not isinstance(other, Weight):
        return False
    return bool(_form(weight) == _form(other))


def _form(weight: Weight) -> Any:
    leaves, treedef = jax.tree.flatten(dataclasses.replace(weight, paths=()))
    return treedef, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _like(ctx: Context, eqn: Any, values: list[Any], carry: list[Any]) -> list[Any]:
    """The values of the next carry in the forms of this one."""
    return [
        dataclasses.replace(value, paths=wanted.paths)
        if isinstance(wanted, Weight)
        else ctx.add_up(value, eqn)
        for value, wanted in zip(values, carry, strict=True)
    ]


RULES[primitives.scan_p] = _scan
RULES[primitives.while_p] = _while


# ------------------------------------------------------------------------------------------
# Branches


def _cond(ctx: Context, eqn: Any, index: Any, *operands: Any) -> list[Any]:
    leaves, treedef = jax.tree.flatten(list(operands))
    traced = [_traced(ctx, branch, leaves, treedef) for branch in eqn.params["branches"]]
    forms = [jax.tree.unflatten(tree, jaxpr.out_avals) for jaxpr, tree in traced]
    paths = [_joint_paths(values) for values in zip(*forms, strict=True)]

    def unified(jaxpr: Any, tree: Any) -> Callable[..., list[Any]]:
        """The branch with its results in a form that all branches share."""

        def run(*leaves: Any) -> list[Any]:
            results = jax.tree.unflatten(tree, jaxpr_as_fun(jaxpr)(*leaves))
            return [
                ctx.add_up(value, eqn) if own is None else dataclasses.replace(value, paths=own)
                for value, own in zip(results, paths, strict=True)
            ]

        return run

    branches = [unified(*branch) for branch in traced]
    return compat.rebuild_switch(eqn.params, index, branches, leaves)


def _traced(ctx: Context, branch: Any, leaves: list[Any], treedef: Any) -> tuple[Any, Any]:
    """A branch interpreted once: the jaxpr over flat arrays, and the structure of its results."""
    tree = None

    def flat(*leaves: Any) -> list[Any]:
        nonlocal tree
        results = interpret(ctx, branch, jax.tree.unflatten(treedef, leaves))
        arrays, tree = jax.tree.flatten(results)
        return arrays

    return jax.make_jaxpr(flat)(*leaves), tree


def _joint_paths(values: Sequence[Any]) -> tuple[str, ...] | None:
    """The paths of a result that is a weight of one form in all branches, else None."""
    if not all(isinstance(v, Weight) and _same_form(values[0], v) for v in values):
        return None
    return tuple(dict.fromkeys(path for value in values for path in value.paths))


RULES[primitives.cond_p] = _cond


# ------------------------------------------------------------------------------------------
# shard_map


def _shard_map(ctx: Context, eqn: Any, *operands: Any) -> list[Any]:
    """Each factor is split as the weight is along the dims that it spans."""
    leaves, treedef = jax.tree.flatten(list(operands))
    sizes = eqn.params["mesh"].shape
    specs = [_specs(*pair, sizes) for pair in zip(operands, eqn.params["in_specs"], strict=True)]

    def body(*flat: Any) -> list[jax.Array]:
        results = interpret(ctx, eqn.params["jaxpr"], jax.tree.unflatten(treedef, flat))
        return [ctx.add_up(result, eqn) for result in results]

    return jax.shard_map(
        body,
        in_specs=tuple(spec for group in specs for spec in group),
        out_specs=list(eqn.params["out_specs"]),
        **compat.shard_map_options(eqn.params),
    )(*leaves)


def _specs(operand: Any, spec: Any, sizes: Any) -> list[PartitionSpec]:
    """A spec for every array of the operand, in flatten order, on a mesh of these sizes."""
    if not isinstance(operand, Weight):
        return [spec]
    base = split_specs(operand.base, spec, sizes)
    placed = operand.map(base, lambda f: f.with_array(factor_spec(f, spec, operand.ndim)))
    return jax.tree.leaves(placed, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


RULES[compat.shard_map_p] = _shard_map
