"""Factors and weights of one product, from the library's layout to PEFT's and back, in numpy.

For a product with inputs (in…) and outputs (out…) the library has a (in…, r) and b (r, out…).
PEFT has

    linear      lora_A.weight (r, in)             lora_B.weight (out, r)
    embedding   lora_embedding_A (r, vocabulary)  lora_embedding_B (features, r)
    conv        lora_A.weight (r, in, *kernel)    lora_B.weight (out, r, 1…)
    experts     lora_A.weight (E·r, in)           lora_B.weight (out, r·E)

where row e·r + k of the last A, and column k·E + e of its B, are of expert e and rank k. Where the
parameter is a scaled or reordered leaf, B is scaled and reordered. What is scaled or shifted
becomes float32 or wider: to round it anew would undo terms that cancel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lorax_fn.axes import Axes
from lorax_fn.io.names import Slot

NAMES = {
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
}
MAGNITUDE = "lora_magnitude_vector"


def tensor_names(layout: str) -> tuple[str, str]:
    """What PEFT calls A and B."""
    return NAMES.get(layout, ("lora_A.weight", "lora_B.weight"))


def to_peft(slot: Slot, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """PEFT's A and B of one product, given ours: (in…, r) and (r, out…), experts in front."""
    rank, b = a.shape[-1], _values_to_torch(slot, b)
    if slot.place.layout == "experts":
        experts = a.shape[0] if _stacks_experts(slot) else 1
        inner = a.reshape(experts, -1, rank)  # (E, in, r)
        outer = b.reshape(experts, rank, -1)  # (E, r, out)
        first, second = inner.transpose(0, 2, 1), outer.transpose(2, 1, 0)
        if slot.place.swapped:
            first, second = outer, inner.transpose(1, 2, 0)
        return (
            first.reshape(experts * rank, -1),  # (E·r, in)
            second.reshape(-1, rank * experts),  # (out, r·E)
        )
    if slot.place.layout == "conv":
        kernel = _conv_dims(slot)
        order = (a.ndim - 1, *(_contract(slot).index(d) for d in kernel))
        ones = (1,) * (len(kernel) - 1)
        return a.transpose(order), b.reshape(rank, -1).T.reshape(-1, rank, *ones)
    return a.reshape(-1, rank).T, b.reshape(rank, -1).T


def from_peft(
    slot: Slot, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Our a and b, given PEFT's A and B; None where their shapes are not those of the parameter."""
    contract, out = (tuple(slot.leaf.shape[d] for d in dims) for dims in _in_and_out(slot))
    n_in, n_out = math.prod(contract), math.prod(out)
    if slot.place.layout == "experts":
        return _experts_from_peft(slot, first, second, contract, out)
    rank = first.shape[0] if first.ndim else 0
    wanted = (rank, n_in), (n_out, rank)
    if slot.place.layout == "conv":
        kernel = _conv_dims(slot)
        lengths = tuple(slot.leaf.shape[d] for d in kernel)
        wanted = (rank, *lengths), (n_out, rank, *(1,) * (len(kernel) - 1))
    if rank < 1 or (first.shape, second.shape) != wanted:
        return None
    b = _values_from_torch(slot, second.reshape(n_out, rank).T.reshape(rank, *out))
    if slot.place.layout == "conv":
        first = np.moveaxis(first, 0, -1)  # (in, *kernel, r)
        return first.transpose(*(kernel.index(d) for d in _contract(slot)), first.ndim - 1), b
    return first.T.reshape(*contract, rank), b


def _experts_from_peft(
    slot: Slot,
    first: np.ndarray,
    second: np.ndarray,
    contract: tuple[int, ...],
    out: tuple[int, ...],
) -> tuple[np.ndarray, np.ndarray] | None:
    experts = slot.leaf.shape[slot.axes.batch[-1]] if _stacks_experts(slot) else 1  # type: ignore[union-attr]
    lead = (experts,) if _stacks_experts(slot) else ()
    rank = first.shape[0] // experts if first.ndim else 0
    facing, behind = (out, contract) if slot.place.swapped else (contract, out)
    wanted = (experts * rank, math.prod(facing)), (math.prod(behind), rank * experts)
    if rank < 1 or (first.shape, second.shape) != wanted:
        return None
    near = first.reshape(experts, rank, -1)  # (E, r, in)
    far = second.reshape(-1, rank, experts).transpose(2, 1, 0)  # (E, r, out)
    inner, outer = (far, near) if slot.place.swapped else (near, far)
    a = inner.transpose(0, 2, 1).reshape(*lead, *contract, rank)
    return a, _values_from_torch(slot, outer.reshape(*lead, rank, *out))


def magnitude_to_torch(slot: Slot, magnitude: np.ndarray) -> np.ndarray:
    """DoRA's lengths of the outputs (out…) as PEFT has them."""
    magnitude = _values_to_torch(slot, magnitude).reshape(-1)
    if slot.place.layout == "conv":
        return magnitude.reshape(1, -1, *(1,) * (len(_contract(slot)) - 1))
    return magnitude


def magnitude_from_torch(slot: Slot, magnitude: np.ndarray) -> np.ndarray | None:
    """The lengths of the outputs (out…), given PEFT's; None where they are too few or too many."""
    out = tuple(slot.leaf.shape[d] for d in _in_and_out(slot)[1])
    if magnitude.size != math.prod(out):
        return None
    return _values_from_torch(slot, magnitude.reshape(out))


def weight_to_torch(slot: Slot, part: np.ndarray) -> np.ndarray:
    """A parameter as PyTorch has it, given the part of the leaf that it is."""
    part = _values_to_torch(slot, part, _last_out(slot), shift=slot.place.shift)
    if slot.place.layout == "vector":
        return part.reshape(-1)
    return part.transpose(_torch_order(slot)).reshape(torch_shape(slot))


def weight_from_torch(slot: Slot, parameter: np.ndarray) -> np.ndarray | None:
    """The part of the leaf that a parameter is; None where it has another shape."""
    kept = _kept(slot)
    lengths = tuple(slot.leaf.shape[d] for d in kept)
    if parameter.shape != torch_shape(slot):
        return None
    if slot.place.layout == "vector":
        part = parameter.reshape(lengths)
    else:
        order = _torch_order(slot)
        part = parameter.reshape([lengths[i] for i in order]).transpose(np.argsort(order))
    return _values_from_torch(slot, part, _last_out(slot), shift=slot.place.shift)


def torch_shape(slot: Slot) -> tuple[int, ...]:
    """The shape of a parameter in PyTorch."""
    lengths = [slot.leaf.shape[d] for d in _kept(slot)]
    if slot.place.layout == "vector":
        return (math.prod(lengths),)
    if slot.place.layout == "conv":
        return tuple(lengths[i] for i in _torch_order(slot))
    contract, out = (math.prod(slot.leaf.shape[d] for d in dims) for dims in _in_and_out(slot))
    return (out, contract) if slot.place.layout == "linear" else (contract, out)


def _values_to_torch(
    slot: Slot, array: np.ndarray, axis: int = -1, *, shift: float = 0.0
) -> np.ndarray:
    """Values of the leaf as the parameter has them; `axis` is the last output dim."""
    if slot.place.interleaved:
        array = np.take(array, _halves(array.shape[axis]), axis)
    return _affine(array, slot.place.scale, shift)


def _values_from_torch(
    slot: Slot, array: np.ndarray, axis: int = -1, *, shift: float = 0.0
) -> np.ndarray:
    """Undoes `_values_to_torch`."""
    if slot.place.interleaved:
        array = np.take(array, np.argsort(_halves(array.shape[axis])), axis)
    return _affine(array, 1 / slot.place.scale, -shift / slot.place.scale)


def _affine(array: np.ndarray, scale: float, shift: float) -> np.ndarray:
    """scale · array + shift, in float32 or wider."""
    if scale == 1.0 and shift == 0.0:
        return array
    return scale * array.astype(np.promote_types(array.dtype, np.float32)) + shift


def _halves(length: int) -> np.ndarray:
    """Where 0, 2, 4, …, 1, 3, 5, … are."""
    return np.arange(length).reshape(-1, 2).T.reshape(-1)


def _last_out(slot: Slot) -> int:
    """The axis of the part of the leaf that is its last output dim."""
    out = _in_and_out(slot)[1]
    return _kept(slot).index(out[-1]) if out else -1


def _torch_order(slot: Slot) -> tuple[int, ...]:
    """The axes of the part of the leaf, in PyTorch's order."""
    kept = _kept(slot)
    contract, out = _in_and_out(slot)
    dims: Sequence[int] = (*contract, *out)
    if slot.place.layout == "linear":
        dims = (*out, *contract)
    elif slot.place.layout == "conv":
        dims = (*out, *_conv_dims(slot))
    return tuple(kept.index(d) for d in dims)


def _kept(slot: Slot) -> list[int]:
    """The dims of the leaf that one parameter keeps."""
    return [d for d in range(slot.leaf.ndim) if d not in slot.numbered]


def _conv_dims(slot: Slot) -> tuple[int, ...]:
    """The contracted dims as PyTorch has them: the channel, which is next to the outputs, first."""
    contract, (out,) = _in_and_out(slot)
    channel = min(contract, key=lambda d: abs(d - out))
    return (channel, *(d for d in contract if d != channel))


def _stacks_experts(slot: Slot) -> bool:
    return slot.axes is not None and len(slot.axes.batch) > len(slot.index)


def _contract(slot: Slot) -> tuple[int, ...]:
    return _in_and_out(slot)[0]


def _in_and_out(slot: Slot) -> tuple[tuple[int, ...], tuple[int, ...]]:
    axes: Any = slot.axes if slot.axes is not None else Axes()
    return axes.contract, axes.out
