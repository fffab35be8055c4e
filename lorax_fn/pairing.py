"""Factors paired with the leaves of params that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from lorax_fn.adapters import Adapter, is_adapter
from lorax_fn.errors import LoraError, StructureError
from lorax_fn.leaves import structure
from lorax_fn.paths import leaves_with_paths
from lorax_fn.tracing import is_array

Pytree = Any


def pair(params: Pytree, factors: Pytree) -> list[tuple[str, Any, Adapter | None]]:
    """Returns (path, leaf, adapter or None) for every leaf of params, in flatten order.

    Raises:
        StructureError: if the two trees have changed places or differ in structure, or an adapter
            does not fit its leaf.
    """
    if factors is None:
        raise StructureError("factors are None; wanted what lora.init made for params.")
    if any(map(is_adapter, jax.tree.leaves(params, is_leaf=is_adapter))):
        raise StructureError(
            "params hold adapter nodes: were params and factors passed in the wrong order? "
            "Wanted (params, factors, …)."
        )
    leaves = leaves_with_paths(params)
    treedef: Any = structure(params)
    try:
        nodes = treedef.flatten_up_to(factors)
    except (ValueError, TypeError) as e:
        if is_array(factors):
            raise StructureError(
                f"the second argument, the factors, is {_brief(factors)}: were they left out, or "
                "passed last? Wanted (params, factors, …), params as the first argument; and "
                "what takes an apply_fn wants the plain function, not what lora.wrap made of it."
            ) from e
        raise StructureError(
            f"factors are not parallel to params: {_difference(params, factors)}. Wanted what "
            "lora.init made for these params, the first argument of the function."
        ) from e
    pairs = [(path, leaf, node) for (path, leaf), node in zip(leaves, nodes, strict=True)]
    for path, leaf, node in pairs:
        _check(path, leaf, node)
    return pairs


def align(trees: Sequence[Pytree]) -> tuple[Any, list[tuple[str, list[Any]]]]:
    """The nodes of several factors of one base, path by path, and the structure to put them in.

    Raises:
        LoraError: if they are no list of at least one tree.
        StructureError: if the trees differ in more than their nodes, or hold something else.
    """
    if isinstance(trees, dict) or not isinstance(trees, Sequence) or not trees:
        raise LoraError(
            f"got {type(trees).__name__} of {len(trees) if trees else 0}; wanted a list "
            "of factors, at least one."
        )
    treedefs: list[Any] = [jax.tree.structure(tree, is_leaf=_is_place) for tree in trees]
    flat = [dict(leaves_with_paths(tree, is_leaf=_is_place)) for tree in trees]
    for i, (treedef, nodes) in enumerate(zip(treedefs, flat, strict=True)):
        for path in dict.fromkeys([*flat[0], *nodes]):
            ours, theirs = (tree.get(path) for tree in (flat[0], nodes))
            if (path in flat[0]) != (path in nodes) or not (_is_place(ours) and _is_place(theirs)):
                raise StructureError(
                    f"factors 0 have {name_kind(ours)} at {path!r}, factors {i} have "
                    f"{name_kind(theirs)}; wanted factors of the same params."
                )
        if treedef != treedefs[0]:
            raise StructureError(
                f"factors 0 and {i} name the same leaves in containers of other types; wanted "
                "factors of the same params."
            )
    return treedefs[0], [(path, [nodes[path] for nodes in flat]) for path in flat[0]]


def name_kind(node: Any) -> str:
    """The kind of a node of factors, as an error names it."""
    return node.kind if is_adapter(node) else "nothing" if node is None else _brief(node)


def _is_place(node: Any) -> bool:
    return node is None or is_adapter(node)


def _difference(params: Pytree, factors: Pytree) -> str:
    """Where two trees part: a path that one has and the other lacks, or their kinds of node."""
    wanted = {path for path, _ in leaves_with_paths(params)}
    nodes = leaves_with_paths(factors, is_leaf=_is_place)
    for path, node in nodes:
        if path not in wanted:
            return (
                f"factors hold {_brief(node)} at {path!r}, where params have no leaf (if they come "
                "from lora.load: pass it params too, load(path, params))"
            )
    missing = wanted - {path for path, _ in nodes}
    if missing:
        return f"params have a leaf at {min(missing)!r}, which factors lack"
    return f"params are {_brief(params)}, factors {_brief(factors)}, or so within"


def _check(path: str, leaf: Any, node: Any) -> None:
    if node is None:
        return
    if not is_adapter(node):
        raise StructureError(
            f"factors hold {_brief(node)} at {path!r}, where params hold {_brief(leaf)}; wanted an "
            "adapter node or None. Wanted params as the first argument, and what lora.init made "
            "for them as the second."
        )
    if not is_array(leaf):
        raise StructureError(f"factors adapt {path!r}, which is {_brief(leaf)} and no array.")
    node.check(path, leaf)


def _brief(value: Any) -> str:
    if is_array(value):
        return f"an array {value.dtype}{list(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"
