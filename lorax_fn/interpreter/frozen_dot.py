"""A contraction with a frozen weight that is computed anew in the backward pass.

`frozen_dot(fn, x, constants)` is `fn(x, x, *constants)`, which has to be linear in its second
argument: x meets a weight that `fn` makes of the constants once its first argument is there. The
transpose makes the weight again, waiting for the cotangent, so that between the forward and the
backward pass the constants are kept and not the weight. Forward mode, `vmap` and derivatives of any
order work, which a `custom_vjp` would forbid; `jax.checkpoint` leaves it to an optimisation
barrier, which XLA:CPU drops, that the weight is not kept after all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir


def frozen_dot(fn: Callable[..., Any], x: Any, constants: Sequence[Any]) -> Any:
    """`fn(x, x, *constants)`, of which nothing is kept for the backward pass but the constants."""
    jaxpr = jax.make_jaxpr(lambda x, *constants: fn(x, x, *constants))(x, *constants)
    return frozen_dot_p.bind(x, *constants, fn=fn, jaxpr=jaxpr)


def _evaluate(*operands: Any, fn: Any, jaxpr: Any) -> Any:
    (result,) = jaxpr_as_fun(jaxpr)(*operands)
    return result


def _jvp(primals: Any, tangents: Any, *, fn: Any, jaxpr: Any) -> tuple[Any, Any]:
    x, *constants = primals
    if not all(type(tangent) is ad.Zero for tangent in tangents[1:]):
        # Something trained stands among the constants: a multiplier that waits to be applied.
        rematerialised = jax.checkpoint(lambda x, *constants: fn(x, x, *constants))
        return jax.jvp(rematerialised, primals, tuple(map(_instantiated, primals, tangents)))
    # The result in plain sight of rematerialisation policies.
    return fn(x, x, *constants), frozen_dot(fn, tangents[0], constants)


def _instantiated(primal: Any, tangent: Any) -> Any:
    if type(tangent) is not ad.Zero:
        return tangent
    if jnp.issubdtype(primal.dtype, jnp.inexact):
        return jnp.zeros_like(primal)
    return np.zeros(primal.shape, jax.dtypes.float0)


def _transpose(cotangent: Any, x: Any, *constants: Any, fn: Any, jaxpr: Any) -> list[Any]:
    if type(cotangent) is ad.Zero:
        return [None] * (1 + len(constants))
    aval = x.aval

    def transposed(ready: Any, cotangent: Any, *constants: Any) -> Any:
        (result,) = jax.linear_transpose(lambda x: fn(ready, x, *constants), aval)(cotangent)
        return result

    return [frozen_dot(transposed, cotangent, constants), *[None] * len(constants)]


def _batch(operands: Any, dims: Any, *, fn: Any, jaxpr: Any) -> tuple[Any, int]:
    x, *constants = operands

    def batched(ready: Any, *operands: Any) -> Any:
        return jax.vmap(lambda *operands: fn(ready, *operands), dims)(*operands)

    return frozen_dot(batched, x, constants), 0


frozen_dot_p = Primitive("frozen_dot")
frozen_dot_p.def_impl(_evaluate)
frozen_dot_p.def_abstract_eval(lambda *operands, fn, jaxpr: jaxpr.out_avals[0])
mlir.register_lowering(frozen_dot_p, mlir.lower_fun(_evaluate, multiple_results=False))
ad.primitive_jvps[frozen_dot_p] = _jvp
ad.primitive_transposes[frozen_dot_p] = _transpose
batching.primitive_batchers[frozen_dot_p] = _batch
