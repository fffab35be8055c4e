"""`init`: the parallel pytree of adapter nodes that rules make of params."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from lorax_fn.adapters import Rule
from lorax_fn.axes import Axes
from lorax_fn.calibrate import calibrate
from lorax_fn.errors import LoraError, StructureError
from lorax_fn.keys import check_key, fold_path
from lorax_fn.leaves import as_array, structure
from lorax_fn.paths import leaves_with_paths, map_with_paths
from lorax_fn.rules import assign_rules
from lorax_fn.sharding import leaf_shardings, node_shardings, place

Pytree = Any


def init(
    key: jax.Array,
    params: Pytree,
    rules: Rule | Iterable[Rule],
    *,
    axes: Pytree | None = None,
    apply_fn: Callable[..., Any] | None = None,
    batches: Iterable[Any] | None = None,
    progress: bool = True,
) -> Pytree:
    """Makes the factors: a pytree like params with an adapter node at each targeted leaf.

    Each node's key is folded from the leaf's path, so a further rule or leaf changes no other
    leaf's draw. Works under `jax.jit` and, on `jax.ShapeDtypeStruct`s, under `jax.eval_shape`.

    Args:
        key: a PRNG key, `jax.random.key(seed)`.
        params: the pytree that the function takes first; arrays or `ShapeDtypeStruct`s, or what
            `quantize` made of them.
        rules: the first that matches a leaf wins.
        axes: what `infer_axes` returned for params. Without it a leaf of two dims is
            (contract, out), and any other needs its rule's own `axes`.
        apply_fn: for rules whose `init` looks at data ("eva", "corda", "corda_kpm", "lora_ga"): the
            function that sees it. For "lora_ga" it returns the loss, a scalar.
        batches: what it is called with, `apply_fn(params, *batch)` for each; a batch that is no
            tuple is one argument. They are gone through at most six times.
        progress: whether to show a progress bar while it is.

    Returns:
        A pytree of the structure of params: an adapter node (for `LoRA`: a (batch dims, contract
        dims, r), b (batch dims, r, out dims)) at each targeted leaf, `None` at every other. On a
        mesh the factors of a weight lie as it does: see `shardings`.

    Raises:
        TargetError: if a rule matches no leaf, or one that its kind cannot adapt.
        AxesError: if the axes of a targeted leaf are unknown or do not fit.
        StructureError: if axes are not parallel to params.
        LoraError: if the rank is above what a weight or an `init` can have, key is no PRNG key, or
            a rule looks at data and there is none, or none that reaches its weights.

    >>> import jax, jax.numpy as jnp, lorax_fn as lora
    >>> params = {"query": {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)}}
    >>> factors = lora.init(jax.random.key(0), params, [lora.LoRA(["query"], rank=4, alpha=8)])
    >>> factors["query"]["kernel"].a.shape, factors["query"]["kernel"].b.shape
    ((64, 4), (4, 32))
    >>> factors["query"]["bias"] is None
    True
    """
    key = check_key(key, "key")
    assigned = assign_rules(params, rules)
    axes_of = axes_by_path(params, axes)
    if apply_fn is not None or batches is not None:
        if apply_fn is None or batches is None:
            missing = "apply_fn" if apply_fn is None else "batches"
            raise LoraError(
                f"{missing} is missing; wanted both apply_fn= and batches=, or neither."
            )
        assigned = calibrate(key, apply_fn, params, assigned, batches, axes_of, progress=progress)
    return init_assigned(key, params, assigned, axes_of)


def init_assigned(
    key: jax.Array, params: Pytree, assigned: Mapping[str, Rule], axes_of: Mapping[str, Axes]
) -> Pytree:
    """What the rules of all leaves, by path, make of params."""
    paths = [path for path, _ in leaves_with_paths(params)]
    shardings = dict(zip(paths, leaf_shardings(params), strict=True))

    def make(path: str, leaf: Any) -> Any:
        rule = assigned.get(path)
        if rule is None:
            return None
        node = rule.make(fold_path(key, path), path, as_array(leaf), axes_of.get(path))
        return node and place(node, node_shardings(path, node, shardings[path]))

    return map_with_paths(make, params)


def axes_by_path(params: Pytree, axes: Pytree | None) -> dict[str, Axes]:
    """The axes that are known, by the leaf's path.

    Raises:
        StructureError: if axes are not parallel to params, or hold anything else.
    """
    if axes is None:
        return {}
    treedef: Any = structure(params)
    try:
        flat = treedef.flatten_up_to(axes)
    except (ValueError, TypeError) as e:
        raise StructureError(
            f"axes are not parallel to params: {e}. Wanted what "
            "lora.infer_axes(apply_fn, params, *args) returns for these params."
        ) from e
    by_path = {path: a for (path, _), a in zip(leaves_with_paths(params), flat, strict=True)}
    for path, entry in by_path.items():
        if not isinstance(entry, Axes | None):
            raise StructureError(
                f"axes hold {entry!r} at {path!r}; wanted lora.Axes or None at every leaf."
            )
    return {path: entry for path, entry in by_path.items() if entry is not None}
