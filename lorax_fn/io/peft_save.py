"""`save_peft`: factors as a folder that Hugging Face PEFT loads."""

from __future__ import annotations

import collections
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from lorax_fn.adapters import Adapter, DoRAFactors, FullDelta, LoRAFactors
from lorax_fn.axes import Axes
from lorax_fn.errors import LoraError
from lorax_fn.io.layouts import (
    MAGNITUDE,
    magnitude_to_torch,
    tensor_names,
    to_peft,
    weight_to_torch,
)
from lorax_fn.io.names import Names, Slot, check_positions, slots_of
from lorax_fn.io.peft_config import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    PeftConfig,
    is_saved,
    most_common,
    pattern_of,
    write_config,
)
from lorax_fn.io.tensors import floating, host_array, replacing, sync, write_tensors
from lorax_fn.pairing import pair

Pytree = Any


def save_peft(
    folder: str | os.PathLike[str],
    params: Pytree,
    factors: Pytree,
    *,
    names: Names = None,
    axes: Pytree | None = None,
    base_model: str | None = None,
) -> None:
    r"""Writes factors as an adapter of the PyTorch model, for PEFT and all that read its folders.

    LoRA (with rsLoRA, LoRA-FA, starts of its own, ranks and scales that differ), DoRA, and what
    `Full` trains (PEFT's `modules_to_save`, and the biases of adapted modules) have a form there.
    Factors with a start (PiSSA, OLoRA, …) become plain LoRA of twice the rank. A stack of layers is
    split into its modules; a stack of experts becomes the LoRA of one parameter, or of each
    expert's module, as the names say. The largest of the dropouts is written, or none with
    expert-stacked parameters, of which PEFT drops nothing.

    A weight that the JAX model ties (embedding and output head) is adapted in both uses; PEFT
    adapts the module that the name gives, and not the one tied to it.

    Args:
        folder: is made if need be; gets `adapter_model.safetensors` and `adapter_config.json`.
        params: the base. Its values are read only where a module is saved whole.
        factors: what `init` made for params, trained or not.
        names: how leaves are called in the PyTorch model: "flax" (the default), "gpt2", "tunix",
            "torch", "maxtext" (Qwen), "maxtext_llama", "maxtext_mixtral", "maxtext_gemma2" or
            "maxtext_gemma3" (see `lorax_fn.io.ready_names`); a table from regexes of paths to
            names, {r"blocks/(\d+)/up/w": r"model.layers.\1.mlp.up_proj.weight"}; or a function
            (path, leaf) -> name. In place of a name stands a `lorax_fn.io.Place` where the layout
            is no Linear's.
        axes: what `infer_axes` returned for params; needed for what is saved whole, as it is for
            `load_peft`. Factors know theirs.
        base_model: the name or folder of the PyTorch model, for the config.

    Raises:
        AxesError: if the axes of a weight that is saved whole are unknown.
        LoraError: if a node has no form in PEFT, a leaf no name, or an array is not finite.
        StructureError: if factors do not belong to params.

    >>> import tempfile, jax, jax.numpy as jnp, lorax_fn as lora
    >>> params = {"model": {"up_proj": {"kernel": jnp.ones((4, 3))}}}
    >>> rules = [lora.LoRA(["up_proj"], rank=2, alpha=4)]
    >>> factors = lora.init(jax.random.key(0), params, rules)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora.save_peft(folder, params, factors)
    ...     loaded = lora.load_peft(folder, params)
    >>> loaded["model"]["up_proj"]["kernel"].a.shape
    (4, 2)
    """
    nodes = {path: node for path, _, node in pair(params, factors) if node is not None}
    given = {path: getattr(node, "axes", None) for path, node in nodes.items()}
    slots = slots_of(params, names, axes, given)
    writer = _Writer(slots, nodes)
    tensors, config = writer.written()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The weights are named first (the inner context), and no config stands beside them until both
    # are the new ones: a folder that a crash leaves between is refused, for it has none.
    with replacing(folder / CONFIG) as described, replacing(folder / WEIGHTS) as weights:
        write_tensors(weights, tensors, {"format": "pt"})
        write_config(described, config, base_model)
        for file in (weights, described):
            sync(file)
        (folder / CONFIG).resolve().unlink(missing_ok=True)


class _Writer:
    """Gathers the tensors and the config of one adapter."""

    def __init__(self, slots: dict[str, Slot], nodes: dict[str, Adapter]) -> None:
        self.slots = slots
        self.nodes = {path: _writable(path, node) for path, node in nodes.items()}
        named = {slot.path for slot in slots.values()}
        for path in self.nodes:
            if path not in named:
                raise LoraError(
                    f"names give {path!r} no name in the PyTorch model, and it is adapted; wanted "
                    "one. Pass names=."
                )
        self.adapted = [s for s in slots.values() if isinstance(self._node(s), LoRAFactors)]
        self.whole = [s for s in slots.values() if isinstance(self._node(s), FullDelta)]

    def written(self) -> tuple[dict[str, np.ndarray], PeftConfig]:
        """The tensors by PEFT's names, and the config."""
        if not self.adapted:
            raise LoraError("no weight has a LoRA, and PEFT wants one at least. Use lora.save.")
        tensors: dict[str, np.ndarray] = {}
        for slot in self.adapted:
            tensors |= self._product(slot)
        saved, biases = self._whole(tensors)
        return {PREFIX + name: tensor for name, tensor in tensors.items()}, self._config(
            saved, biases
        )

    def _node(self, slot: Slot) -> Any:
        return self.nodes.get(slot.path)

    def _product(self, slot: Slot) -> dict[str, np.ndarray]:
        """A, B and the magnitude of one product."""
        if not slot.is_product or slot.place.layout == "vector":
            raise LoraError(
                f"{slot.path!r} has a LoRA, but is called {slot.name!r} in the PyTorch model, of "
                f"the layout {slot.place.layout!r}: PEFT adapts weights of modules. Pass names=."
            )
        node = _split(slot, self._node(slot))
        a, b = (host_array(f"{slot.path}:{name}", getattr(node, name))[slot.index] for name in "ab")
        first, second = tensor_names(slot.place.layout)
        module = slot.module + ".base_layer" * self._wrapped_by(slot)
        tensors = dict(
            zip((f"{module}.{first}", f"{module}.{second}"), to_peft(slot, a, b), strict=True)
        )
        if isinstance(node, DoRAFactors):
            magnitude = host_array(f"{slot.path}:magnitude", node.magnitude)[slot.index]
            tensors[f"{module}.{MAGNITUDE}"] = magnitude_to_torch(slot, magnitude)
        return tensors

    def _wrapped_by(self, slot: Slot) -> int:
        """How many wrappers PEFT puts around this parameter's: one for each later one."""
        if slot.place.layout != "experts":
            return 0
        siblings = [s for s in self.adapted if s.module == slot.module]
        check_positions(siblings)
        return sum(s.place.position > slot.place.position for s in siblings)

    def _whole(self, tensors: dict[str, np.ndarray]) -> tuple[list[str], bool]:
        """Adds what is trained whole; returns the modules to save, and whether biases are."""
        adapted = {slot.module for slot in self.adapted}
        saved: dict[str, None] = {}
        biases = False
        for slot in self.whole:
            if slot.module not in adapted:
                saved[slot.module] = None
            elif slot.own == "bias":
                tensors[f"{slot.module}.base_layer.bias"] = self._parameter(slot)
                biases = True
            else:
                raise LoraError(
                    f"{slot.path!r} is trained whole, and its module {slot.module!r} has a LoRA; "
                    "PEFT has no form for both."
                )
        for slot in self.slots.values():
            if is_saved(slot.module, saved):
                if slot.module in adapted:
                    raise LoraError(
                        f"{slot.module!r} has a LoRA, and PEFT would save it whole, as it does "
                        f"every module whose name, or that of one around it, ends in one of "
                        f"{list(saved)}; PEFT has no form for both. Use lora.save."
                    )
                tensors[slot.name] = self._parameter(slot)
        return list(saved), biases

    def _parameter(self, slot: Slot) -> np.ndarray:
        """A parameter with its change, in PyTorch's layout."""
        if slot.place.layout == "experts" or not slot.module:
            raise LoraError(
                f"{slot.path!r} is trained whole and is the parameter {slot.name!r}; PEFT saves "
                "modules whole, and no single parameters of theirs."
            )
        slot.require_axes()
        node = self._node(slot)
        weight = slot.part(host_array(slot.path, floating(slot.path, slot.leaf)))
        if node is not None:
            delta = slot.part(host_array(f"{slot.path}:delta", node.delta))
            weight = weight.astype(delta.dtype) + delta
        return weight_to_torch(slot, weight)

    def _config(self, saved: list[str], biases: bool) -> PeftConfig:
        ranks, alphas = {}, {}
        for slot in self.adapted:
            node = self._node(slot)
            key = slot.name if slot.place.layout == "experts" else slot.module
            ranks[key], alphas[key] = node.rank, _alpha(node)
        r, alpha = most_common(ranks.values()), most_common(alphas.values())
        products = [slot for slot in self.adapted if slot.place.layout != "experts"]
        parameters = [slot.name for slot in self.adapted if slot.place.layout == "experts"]
        dropout = max(self._node(slot).dropout for slot in self.adapted)
        return PeftConfig(
            r=r,
            lora_alpha=alpha,
            target_modules=self._targets([slot.module for slot in products]),
            target_parameters=tuple(sorted(parameters)),
            modules_to_save=tuple(saved),
            rank_pattern=pattern_of(ranks, r),
            alpha_pattern=pattern_of(alphas, alpha),
            lora_dropout=0.0 if parameters else dropout,
            bias="lora_only" if biases else "none",
            use_dora=self._all_dora(),
            fan_in_fan_out=any(s.place.layout == "fan_in_fan_out" for s in products),
        )

    def _targets(self, modules: list[str]) -> tuple[str, ...]:
        """Names of the modules: their last component alone, where all that have it are meant."""
        meant = set(modules)
        every = collections.defaultdict(set)
        for slot in self.slots.values():
            every[slot.module.rpartition(".")[2]].add(slot.module)
        short = {m: m.rpartition(".")[2] for m in modules}
        return tuple(sorted({last if every[last] <= meant else m for m, last in short.items()}))

    def _all_dora(self) -> bool:
        """Whether every node is DoRA's; PEFT has no file of both kinds."""
        kinds = {slot.path: isinstance(self._node(slot), DoRAFactors) for slot in self.adapted}
        if len(set(kinds.values())) > 1:
            plain, dora = (min(p for p in kinds if kinds[p] is kind) for kind in (False, True))
            raise LoraError(
                f"{dora!r} is adapted by DoRA, {plain!r} by LoRA; an adapter of PEFT is all of one "
                "or the other. Use lora.save."
            )
        if any(kinds.values()) and any(s.place.layout == "experts" for s in self.adapted):
            raise LoraError("PEFT has no DoRA of expert-stacked parameters. Use lora.save.")
        return any(kinds.values())


def _writable(path: str, node: Adapter) -> Any:
    if isinstance(node, LoRAFactors):
        return node.plain()
    if isinstance(node, FullDelta):
        return node
    raise LoraError(
        f"{path!r} is adapted by {node.kind}, which PEFT's LoRA files cannot hold; they hold LoRA, "
        "DoRA and weights trained whole. Use lora.save, or lora.merge."
    )


def _split(slot: Slot, node: Any) -> Any:
    """The node with the dims that the file splits among its batch dims.

    Where several modules share one weight ({k, v} in one kernel), a factor that spans them becomes
    one for each, and the factor that they share is repeated.
    """
    axes = slot.axes
    _check_dims(slot, node)
    for dim in axes.batch if axes is not None else ():
        if dim not in node.axes.batch:
            node = _spread(slot, node, dim)
    return node


def _spread(slot: Slot, node: Any, dim: int) -> Any:
    n_batch, length = len(node.axes.batch), slot.leaf.shape[dim]
    batch = tuple(sorted((*node.axes.batch, dim)))
    at = batch.index(dim)
    contract = tuple(d for d in node.axes.contract if d != dim)
    out = tuple(d for d in node.axes.out if d != dim)
    axes = Axes(batch, contract, out)
    if dim in node.axes.contract:
        if isinstance(node, DoRAFactors):
            raise LoraError(
                f"{slot.path!r} is adapted by DoRA over a dim that the PyTorch model splits, "
                f"{slot.name!r}; the norms of the parts are not known."
            )
        a = np.moveaxis(np.asarray(node.a), n_batch + node.axes.contract.index(dim), at)
        b = np.repeat(np.expand_dims(np.asarray(node.b), at), length, at)
        return dataclasses.replace(node, a=a, b=b, axes=axes)
    place = node.axes.out.index(dim)
    a = np.repeat(np.expand_dims(np.asarray(node.a), at), length, at)
    b = np.moveaxis(np.asarray(node.b), n_batch + 1 + place, at)
    changes = {"a": a, "b": b, "axes": axes}
    if isinstance(node, DoRAFactors):
        lengths = ("magnitude", "squared_norm")
        moved = {n: np.moveaxis(np.asarray(getattr(node, n)), n_batch + place, at) for n in lengths}
        changes |= moved
    return dataclasses.replace(node, **changes)


def _check_dims(slot: Slot, node: Any) -> None:
    """Raises `LoraError` unless the file's product is one that the factors span."""
    axes = slot.axes
    fits = axes is not None and set(node.axes.batch) <= set(axes.batch)
    fits = fits and set(node.axes.contract) - set(axes.batch) == set(axes.contract)  # type: ignore[union-attr]
    if not fits:
        raise LoraError(
            f"{slot.path!r} is adapted with {node.axes}, its parameter {slot.name!r} has {axes}: "
            "the factors are not those of its product. Pass names= that fit."
        )


def _alpha(node: Any) -> float:
    """The alpha that gives the scale, as an integer where it is one but for rounding."""
    alpha = node.scale * node.rank
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * abs(alpha) else alpha
