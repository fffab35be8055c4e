"""Batches shown to a function, so that factors start from what their weights see of the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorax_fn.adapters import LoRA, Rule
from lorax_fn.adapters.probes import Probe
from lorax_fn.axes import Axes
from lorax_fn.errors import LoraError
from lorax_fn.evaluate import evaluate
from lorax_fn.keys import fold_path
from lorax_fn.leaves import as_array
from lorax_fn.paths import leaves_with_paths, map_with_paths
from lorax_fn.tracing import check_function, is_array

Pytree = Any
Probes = dict[str, Probe]


def calibrate(
    key: jax.Array,
    apply_fn: Callable[..., Any],
    params: Pytree,
    rules: Mapping[str, Rule],
    batches: Iterable[Any],
    axes: Mapping[str, Axes],
    *,
    progress: bool,
) -> dict[str, Rule]:
    """Returns the rules of all leaves, by path, with what the batches say in place of their `init`.

    Costs at most six passes over the batches, each a forward and a backward pass of which no more
    is computed than the probes need.

    Raises:
        LoraError: if there are no batches or no rule that looks at them, params are abstract, the
            function returns nothing that can be differentiated, or a weight sees no data.
    """
    check_function(apply_fn)
    leaves = {path: as_array(leaf) for path, leaf in leaves_with_paths(params) if path in rules}
    probes: Probes = {}
    for path, rule in rules.items():
        own_key, leaf = fold_path(key, path), leaves[path]
        if isinstance(rule, LoRA) and (probe := rule.probe(own_key, path, leaf, axes.get(path))):
            probes[path] = probe
    if not probes:
        raise LoraError(
            "got batches, and no rule looks at data; wanted a rule such as "
            "lora.LoRA(targets, init='eva'), or no batches."
        )
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        raise LoraError(
            "params are abstract, and init from data has to compute; wanted arrays, or all of "
            "lora.init under jax.eval_shape."
        )
    probes = _show(apply_fn, params, probes, batches, progress)
    return dict(rules) | {
        path: _started(rules[path], probe, leaves[path]) for path, probe in probes.items()
    }


def _started(rule: Any, probe: Probe, leaf: Any) -> Rule:
    with jax.default_matmul_precision("highest"):
        return dataclasses.replace(rule, init=probe.start(leaf, rule.rank, rule.scale))


def _show(
    apply_fn: Callable[..., Any],
    params: Pytree,
    probes: Probes,
    batches: Iterable[Any],
    progress: bool,
) -> Probes:
    """The probes after as many passes over the batches as they ask for."""
    from tqdm import tqdm  # not at import: nothing else needs it

    if hasattr(batches, "ndim"):
        raise LoraError(
            "batches are one array, whose rows would be shown one by one; wanted a list of them, "
            "such as batches=[x]."
        )
    batches = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    if not batches:
        raise LoraError("batches are empty; wanted at least one tuple of apply_fn's arguments.")
    gradient = _gradient_fn(apply_fn, any(probe.needs_loss for probe in probes.values()))
    passes = max(probe.passes for probe in probes.values())
    with tqdm(total=passes * len(batches), desc="init", unit="batch", disable=not progress) as bar:
        for index in range(passes):
            active = {path: probe for path, probe in probes.items() if index < probe.passes}
            total = gradient(active, params, batches[0])
            bar.update()
            for batch in batches[1:]:
                total = jax.tree.map(jnp.add, total, gradient(active, params, batch))
                bar.update()
            _check_seen(total)
            with jax.default_matmul_precision("highest"):
                probes |= {path: p.next(total[path], index) for path, p in active.items()}
    return probes


def _gradient_fn(apply_fn: Callable[..., Any], needs_loss: bool) -> Callable[..., Probes]:
    """(probes, params, batch) -> the gradient with respect to the probes, compiled once a shape."""

    def scalar(probes: Probes, params: Pytree, batch: tuple[Any, ...]) -> jax.Array:
        factors = map_with_paths(lambda path, _: probes.get(path), params)
        result = evaluate(apply_fn, params, factors, batch, {}, key=None, on_event=lambda _: None)
        return _loss(result) if needs_loss else _sum(result)

    def flat(probes: Probes, arrays: list[Any], treedef: Any, static: tuple[Any, ...]) -> Probes:
        leaves = [array if kind is None else value
                  for array, (kind, value) in zip(arrays, static, strict=True)]  # fmt: skip
        params, batch = jax.tree.unflatten(treedef, leaves)
        return jax.grad(scalar)(probes, params, batch)

    compiled = jax.jit(flat, static_argnums=(2, 3))

    def gradient(probes: Probes, params: Pytree, batch: tuple[Any, ...]) -> Probes:
        leaves, treedef = jax.tree.flatten((params, batch))
        arrays = [leaf if is_array(leaf) else None for leaf in leaves]
        # With their types: to a cache 1, 1.0 and True are the same.
        static = tuple((None, None) if is_array(leaf) else (type(leaf), leaf) for leaf in leaves)
        try:
            return compiled(probes, arrays, treedef, static)
        except TypeError as e:
            kinds = ", ".join(type(argument).__name__ for argument in batch)
            e.add_note(
                f"apply_fn was called with params and a batch of {len(batch)}: {kinds}. A tuple is "
                "spread over apply_fn's arguments, anything else is one argument."
            )
            raise

    return gradient


def _loss(result: Any) -> jax.Array:
    if is_array(result) and result.shape == () and jnp.issubdtype(result.dtype, jnp.floating):
        return result
    got = jax.tree.map(jnp.shape, result)
    raise LoraError(
        f"apply_fn returns {str(got)[:200]} (shapes); init='lora_ga' follows the gradient of a "
        "loss: wanted a function (params, *batch) -> one floating scalar."
    )


def _sum(result: Any) -> jax.Array:
    """Some scalar that depends on everything: only the probes' own cotangents are looked at."""
    floating = [x for x in jax.tree.leaves(result) if is_array(x)]
    floating = [x for x in floating if jnp.issubdtype(x.dtype, jnp.floating)]
    if not floating:
        raise LoraError(
            "apply_fn returns no floating array, so that its weights cannot be looked at; wanted "
            "the loss or the logits."
        )
    return sum((jnp.sum(x.astype(jnp.float32)) for x in floating), jnp.zeros(()))


def _check_seen(gradients: Probes) -> None:
    """Raises `LoraError` where a weight has seen nothing, or something that is not finite."""
    for path, gradient in gradients.items():
        arrays = jax.tree.leaves(gradient)
        if any(isinstance(array, jax.core.Tracer) for array in arrays):
            continue  # under jit there are no values to look at
        if not all(bool(jnp.isfinite(array).all()) for array in arrays):
            raise LoraError(
                f"what {path!r} sees of the batches is not finite. Look at the batches, and at the "
                "dtype in which apply_fn computes."
            )
        if not any(bool(array.any()) for array in arrays):
            raise LoraError(
                f"{path!r} sees nothing of the batches: the result does not depend on it, it is "
                "added up (lora.inspect tells), or it is looked up and not multiplied with data. "
                "Exclude it, or choose another init for it."
            )
