"""An optimisation barrier for one array that steps aside under `vmap`.

XLA rewrites the transpose of a product, (x @ y)ᵀ, as yᵀ @ xᵀ, which may move the larger operand;
a barrier between the two forbids it. In a *batched* product, though, XLA:CPU pushes the layout of
the transposed result back through the barrier into the product, whose emitter then aborts the
process (seen on jax 0.8 and 0.10). A product that gets its batch dim from `vmap` can only be spared
by a barrier that knows of `vmap`: this one.
"""

from __future__ import annotations

from typing import Any

from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def fence(array: Any) -> Any:
    """Returns the array; XLA moves no operation across, unless the array is batched by `vmap`."""
    return fence_p.bind(array)


def _lowered(array: Any) -> Any:
    return lax.optimization_barrier(array)


fence_p = Primitive("fence")
fence_p.def_impl(lambda array: array)
fence_p.def_abstract_eval(lambda aval: aval)
mlir.register_lowering(fence_p, mlir.lower_fun(_lowered, multiple_results=False))
ad.deflinear2(fence_p, lambda cotangent, _: [cotangent])
batching.primitive_batchers[fence_p] = lambda arrays, dims: (arrays[0], dims[0])
