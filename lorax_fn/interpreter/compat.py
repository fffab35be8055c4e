"""Everything that differs between JAX versions, and every touch of JAX's internals.

Supported: jax 0.8.0 to 0.11. No other module of the package asks for a version or imports
`jax._src`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.extend.source_info_util as source_info_util
from jax._src import (
    ad_checkpoint,
    ad_util as _ad_util,
    core as _core,
    mesh as _mesh,
    pjit as _pjit,
    shard_map as _shard_map,
)
from jax._src.interpreters import partial_eval as _partial_eval
from jax._src.lax import lax as _lax

# The primitives that `jax.extend.core.primitives` does not name in every supported version.
remat_p = ad_checkpoint.remat_p
name_p = ad_checkpoint.name_p
shard_map_p = _shard_map.shard_map_p
ragged_dot_general_p = _lax.ragged_dot_general_p
split_p = _lax.split_p
optimization_barrier_p = _lax.optimization_barrier_p
stop_gradient_p = _ad_util.stop_gradient_p
pvary_p = _core.pvary_p
reshard_p = _pjit.reshard_p
# None before 0.10, where `jnp.stack` was a concatenation.
stack_p = getattr(_lax, "stack_p", None)
unstack_p = getattr(_lax, "unstack_p", None)


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """Splits a closed or open jaxpr into (jaxpr, constants); in 0.11 the two are one class."""
    consts = getattr(jaxpr, "consts", ())
    return getattr(jaxpr, "jaxpr", jaxpr), consts


def bind(eqn: Any, operands: Sequence[Any]) -> Any:
    """Evaluates an equation unchanged on other operands."""
    params = eqn.primitive.get_bind_params(eqn.params)
    # Before 0.9.2 the sub-functions came apart from the params.
    subfuns, params = params if isinstance(params, tuple) else ((), params)
    return eqn.primitive.bind(*subfuns, *operands, **params)


def has_body(eqn: Any) -> bool:
    """Whether an equation holds jaxprs or functions: a loop, a branch, a derivative, a kernel."""
    values = [v for p in eqn.params.values() for v in (p if isinstance(p, tuple | list) else (p,))]
    return any(callable(v) or hasattr(getattr(v, "jaxpr", v), "eqns") for v in values)


@contextlib.contextmanager
def equation_context(eqn: Any) -> Iterator[None]:
    """Keeps the traceback, name stack, mesh and metadata that the equation was traced under."""
    name_stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    traceback = eqn.source_info.traceback
    with source_info_util.user_context(traceback, name_stack=name_stack), eqn.ctx.manager:
        yield


def source_line(eqn: Any) -> str:
    """Where in the user's code the equation was traced, as `file:line (function)`, or ""."""
    return source_info_util.summarize(eqn.source_info)


def prune(closed: Any) -> Any:
    """Drops the equations that no output needs (effects stay)."""
    jaxpr, consts = open_jaxpr(closed)
    pruned, _ = _partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return jex_core.ClosedJaxpr(pruned, consts)


def hoist_constants(closed: Any) -> tuple[Any, list[Any]]:
    """Turns a traced jaxpr's constants into leading inputs: (open jaxpr, those inputs)."""
    jaxpr, consts = open_jaxpr(closed)
    return _partial_eval.convert_constvars_jaxpr(jaxpr), list(consts)


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """The numbers of constants and of carries of a `scan` equation."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # from 0.11 on
    return len(list(consts)), len(list(carry))


def scan_options(params: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments with which `lax.scan` makes the same `scan` equation again."""
    names = ("length", "reverse", "unroll", "_split_transpose")  # the last until 0.10
    return {name: params[name] for name in names if name in params}


def rebind_remat(eqn: Any, body: Callable, operands: Sequence[Any], counts: Sequence[int]) -> Any:
    """A `remat` equation with another body; `counts[i]` operands stand for its i-th one.

    Binding anew, rather than calling `jax.checkpoint`, keeps `differentiated` and so the
    optimisation barrier of a checkpoint that was differentiated inside the user's function.
    """
    jaxpr, consts = hoist_constants(jax.make_jaxpr(body)(*operands))
    params = dict(eqn.params, jaxpr=jaxpr)
    if isinstance(params["prevent_cse"], tuple):
        spread = [flag for flag, n in zip(params["prevent_cse"], counts, strict=True)
                  for _ in range(n)]  # fmt: skip
        params["prevent_cse"] = (False,) * len(consts) + tuple(spread)
    return remat_p.bind(*consts, *operands, **params)


def rebuild_switch(
    params: dict[str, Any], index: Any, branches: Iterable[Callable], operands: Sequence[Any]
) -> Any:
    """A `cond` equation with other branches: `lax.cond`, `lax.switch` or `platform_dependent`."""
    branches = tuple(branches)
    platforms = params.get("branches_platforms")
    if platforms is not None:
        named = {
            platform: branch
            for names, branch in zip(platforms, branches, strict=True)
            for platform in names or ("default",)
        }
        return jax.lax.platform_dependent(*operands, **named)
    if index.dtype == bool:
        return jax.lax.cond(index, branches[1], branches[0], *operands)
    return jax.lax.switch(index, branches, *operands)


def shard_map_options(params: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments, but for the specs, that make the same `shard_map` again."""
    manual = params["newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"]
    return {"mesh": params["mesh"], "axis_names": manual, "check_vma": params["check_vma"]}


def unify_varying_axes(*operands: Any) -> list[Any]:
    """Inside `shard_map`, marks all operands as varying over the axes that any one varies over.

    `lax`'s functions do this before they bind a primitive; a primitive bound directly does not.
    """
    # Renamed from standard_insert_pvary after jax 0.8.
    unify = getattr(_core, "auto_insert_reshard", None) or _core.standard_insert_pvary
    return list(unify(*operands))


def varying_axes(array: Any) -> frozenset[Any]:
    """The mesh axes along which an array within `shard_map` may differ, if its type tells."""
    aval = jax.typeof(array)
    found = getattr(aval, "manual_axis_type", None)  # from jax 0.10 on
    return frozenset(found.varying if found is not None else aval.vma)


def current_mesh() -> Any:
    """The mesh set by `jax.set_mesh` or entered by `with mesh:`, or None."""
    for mesh in (_mesh.get_concrete_mesh(), _mesh.thread_resources.env.physical_mesh):
        if mesh is not None and not mesh.empty:
            return mesh
    return None


def canonical_precision(precision: Any) -> Any:
    """The `precision` that `lax.dot_general` binds, `jax.default_matmul_precision` included."""
    return _lax.canonicalize_precision(precision)
