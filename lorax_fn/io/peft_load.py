"""`load_peft`: factors from a folder that Hugging Face PEFT wrote."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.adapters import Adapter, DoRAFactors, FullDelta, LoRAFactors
from lorax_fn.adapters.low_rank import split_shape, sum_over_contract
from lorax_fn.errors import AdapterFileError, AxesError, LoraError, StructureError
from lorax_fn.interpreter import wide_dtype
from lorax_fn.io.layouts import MAGNITUDE, from_peft, tensor_names, torch_shape, weight_from_torch
from lorax_fn.io.names import Names, Slot, slots_of
from lorax_fn.io.peft_config import PeftConfig, read_config
from lorax_fn.io.peft_save import PREFIX, WEIGHTS, check_positions
from lorax_fn.io.tensors import TensorFile, device_array, open_tensors
from lorax_fn.paths import leaves_with_paths
from lorax_fn.targets import nearest_paths

Pytree = Any
_PRODUCT = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector)(?:\.weight)?"
)


def load_peft(
    folder: str | os.PathLike[str],
    params: Pytree,
    *,
    names: Names = None,
    axes: Pytree | None = None,
) -> Pytree:
    """Reads an adapter that PEFT, or `save_peft`, wrote.

    Every tensor of the file is used and every module that the config names is found, or the file is
    refused, with the tensor's name. Layers of a stack that the adapter leaves out get zeros, layers
    of lower rank are padded.

    Args:
        folder: holds `adapter_model.safetensors` and `adapter_config.json`.
        params: the base. Arrays where the adapter is DoRA's or holds whole modules, which are kept
            as their difference from the base; for others `jax.ShapeDtypeStruct`s do.
        names: what `save_peft` takes.
        axes: what `infer_axes` returned for params; needed for leaves of more than two dims where
            the names do not say.

    Returns:
        Factors of the structure of params: LoRA or DoRA nodes in the file's dtype, `Full` ones for
        modules that were trained whole.

    Raises:
        AdapterFileError: if the folder is damaged, of a kind that is not known here, or does not
            fit params.
        AxesError: if the axes of an adapted leaf are unknown.
    """
    folder = Path(folder)
    config = read_config(folder)
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise AdapterFileError(
            f"{folder} holds adapter_model.bin, a pickle, which could run any code; not read. "
            "Save the adapter again with PEFT's save_pretrained, as safetensors."
        )
    reader = _Reader(open_tensors(folder / WEIGHTS), config, slots_of(params, names, axes))
    nodes = reader.nodes()
    factors = [nodes.get(path) for path, _ in leaves_with_paths(params)]
    return jax.tree.unflatten(jax.tree.structure(params), factors)


@dataclasses.dataclass
class _Product:
    """The tensors of one LoRA, by their part, such as "lora_A.weight"."""

    module: str
    parts: dict[str, str] = dataclasses.field(default_factory=dict)


class _Reader:
    """Turns the tensors of one file into nodes."""

    def __init__(self, file: TensorFile, config: PeftConfig, slots: dict[str, Slot]) -> None:
        self.file, self.config, self.slots = file, config, slots
        self.whole: dict[str, str] = {}  # tensors by the parameter that they are
        self.products: dict[str, _Product] = {}  # by the module, base_layer and all
        for tensor in file.entries:
            self._sort(tensor)

    def nodes(self) -> dict[str, Adapter]:
        """Every node, by its leaf's path."""
        found: dict[str, dict[tuple[int, ...], Any]] = {}
        slots: dict[str, Slot] = {}
        for module, product in self.products.items():
            slot = self._slot_of(module, product)
            slots[slot.path] = slot
            found.setdefault(slot.path, {})[slot.index] = self._product(slot, product)
        self._check_complete(found)
        nodes: dict[str, Adapter] = {
            path: self._node(slots[path], pieces) for path, pieces in found.items()
        }
        return nodes | self._deltas(found)

    def _sort(self, tensor: str) -> None:
        if not tensor.startswith(PREFIX):
            raise self._error(tensor, f"does not start with {PREFIX!r}, as PEFT's do")
        name = tensor.removeprefix(PREFIX)
        match = _PRODUCT.fullmatch(name)
        if match is None:
            parameter = name.replace(".base_layer.", ".")
            if parameter in self.whole:
                raise self._error(tensor, f"and {self.whole[parameter]!r} are one parameter")
            self.whole[parameter] = tensor
            return
        product = self.products.setdefault(match["module"], _Product(match["module"]))
        if match["part"] in product.parts:
            raise self._error(tensor, f"and {product.parts[match['part']]!r} are one tensor")
        product.parts[match["part"]] = tensor

    def _slot_of(self, module: str, product: _Product) -> Slot:
        """The parameter that a product adapts."""
        tensor = next(iter(product.parts.values()))
        bare = re.sub(r"(\.base_layer)+$", "", module)
        slot = self.slots.get(f"{module}.weight")
        if slot is not None and slot.place.layout != "experts":
            return slot
        wrapped = sorted(
            (
                slot
                for slot in self.slots.values()
                if slot.module == bare and self.config.targets_parameter(slot.name)
            ),
            key=lambda slot: slot.place.position,
        )
        check_positions(wrapped)
        inner = len(wrapped) - 1 - module.count(".base_layer")
        if not 0 <= inner < len(wrapped):
            raise self._foreign(tensor, f"{bare}.weight")
        return wrapped[inner]

    def _product(self, slot: Slot, product: _Product) -> tuple[Any, ...]:
        """(a, b, scale) or (a, b, scale, magnitude) of one product."""
        tensor = next(iter(product.parts.values()))
        wanted = [*tensor_names(slot.place.layout), *([MAGNITUDE] if self.config.use_dora else [])]
        for part in wanted:
            if part not in product.parts:
                raise self._error(tensor, f"lacks its partner {product.module}.{part}")
        for part, extra in product.parts.items():
            if part not in wanted:
                raise self._error(
                    extra,
                    f"is unexpected: names give {slot.path!r} the layout "
                    f"{slot.place.layout!r}, and use_dora is {self.config.use_dora}",
                )
        if slot.axes is None:
            raise AxesError(
                f"the axes of {slot.path!r}, shape {list(slot.leaf.shape)}, are unknown. Call "
                "axes = lora.infer_axes(apply_fn, params, *args) and pass axes=axes to load_peft."
            )
        first, second, *lengths = (self.file.read_finite(product.parts[part]) for part in wanted)
        factors = from_peft(slot, first, second)
        key = slot.name if slot.place.layout == "experts" else slot.module
        if factors is None:
            raise self._error(
                product.parts[wanted[0]],
                f"and its partner have shapes {list(first.shape)} and {list(second.shape)}, which "
                f"do not fit {slot.path!r} of shape {list(slot.leaf.shape)} with {slot.axes} as "
                f"{slot.place.layout}",
            )
        rank = factors[0].shape[-1]
        if rank != self.config.rank(key):
            raise self._error(
                product.parts[wanted[0]],
                f"has rank {rank}, the config says {self.config.rank(key)}",
            )
        return (*factors, self.config.scale(key), *lengths)

    def _node(self, slot: Slot, pieces: dict[tuple[int, ...], tuple[Any, ...]]) -> Adapter:
        """The node of a leaf, of the products of all its layers."""
        lengths = tuple(slot.leaf.shape[d] for d in slot.numbered)
        scales = {piece[2] for piece in pieces.values()}
        scale = scales.pop() if len(scales) == 1 else 1.0
        rank = max(piece[0].shape[-1] for piece in pieces.values())
        sample_a, sample_b = next(iter(pieces.values()))[:2]
        rank_axis = sample_b.ndim - len(slot.axes.out) - 1  # type: ignore[union-attr]
        a = np.zeros((*lengths, *sample_a.shape[:-1], rank), sample_a.dtype)
        shape_b = list(sample_b.shape)
        shape_b[rank_axis] = rank
        b = np.zeros((*lengths, *shape_b), sample_b.dtype)
        for index, (piece_a, piece_b, piece_scale, *_) in pieces.items():
            r = piece_a.shape[-1]
            a[index][..., :r] = piece_a
            part = (slice(None),) * rank_axis + (slice(r),)
            b[index][part] = piece_b if scale == piece_scale else piece_scale * piece_b
        fields: dict[str, Any] = {
            "a": device_array(a),
            "b": device_array(b),
            "scale": scale,
            "axes": slot.axes,
            "dropout": self.config.lora_dropout,
        }
        if self.config.use_dora:
            fields |= self._magnitudes(slot, pieces)
        node = (DoRAFactors if self.config.use_dora else LoRAFactors)(**fields)
        try:
            node.check(slot.path, slot.leaf)
        except StructureError as e:
            raise AdapterFileError(f"{self.file.path}: {e}") from e
        return node

    def _magnitudes(
        self,
        slot: Slot,
        pieces: dict[tuple[int, ...], tuple[Any, ...]],
    ) -> dict[str, Any]:
        """The lengths of the outputs, and the norms of the base that they belong to."""
        leaf, axes = self._values(slot), slot.axes
        squared = sum_over_contract(jnp.square(leaf.astype(wide_dtype(leaf.dtype))), axes)  # type: ignore[arg-type]
        magnitude = np.array(jnp.sqrt(squared))
        _, _, out = split_shape(leaf.shape, axes)  # type: ignore[arg-type]
        for index, piece in pieces.items():
            if piece[3].size != math.prod(out):
                raise AdapterFileError(
                    f"{self.file.path}: the magnitude of {slot.name!r} has shape "
                    f"{list(piece[3].shape)}; wanted {math.prod(out)} numbers."
                )
            magnitude[index] = piece[3].reshape(out)
        return {"magnitude": device_array(magnitude), "squared_norm": squared}

    def _check_complete(self, found: dict[str, dict[tuple[int, ...], Any]]) -> None:
        """Raises `AdapterFileError` if the config names a module whose tensors are missing."""
        for slot in self.slots.values():
            experts = slot.place.layout == "experts"
            named = (
                self.config.targets_parameter(slot.name)
                if experts
                else slot.is_product
                and slot.place.layout != "vector"
                and self.config.targets(slot.module)
            )
            if named and slot.index not in found.get(slot.path, {}):
                raise AdapterFileError(
                    f"{self.file.path} lacks the LoRA of {slot.module!r} ({slot.path!r}), which "
                    "the config targets."
                )
            if self.config.saves(slot.module) and slot.name not in self.whole:
                raise AdapterFileError(
                    f"{self.file.path} lacks {PREFIX}{slot.name}, of a module that the config "
                    "lists in modules_to_save."
                )

    def _deltas(self, found: dict[str, dict[tuple[int, ...], Any]]) -> dict[str, Adapter]:
        """What was trained whole, as its difference from the base."""
        deltas: dict[str, np.ndarray] = {}
        for name, tensor in self.whole.items():
            slot = self.slots.get(name)
            if slot is None:
                raise self._foreign(tensor, name)
            value = weight_from_torch(slot, self.file.read_finite(tensor))
            if value is None or slot.place.layout == "experts":
                raise self._error(
                    tensor,
                    f"has shape {list(self.file.entries[tensor].shape)}; wanted "
                    f"{list(torch_shape(slot))} for {slot.path!r} of shape {list(slot.leaf.shape)}",
                )
            leaf = np.asarray(self._values(slot))
            base = np.moveaxis(leaf, slot.numbered, range(len(slot.numbered)))[slot.index]
            if slot.path in found:
                if not np.array_equal(value.astype(leaf.dtype), base):
                    raise self._error(
                        tensor, f"is another base than {slot.path!r}, which the LoRA also changes"
                    )
                continue  # PEFT stores the base of embeddings that it adapts
            if not self.config.saves(slot.module) and np.array_equal(
                value.astype(leaf.dtype), base
            ):
                continue  # and whatever head goes with them
            wide = wide_dtype(leaf.dtype)
            delta = deltas.setdefault(slot.path, np.zeros(leaf.shape, wide))
            view = np.moveaxis(delta, slot.numbered, range(len(slot.numbered)))
            view[slot.index] = value.astype(wide) - base.astype(wide)
        return {path: FullDelta(device_array(delta)) for path, delta in deltas.items()}

    def _values(self, slot: Slot) -> Any:
        if isinstance(slot.leaf, jax.ShapeDtypeStruct):
            raise LoraError(
                f"{slot.path!r} is abstract, and the adapter is to be told from its values; wanted "
                "arrays for params."
            )
        return jnp.asarray(slot.leaf)

    def _foreign(self, tensor: str, name: str) -> AdapterFileError:
        nearest = ", ".join(map(repr, _nearest(name, self.slots)))
        return self._error(
            tensor,
            f"belongs to {name!r}, which no leaf of params is called. The nearest: "
            f"{nearest or 'none'}. Pass names= that fit the model",
        )

    def _error(self, tensor: str, what: str) -> AdapterFileError:
        return AdapterFileError(f"{self.file.path}: tensor {tensor!r} {what}.")


def _nearest(name: str, slots: dict[str, Slot]) -> list[str]:
    """The names of parameters that come closest, by their components."""
    paths = {known.replace(".", "/"): known for known in slots}
    return [paths[path] for path in nearest_paths([name.replace(".", "/")], paths, n=3)]
