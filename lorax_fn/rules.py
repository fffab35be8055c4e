"""From a list of rules to the rule of each leaf: the first that matches wins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lorax_fn.adapters import Rule
from lorax_fn.errors import TargetError
from lorax_fn.paths import leaves_with_paths
from lorax_fn.targets import compile_targets, describe, nearest_paths
from lorax_fn.tracing import is_array

Pytree = Any


def assign_rules(params: Pytree, rules: Rule | Iterable[Rule]) -> dict[str, Rule]:
    """Returns the rule of every targeted array leaf of params, by path.

    Raises:
        TargetError: if something in `rules` is no rule, or a rule matches no leaf.
    """
    rules = _checked(rules)
    leaves = [(path, leaf) for path, leaf in leaves_with_paths(params) if is_array(leaf)]
    predicates = [compile_targets(rule.targets, rule.exclude) for rule in rules]
    matched: set[int] = set()
    assigned: dict[str, Rule] = {}
    for path, leaf in leaves:
        hits = [i for i, matches in enumerate(predicates) if matches(path, leaf)]
        matched.update(hits)
        if hits:
            assigned[path] = rules[hits[0]]
    for i, rule in enumerate(rules):
        if i not in matched:
            raise _no_match(rule, [path for path, _ in leaves])
    return assigned


def _checked(rules: Rule | Iterable[Rule]) -> list[Rule]:
    rules = [rules] if isinstance(rules, Rule | str) else list(rules)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TargetError(
                f"got {rule!r} of type {type(rule).__name__} among the rules; wanted rules such as "
                "lora.LoRA(r'.*/query/kernel', rank=8, alpha=16)."
            )
    if not rules:
        raise TargetError("got no rules; wanted at least one, such as lora.LoRA(['query']).")
    return rules


def _no_match(rule: Rule, paths: list[str]) -> TargetError:
    name = type(rule).__name__
    what = f"{name}({describe(rule.targets)})"
    if rule.exclude is not None:
        what += f" without {describe(rule.exclude)}"
    if not paths:
        return TargetError(f"{what} matches nothing: params hold no arrays.")
    nearest = ", ".join(map(repr, nearest_paths(rule.targets, paths)))
    return TargetError(
        f"{what} matches none of the {len(paths)} leaves. Nearest paths: {nearest}. A regex has to "
        "match the whole path; names match whole components and never biases or norm scales."
    )
