"""The tensors of a PEFT file, sorted by the leaves that they belong to, and the nodes they make."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_fn.adapters import Adapter, DoRAFactors, FullDelta, LoRAFactors
from lorax_fn.adapters.low_rank import split_shape, sum_over_contract
from lorax_fn.errors import AdapterFileError, LoraError, StructureError
from lorax_fn.interpreter import wide_dtype
from lorax_fn.io.layouts import (
    MAGNITUDE,
    from_peft,
    magnitude_from_torch,
    tensor_names,
    torch_shape,
    weight_from_torch,
    weight_to_torch,
)
from lorax_fn.io.names import Slot, check_positions
from lorax_fn.io.peft_config import PREFIX, PeftConfig
from lorax_fn.io.tensors import TensorFile, device_array, floating
from lorax_fn.leaves import as_array
from lorax_fn.targets import nearest_paths

_PRODUCT = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector)(?:\.weight)?"
)


@dataclasses.dataclass
class _Product:
    """The tensors of one LoRA, by their part, such as "lora_A.weight"."""

    module: str
    parts: dict[str, str] = dataclasses.field(default_factory=dict)


class Reader:
    """Turns the tensors of one file into nodes."""

    def __init__(self, file: TensorFile, config: PeftConfig, slots: dict[str, Slot]) -> None:
        self.file, self.config, self.slots = file, config, slots
        self._whole: dict[str, str] = {}  # tensors by the parameter that they are
        self._products: dict[str, _Product] = {}  # by the module, base_layer and all
        for tensor in file.entries:
            self._sort(tensor)
        self._products_at: dict[str, list[tuple[Slot, _Product]]] = {}
        for module, product in self._products.items():
            slot = self._slot_of(module, product)
            self._products_at.setdefault(slot.path, []).append((slot, product))
        self._whole_at: dict[str, list[tuple[Slot, str]]] = {}
        for name, tensor in self._whole.items():
            if name not in slots:
                raise self._foreign(tensor, name)
            self._whole_at.setdefault(slots[name].path, []).append((slots[name], tensor))
        self._check_complete()

    @property
    def paths(self) -> set[str]:
        """The leaves that the file says anything of."""
        return {*self._products_at, *self._whole_at}

    def node(self, path: str) -> Adapter | None:
        """The node of one leaf, read now; None where the file holds no change of it."""
        products, whole = self._products_at.get(path), self._whole_at.get(path, [])
        if products is None:
            return self._delta(whole)
        for slot, tensor in whole:  # PEFT stores the base of embeddings that it adapts
            if not self._is_base(slot, tensor):
                raise self._error(
                    tensor, f"is another base than {path!r}, which the LoRA also changes"
                )
        pieces = {slot.index: self._product(slot, product) for slot, product in products}
        return self._factors(products[0][0], pieces)

    def _sort(self, tensor: str) -> None:
        if not tensor.startswith(PREFIX):
            raise self._error(tensor, f"does not start with {PREFIX!r}, as PEFT's do")
        name = tensor.removeprefix(PREFIX)
        match = _PRODUCT.fullmatch(name)
        if match is None:
            parameter = name.replace(".base_layer.", ".")
            if parameter in self._whole:
                raise self._error(tensor, f"and {self._whole[parameter]!r} are one parameter")
            self._whole[parameter] = tensor
            return
        product = self._products.setdefault(match["module"], _Product(match["module"]))
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
        slot.require_axes()
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

    def _factors(self, slot: Slot, pieces: dict[tuple[int, ...], tuple[Any, ...]]) -> Adapter:
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
            one = magnitude_from_torch(slot, piece[3])
            if one is None:
                raise AdapterFileError(
                    f"{self.file.path}: the magnitude of {slot.name!r} has shape "
                    f"{list(piece[3].shape)}; wanted {math.prod(out)} numbers."
                )
            magnitude[index] = one
        return {"magnitude": device_array(magnitude), "squared_norm": squared}

    def _check_complete(self) -> None:
        """Raises `AdapterFileError` if the config names a module whose tensors are missing."""
        found = {slot.name for pieces in self._products_at.values() for slot, _ in pieces}
        for slot in self.slots.values():
            experts = slot.place.layout == "experts"
            if self.config.targets_parameter(slot.name) and not experts:
                raise AdapterFileError(
                    f"{self.file.path}: the config has {slot.name!r} among its target_parameters, "
                    f"and names give {slot.path!r} the layout {slot.place.layout!r}; wanted "
                    "lorax_fn.io.Place(..., 'experts')."
                )
            named = (
                self.config.targets_parameter(slot.name)
                if experts
                else slot.is_product
                and slot.place.layout != "vector"
                and self.config.targets(slot.module)
            )
            if named and slot.name not in found:
                raise AdapterFileError(
                    f"{self.file.path} lacks the LoRA of {slot.module!r} ({slot.path!r}), which "
                    "the config targets."
                )
            if self.config.saves(slot.module) and slot.name not in self._whole:
                raise AdapterFileError(
                    f"{self.file.path} lacks {PREFIX}{slot.name}, of a module that the config "
                    "lists in modules_to_save."
                )
        biases = [name for name, slot in self.slots.items() if slot.own == "bias"]
        missing = [name for name in biases if name not in self._whole]
        if self.config.bias == "all" and missing:
            raise AdapterFileError(
                f"{self.file.path} lacks {len(missing)} of {len(biases)} biases, the first "
                f"{missing[0]!r}, and the config says that all were trained."
            )

    def _delta(self, whole: list[tuple[Slot, str]]) -> Adapter | None:
        """What was trained whole, as its difference from the base."""
        delta = None
        for slot, tensor in whole:
            unasked = slot.own == "weight" and not self.config.saves(slot.module)
            if unasked and self._is_base(slot, tensor):
                continue  # a head that PEFT stores with its embedding
            value = self._parameter(slot, tensor)
            wide = wide_dtype(slot.leaf.dtype)
            if delta is None:
                delta = np.zeros(slot.leaf.shape, wide)
            slot.part(delta)[...] = value.astype(wide) - self._base(slot).astype(wide)
        return None if delta is None else FullDelta(device_array(delta))

    def _parameter(self, slot: Slot, tensor: str) -> np.ndarray:
        """A parameter that was stored whole, in the leaf's own layout."""
        slot.require_axes()
        value = weight_from_torch(slot, self.file.read_finite(tensor))
        if value is None or slot.place.layout == "experts":
            raise self._error(
                tensor,
                f"has shape {list(self.file.entries[tensor].shape)}; wanted "
                f"{list(torch_shape(slot))} for {slot.path!r} of shape {list(slot.leaf.shape)}",
            )
        return value

    def _base(self, slot: Slot) -> np.ndarray:
        return slot.part(np.asarray(self._values(slot)))

    def _is_base(self, slot: Slot, tensor: str) -> bool:
        """Whether a parameter that was stored whole is the base's own."""
        value, base = self._parameter(slot, tensor), self._base(slot)
        if slot.place.scale == 1.0 and slot.place.shift == 0.0:
            return np.array_equal(value.astype(slot.leaf.dtype), base)
        # The leaf is the parameter scaled, and rounded: equal to one rounding of each entry.
        stored = self.file.read_finite(tensor)
        coarser = max((stored.dtype, base.dtype), key=lambda dtype: jnp.finfo(dtype).eps)
        return np.allclose(
            stored.astype(np.float64),
            weight_to_torch(slot, base.astype(np.float64)),
            rtol=float(jnp.finfo(coarser).eps),
            atol=abs(slot.place.shift) * float(jnp.finfo(coarser).eps),
        )

    def _values(self, slot: Slot) -> Any:
        if isinstance(as_array(slot.leaf), jax.ShapeDtypeStruct):
            raise LoraError(
                f"{slot.path!r} is abstract, and the adapter is to be told from its values; wanted "
                "arrays for params."
            )
        return jnp.asarray(floating(slot.path, slot.leaf))

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
