"""Names of the leaves of a pytree: key paths as "/"-joined strings.

Every place that names a leaf (rules, errors, reports, files) takes the name from here. An NNX
variable and a Linen box of sharding metadata (`nn.Partitioned`) keep their array in an attribute
`value`, which is no part of the name: the kernel of `model.attn.query` is "attn/query/kernel" in
all of them. Only the tree tells such an attribute from a field that a module happens to call
`value`, so prefer `leaves_with_paths` and `map_with_paths` to `path_str` on a bare key path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from lorax_fn.leaves import is_quantized

Pytree = Any


def path_str(key_path: Sequence[Any]) -> str:
    """Joins the entries of a key path with "/".

    >>> path_str((DictKey("params"), SequenceKey(0), GetAttrKey("kernel")))
    'params/0/kernel'
    """
    return "/".join(_entry_str(entry) for entry in key_path)


def leaves_with_paths(
    tree: Pytree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """Returns (path, leaf) for each leaf, in flatten order.

    `None` is an empty subtree and has no entry, unless `is_leaf` says that it is a leaf. A tree
    that is itself a leaf has the path "". A quantised array is one leaf.

    >>> leaves_with_paths({"b": [1, None], "a": 2})
    [('a', 2), ('b/0', 1)]
    >>> leaves_with_paths({"b": [1, None]}, is_leaf=lambda x: x is None)
    [('b/0', 1), ('b/1', None)]
    """
    paths, leaves, _ = _flatten(tree, is_leaf)
    return list(zip(paths, leaves, strict=True))


def map_with_paths(
    fn: Callable[[str, Any], Any], tree: Pytree, is_leaf: Callable[[Any], bool] | None = None
) -> Pytree:
    """Returns the tree of `fn(path, leaf)`, with leaves and paths as in `leaves_with_paths`.

    >>> map_with_paths(lambda path, leaf: f"{path}={leaf}", {"a": {"b": 1}})
    {'a': {'b': 'a/b=1'}}
    """
    paths, leaves, treedef = _flatten(tree, is_leaf)
    return jax.tree.unflatten(treedef, map(fn, paths, leaves))


def _flatten(
    tree: Pytree, is_leaf: Callable[[Any], bool] | None
) -> tuple[list[str], list[Any], Any]:
    def whole(node: Any) -> bool:
        return is_quantized(node) or (is_leaf is not None and is_leaf(node))

    keyed, treedef = jax.tree_util.tree_flatten_with_path(tree, whole)
    inside_box = box_key_paths(tree) if any(map(_ends_in_value, (k for k, _ in keyed))) else {}
    paths = [path_str(k[:-1] if k and k[:-1] in inside_box else k) for k, _ in keyed]
    return paths, [leaf for _, leaf in keyed], treedef


def _ends_in_value(key_path: Sequence[Any]) -> bool:
    return bool(key_path) and key_path[-1] in (GetAttrKey("value"), GetAttrKey("raw_value"))


def box_key_paths(tree: Pytree) -> dict[tuple[Any, ...], Any]:
    """The NNX variables and Linen boxes of a tree, by their key paths."""
    keyed, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_box)
    return {key_path: node for key_path, node in keyed if _is_box(node)}


def _is_box(node: Any) -> bool:
    """Whether `node` is an NNX variable or Linen's metadata around an array; imports neither."""
    return any(
        (cls.__module__.split(".")[:2], cls.__name__) in _BOXES for cls in type(node).__mro__
    )


_BOXES = (
    (["flax", "nnx"], "Variable"),
    (["flax", "nnx"], "VariableState"),  # before Flax 0.12
    (["flax", "core"], "AxisMetadata"),
)


def _entry_str(entry: Any) -> str:
    match entry:
        case DictKey(key=key) | FlattenedIndexKey(key=key):
            return str(key)
        case SequenceKey(idx=index):
            return str(index)
        case GetAttrKey(name=name):
            return name
        case _:  # a pytree class of the user's with key entries of its own
            return str(entry)
