"""LoftQ: a quantised base and factors that start where it is wrong (arXiv:2310.08659)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from lorax_fn.adapters import LoRA, LoRAFactors, Rule
from lorax_fn.adapters.low_rank import check_count
from lorax_fn.adapters.matrices import as_factors, as_matrices
from lorax_fn.adapters.probes import Start
from lorax_fn.axes import Axes
from lorax_fn.errors import LoraError
from lorax_fn.init import axes_by_path, init_assigned
from lorax_fn.interpreter import dequantize
from lorax_fn.keys import check_key
from lorax_fn.paths import leaves_with_paths, map_with_paths
from lorax_fn.quantize import check_block, check_type, quantized
from lorax_fn.rules import assign_rules

Pytree = Any


def loftq(
    key: jax.Array,
    params: Pytree,
    rules: Rule | Iterable[Rule],
    *,
    axes: Pytree | None = None,
    dtype: Any = "nf4",
    block: int = 64,
    steps: int = 1,
) -> tuple[Pytree, Pytree]:
    """Quantises weights and starts their factors at what quantising takes away from them.

    For each weight of a rule with `init="loftq"`, and with A·B zero at first, each step quantises
    what the factors leave and takes the factors from what quantising leaves (Algorithm 1 of Li et
    al. 2023, arXiv:2310.08659):

        Q = quantize(W - s·A·B)        s·A·B = the best approximation of rank r to W - Q

    so that the adapted model starts nearer to the floating one than the quantised base alone. Other
    rules make what they make in `init`, of the quantised base; weights without such a rule are
    quantised by `quantize`, before or after. DoRA's magnitudes start at the norms of Q + s·A·B.

    Args:
        key: a PRNG key.
        params: the floating params; not changed.
        rules: as `init` takes them, at least one with `init="loftq"`.
        axes: as `init` takes them.
        dtype: as `quantize` takes it.
        block: as `quantize` takes it.
        steps: how often Q and A·B are found in turn. Each costs one singular value decomposition of
            every weight.

    Returns:
        (base, factors), of the structure of params, for `wrap`, `merge` and `inspect`.

    Raises:
        TargetError, AxesError, StructureError: as `init` and `quantize`.
        LoraError: if no rule has `init="loftq"`, steps is below 1; and as `init` and `quantize`.

    >>> import jax, lorax_fn as lora
    >>> params = {"w": jax.random.normal(jax.random.key(0), (128, 64))}
    >>> rules = [lora.LoRA("w", rank=8, alpha=16, init="loftq")]
    >>> base, factors = lora.loftq(jax.random.key(1), params, rules, dtype="nf4", block=64)
    >>> distance = lambda w: float(jax.numpy.linalg.norm(params["w"] - w["w"]))
    >>> nothing = {"w": None}
    >>> distance(lora.merge(base, factors)) < distance(lora.merge(base, nothing))
    True
    """
    key = check_key(key, "key")
    type_name = check_type(dtype)
    check_block(block)
    check_count("steps", steps)
    if steps < 1:
        raise LoraError(f"steps={steps} is below 1; wanted at least 1.")
    assigned = assign_rules(params, rules)
    starting = {path: rule for path, rule in assigned.items()
                if isinstance(rule, LoRA) and rule.init == "loftq"}  # fmt: skip
    if not starting:
        raise LoraError(
            "no rule has init='loftq', so there is nothing to quantise; wanted one such as "
            "lora.LoRA(targets, init='loftq'), or lora.quantize and lora.init."
        )
    axes_of = axes_by_path(params, axes)
    leaves = dict(leaves_with_paths(params))
    found = {}
    for path, rule in starting.items():
        leaf = leaves[path]
        own_axes = rule.roles(path, leaf, axes_of.get(path))
        options: dict[str, Any] = {"scale": rule.scale, "axes": own_axes}
        found[path] = quantized(path, leaf, type_name, block)
        start = _factors_of_rest(leaf, found[path], rank=rule.rank, **options)
        for _ in range(1, steps):
            rest = _rest_of_factors(leaf, start, **options)
            found[path] = quantized(path, rest, type_name, block)
            start = _factors_of_rest(leaf, found[path], rank=rule.rank, **options)
        assigned[path] = dataclasses.replace(rule, init=start)
    base = map_with_paths(found.get, params)
    return base, init_assigned(key, base, assigned, axes_of)


@functools.partial(jax.jit, static_argnames=("rank", "scale", "axes"))
def _factors_of_rest(leaf: Any, base: Any, *, rank: int, scale: float, axes: Axes) -> Start:
    """s·A·B, the best approximation of rank r to W - Q, in float32."""
    rest = as_matrices(jnp.asarray(leaf), axes) - as_matrices(dequantize(base), axes)
    with jax.default_matmul_precision("highest"):
        u, s, vt = jnp.linalg.svd(rest, full_matrices=False)  # (batch, in, k), (batch, k), …
    root = jnp.sqrt(s[:, :rank] / scale)  # so that scale·a·b is what was found
    a, b = u[..., :rank] * root[:, None], root[..., None] * vt[:, :rank]
    return Start(*as_factors(a, b, leaf.shape, axes), taken_off=False)


@functools.partial(jax.jit, static_argnames=("scale", "axes"))
def _rest_of_factors(leaf: Any, start: Start, *, scale: float, axes: Axes) -> jax.Array:
    """W - s·A·B."""
    return LoRAFactors(start.a, start.b, scale, axes, 0.0).remove(jnp.asarray(leaf), "")
