"""The shape of a tree of factors as plain data: which dicts, lists and tuples hold which nodes.

An outline is `None`, `{"node": path}`, `{"dict": [[key, outline], …]}`, `{"list": [outline, …]}` or
`{"tuple": […]}`. A container of any other class (an `nnx.State`, an Equinox module) cannot be built
without the model: it is outlined as a dict of its entries' names.
"""

from __future__ import annotations

from typing import Any

import jax

from lorax_fn.adapters import is_adapter
from lorax_fn.errors import AdapterFileError, StructureError
from lorax_fn.paths import box_key_paths, path_str

DEEPEST = 64
"""How deep a tree may be nested; a file that goes deeper is refused."""


def outline(factors: Any, prefix: tuple[str, ...] = ()) -> Any:
    """The outline of factors; nodes stand by their paths.

    Raises:
        StructureError: if a leaf is neither an adapter nor None, or the tree is too deep.
    """
    if factors is None:
        return None
    if is_adapter(factors):
        return {"node": "/".join(prefix)}
    if len(prefix) > DEEPEST:
        raise StructureError(f"factors are nested deeper than {DEEPEST} levels.")
    keyed, _ = jax.tree_util.tree_flatten_with_path(
        factors, is_leaf=lambda child: child is not factors
    )
    if len(keyed) == 1 and not keyed[0][0]:
        raise StructureError(
            f"factors hold a {type(factors).__name__} at {'/'.join(prefix)!r}; wanted what "
            "lora.init made: adapter nodes and None."
        )
    if () in box_key_paths(factors):  # its one entry is no part of a path
        return outline(keyed[0][1], prefix)
    children = [
        (key_path[0], outline(child, (*prefix, path_str(key_path)))) for key_path, child in keyed
    ]
    if type(factors) in (list, tuple):
        return {type(factors).__name__: [child for _, child in children]}
    return {"dict": [[_key(entry), child] for entry, child in children]}


def fill(outlined: Any, nodes: dict[str, Any], depth: int = 0) -> Any:
    """The tree of an outline, with each node in its place; takes them out of `nodes`.

    Raises:
        AdapterFileError: if the outline is none, or names a node that is not there.
    """
    if outlined is None:
        return None
    if depth > DEEPEST or not isinstance(outlined, dict) or len(outlined) != 1:
        raise AdapterFileError(f"the outline of the tree is damaged at {str(outlined)[:80]}.")
    [(kind, content)] = outlined.items()
    if kind == "node" and isinstance(content, str):
        if content not in nodes:
            raise AdapterFileError(f"the tree names a node {content!r} that is missing, or twice.")
        return nodes.pop(content)
    if not isinstance(content, list) or kind not in ("dict", "list", "tuple"):
        raise AdapterFileError(f"the outline of the tree is damaged at {str(outlined)[:80]}.")
    if kind != "dict":
        children = [fill(child, nodes, depth + 1) for child in content]
        return children if kind == "list" else tuple(children)
    pairs = all(isinstance(pair, list) and len(pair) == 2 for pair in content)
    kinds = {type(pair[0]) for pair in content} if pairs else set()
    if not pairs or not (kinds <= {str} or kinds <= {int}):  # JAX sorts keys, so they are of a kind
        raise AdapterFileError(f"the outline of the tree is damaged at {str(outlined)[:80]}.")
    filled = {key: fill(child, nodes, depth + 1) for key, child in content}
    if len(filled) != len(content):
        raise AdapterFileError(f"the outline of the tree names a key twice: {str(outlined)[:80]}.")
    return filled


def _key(entry: Any) -> str | int:
    key = getattr(entry, "key", None)
    return key if isinstance(key, str | int) and type(key) in (str, int) else path_str((entry,))
