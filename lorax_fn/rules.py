"""From a list of rules to the rule of each leaf: the first that matches wins."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from lorax_fn.adapters import Rule
from lorax_fn.errors import TargetError
from lorax_fn.paths import leaves_with_paths
from lorax_fn.targets import Targets, compile_targets, describe, is_names, nearest_paths
from lorax_fn.tracing import is_array

Pytree = Any


def assign_rules(params: Pytree, rules: Rule | Iterable[Rule]) -> dict[str, Rule]:
    """Returns the rule of every targeted array leaf of params, by path.

    Raises:
        TargetError: if something in `rules` is no rule, a rule matches no leaf, or two leaves have
            one path.
    """
    rules = _checked(rules)
    leaves = [(path, leaf) for path, leaf in leaves_with_paths(params) if is_array(leaf)]
    _check_distinct([path for path, _ in leaves])
    predicates = [compile_targets(rule.targets, rule.exclude) for rule in rules]
    hits = {
        path: [i for i, matches in enumerate(predicates) if matches(path, leaf)]
        for path, leaf in leaves
    }
    for i, rule in enumerate(rules):
        matched = [path for path in hits if i in hits[path]]
        if not matched:
            raise no_match(_name(rule), rule.targets, list(hits))
        if all(hits[path][0] != i for path in matched):
            raise _shadowed(rule, matched[0], rules[hits[matched[0]][0]])
        _warn_of_idle_names(rule, leaves)
    return {path: rules[found[0]] for path, found in hits.items() if found}


def _check_distinct(paths: Sequence[str]) -> None:
    """Raises `TargetError` where keys that hold a "/" give two leaves one path."""
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise TargetError(
            f"two leaves of params have the path {twice[0]!r}, so that no rule can tell them "
            "apart; wanted keys without '/', or params that nest in one way."
        )


def _checked(rules: Rule | Iterable[Rule]) -> list[Rule]:
    if isinstance(rules, Rule | str) or not isinstance(rules, Iterable):
        rules = [rules]
    rules = list(rules)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TargetError(
                f"got {rule!r} of type {type(rule).__name__} among the rules; wanted rules such as "
                "lora.LoRA(r'.*/query/kernel', rank=8, alpha=16)."
            )
    if not rules:
        raise TargetError("got no rules; wanted at least one, such as lora.LoRA(['query']).")
    return rules


def _warn_of_idle_names(rule: Rule, leaves: Sequence[tuple[str, Any]]) -> None:
    """Warns of each name among several that selects nothing: a typo, or a name of other models."""
    if not is_names(rule.targets) or len(rule.targets) < 2:
        return
    for name in rule.targets:
        selects = compile_targets([name])
        if not any(selects(path, leaf) for path, leaf in leaves):
            nearest = nearest_paths([name], [path for path, _ in leaves], n=3)
            warnings.warn(
                f"{_name(rule)}: the name {name!r} matches nothing. Nearest paths: "
                f"{', '.join(map(repr, nearest))}.",
                stacklevel=4,
            )


def _shadowed(rule: Rule, path: str, taker: Rule) -> TargetError:
    return TargetError(
        f"{_name(rule)} gets none of the leaves that it matches: rules before it take them all, "
        f"{_name(taker)} takes {path!r}. The first that matches wins: put the special rule first, "
        "or drop this one."
    )


def _name(rule: Rule) -> str:
    what = f"{type(rule).__name__}({describe(rule.targets)})"
    return what if rule.exclude is None else f"{what} without {describe(rule.exclude)}"


def no_match(what: str, targets: Targets, paths: list[str]) -> TargetError:
    """The error that `what` selects none of the leaves at these paths."""
    if not paths:
        return TargetError(f"{what} matches nothing: params hold no arrays.")
    nearest = ", ".join(map(repr, nearest_paths(targets, paths)))
    return TargetError(
        f"{what} matches none of the {len(paths)} leaves. Nearest paths: {nearest}. A regex has to "
        "match the whole path; names match whole components and never biases or norm scales."
    )
