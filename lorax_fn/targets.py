"""Path predicates: from a rule's `targets` to a function that says which leaves are meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from lorax_fn.errors import TargetError

Predicate = Callable[[str, Any], bool]
Targets = str | re.Pattern[str] | Collection[str] | Predicate

_KINDS = (
    "a regex over the whole path (r'.*/query/kernel'), names (['query', 'value']) "
    "or a function (path, leaf) -> bool"
)
# Leaves that are added or multiplied on, in the naming of Flax, Haiku, Equinox and Hugging Face.
# Their dims do not tell: in a stack of layers a bias has two.
_VECTOR = re.compile(r"(.*_)?bias|b|scale|offset|beta|gamma|mean|var", re.IGNORECASE)
_NORM = re.compile(r"(.*norm|ln)[_\d]*", re.IGNORECASE)


def compile_targets(targets: Targets, exclude: Targets | None = None) -> Predicate:
    """Returns the predicate (path, leaf) -> bool of leaves in `targets` and not in `exclude`.

    Both take
      - a regex, matched against the whole path by `re.fullmatch`;
      - a collection of names, each one or more whole path components that stand next to each other
        anywhere in the path: "query" and "attn/query" both name "layer_0/attn/query/kernel". As
        targets, names pick matrices only: leaves with at least two dims and a floating or complex
        dtype that are no bias and no norm's scale;
      - a function (path, leaf) -> bool, used as it is.

    Raises:
        TargetError: for any other kind, an invalid regex, no name at all or an empty name.

    >>> import jax
    >>> picks = compile_targets(["query", "value"], exclude=r"layer_0/.*")
    >>> matrix = jax.ShapeDtypeStruct((4, 4), "float32")
    >>> picks("layer_1/query/kernel", matrix), picks("layer_0/query/kernel", matrix)
    (True, False)
    """
    included = _predicate(targets, "targets")
    if is_names(targets):
        included = _both(included, _is_matrix)
    if exclude is None or (is_names(exclude) and not exclude):
        return included
    excluded = _predicate(exclude, "exclude")
    return _both(included, lambda path, leaf: not excluded(path, leaf))


def describe(targets: Targets) -> str:
    """Names `targets` in a message.

    >>> describe(["query", "value"]), describe(r".*/kernel")
    ("the names 'query', 'value'", "the regex '.*/kernel'")
    """
    if isinstance(targets, str | re.Pattern):
        return f"the regex {_pattern(targets)!r}"
    if is_names(targets):
        return f"the name{'s' * (len(targets) > 1)} {', '.join(map(repr, targets))}"
    if callable(targets):
        return f"the function {getattr(targets, '__qualname__', repr(targets))}"
    return repr(targets)


def nearest_paths(query: Targets, paths: Iterable[str], n: int = 5) -> list[str]:
    """Returns the `n` paths that `query` comes closest to, best first, for an error message.

    Compares the words of the regex or of each name with the components of each path; for a
    function, which says nothing of names, the first `n` paths. Paths that resemble the query as
    much as each other keep their order.

    >>> nearest_paths(r".*/querry/kernel", ["a/key/kernel", "a/query/bias", "a/query/kernel"], n=2)
    ['a/query/kernel', 'a/key/kernel']
    """
    paths = list(paths)
    if isinstance(query, str | re.Pattern):
        queries = [_words(_pattern(query))]
    elif is_names(query):
        queries = [name.split("/") for name in query if isinstance(name, str)]
    else:
        return paths[:n]
    likeness: dict[tuple[str, str], float] = {}

    def compare(word: str, component: str) -> float:
        if (word, component) not in likeness:
            ratio = difflib.SequenceMatcher(None, word.lower(), component.lower()).ratio()
            likeness[word, component] = ratio
        return likeness[word, component]

    def score(path: str) -> float:
        components = path.split("/")
        return max(
            (
                sum(max(compare(w, c) for c in components) for w in words) / len(words)
                for words in queries
                if words
            ),
            default=0.0,
        )

    return sorted(paths, key=score, reverse=True)[:n]


def _predicate(targets: Any, what: str) -> Predicate:
    if isinstance(targets, str | re.Pattern):
        if not isinstance(_pattern(targets), str):
            raise TargetError(f"{what} is a regex over bytes, {targets!r}; wanted one over str.")
        try:
            regex = re.compile(targets)
        except re.error as e:
            raise TargetError(
                f"{what}={targets!r} is not a valid regex: {e}. Wanted {_KINDS}. "
                f"To take the text literally, pass names: {what}=[...]."
            ) from e
        return lambda path, leaf: regex.fullmatch(path) is not None
    if is_names(targets):
        names = [_components(name, targets, what) for name in targets]
        if not names:
            raise TargetError(f"{what}={targets!r} has no names. Wanted {_KINDS}.")
        return lambda path, leaf: any(_consecutive(name, path.split("/")) for name in names)
    if callable(targets):
        return lambda path, leaf: bool(targets(path, leaf))
    raise TargetError(f"{what}={targets!r} is of type {type(targets).__name__}. Wanted {_KINDS}.")


def _pattern(targets: str | re.Pattern[str]) -> str:
    return targets if isinstance(targets, str) else targets.pattern


def is_names(targets: Any) -> TypeGuard[Collection[str]]:
    """Whether targets are names, and no regex or function."""
    return isinstance(targets, list | tuple | set | frozenset)


def _components(name: Any, names: Any, what: str) -> list[str]:
    if not isinstance(name, str) or not name.strip("/"):
        raise TargetError(
            f"{what}={names!r} holds {name!r}. Wanted names, each one or more whole path "
            "components, such as 'query' or 'attn/query'."
        )
    return name.strip("/").split("/")


def _consecutive(name: list[str], components: list[str]) -> bool:
    n = len(name)
    return any(components[i : i + n] == name for i in range(len(components) - n + 1))


def _is_matrix(path: str, leaf: Any) -> bool:
    *parents, own = path.split("/")
    if _VECTOR.fullmatch(own) or (parents and _NORM.fullmatch(parents[-1])):
        return False
    shape, dtype = getattr(leaf, "shape", ()), getattr(leaf, "dtype", None)
    return len(shape) >= 2 and jax.dtypes.issubdtype(dtype, jnp.inexact)


def _both(first: Predicate, second: Predicate) -> Predicate:
    return lambda path, leaf: first(path, leaf) and second(path, leaf)


def _words(regex: str) -> list[str]:
    """The literal words of a regex: without character classes, quantifiers and escapes."""
    literal = re.sub(r"\\[a-zA-Z]|\[[^]]*\]|\{[\d,]*\}|\(\?[a-zA-Z]+\)", " ", regex)
    return re.findall(r"\w{2,}", literal)
