"""From the leaves of MaxText's decoders to parameters of `transformers`' models.

"maxtext"          Qwen 2.5 and 3, dense or with experts
"maxtext_llama"    Llama 3: q is divided by √head_dim, q and k are interleaved
"maxtext_mixtral"  Mixtral: q is divided by √head_dim
"maxtext_gemma2"   Gemma 2: q likewise, embeddings are multiplied by √width, a norm's scale is 1 + w
"maxtext_gemma3"   the text decoder of Gemma 3: embeddings and norms as in Gemma 2

Layers are unrolled, "layers_3", or scanned: "layers", a stack along dim 1. The trees of Qwen, Llama
and Mixtral do not tell which they are. MaxText pads some vocabularies, Gemma 2's among them: such
an embedding, whole or adapted, does not fit the published model's. The layouts are those of
MaxText's converter in release 0.2.5, `maxtext/checkpoint_conversion/utils/param_mapping.py`, and
are tested against it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from lorax_fn.axes import Axes
from lorax_fn.errors import LoraError
from lorax_fn.io.places import Naming, Place

_LAYER = re.compile(
    r"decoder/layers(?P<rest>_remainder)?(?:_(?P<i>\d+))?/(?:layers_(?P<k>\d+)/)?(?P<leaf>.+)"
)
_STACKED = 1  # the dim along which layers are scanned

Role = Literal["query", "key", "norm", "embedding", ""]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of a layer: its name within the PyTorch layer, and what its dims are.

    Attributes:
        name: "{expert}" in it numbers the leaf's first dim.
        contract: how many dims are contracted; 0 of a vector.
        out: how many are put out.
        role: by which a family tells what it scales, shifts or reorders.
        position: which of the layers that MaxText has in one this leaf is of.
    """

    name: str
    contract: int
    out: int
    role: Role = ""
    position: int = 0

    @property
    def of_experts(self) -> bool:
        """Whether the first dim counts experts."""
        return "{expert}" in self.name

    def axes(self, *, scanned: bool) -> Axes:
        """The roles of the dims, those of experts and layers among them."""
        batch = (0,) * self.of_experts + (_STACKED,) * scanned
        dims = [d for d in range(len(batch) + self.contract + self.out) if d not in batch]
        return Axes(batch, tuple(dims[: self.contract]), tuple(dims[self.contract :]))


def _attention(module: str = "self_attention") -> dict[str, Leaf]:
    return {
        f"{module}/query/kernel": Leaf("self_attn.q_proj.weight", 1, 2, "query"),
        f"{module}/key/kernel": Leaf("self_attn.k_proj.weight", 1, 2, "key"),
        f"{module}/value/kernel": Leaf("self_attn.v_proj.weight", 1, 2),
        f"{module}/out/kernel": Leaf("self_attn.o_proj.weight", 2, 1),
        f"{module}/query/bias": Leaf("self_attn.q_proj.bias", 0, 2, "query"),
        f"{module}/key/bias": Leaf("self_attn.k_proj.bias", 0, 2, "key"),
        f"{module}/value/bias": Leaf("self_attn.v_proj.bias", 0, 2),
        f"{module}/query_norm/scale": Leaf("self_attn.q_norm.weight", 0, 1, "norm"),
        f"{module}/key_norm/scale": Leaf("self_attn.k_norm.weight", 0, 1, "norm"),
    }


def _mlp(module: str = "mlp") -> dict[str, Leaf]:
    return {
        f"{module}/wi_0/kernel": Leaf("mlp.gate_proj.weight", 1, 1),
        f"{module}/wi_1/kernel": Leaf("mlp.up_proj.weight", 1, 1),
        f"{module}/wo/kernel": Leaf("mlp.down_proj.weight", 1, 1),
    }


def _experts(module: str, name: str, gate: str, up: str, down: str) -> dict[str, Leaf]:
    parts = {"wi_0": gate, "wi_1": up, "wo": down}
    leaves = {
        f"{module}/{ours}": Leaf(f"{name}.experts.{{expert}}.{theirs}.weight", 1, 1)
        for ours, theirs in parts.items()
    }
    return leaves | {f"{module}/gate/kernel": Leaf(f"{name}.gate.weight", 1, 1)}


def _norms(names: Mapping[str, str], suffix: str = "") -> dict[str, Leaf]:
    return {
        f"{ours}{suffix}/scale": Leaf(f"{theirs}.weight", 0, 1, "norm")
        for ours, theirs in names.items()
    }


_TWO_NORMS = {
    "pre_self_attention_layer_norm": "input_layernorm",
    "post_self_attention_layer_norm": "post_attention_layernorm",
}
_FOUR_NORMS = {
    "pre_self_attention_norm": "input_layernorm",
    "post_self_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OUTSIDE = {
    "token_embedder/embedding": Leaf("embed_tokens.weight", 1, 1, "embedding"),
    "decoder/decoder_norm/scale": Leaf("norm.weight", 0, 1, "norm"),
}
_HEAD = {"decoder/logits_dense/kernel": Leaf("lm_head.weight", 1, 1)}
_DENSE = _attention() | _mlp() | _norms(_TWO_NORMS)


def _pair() -> dict[str, Leaf]:
    """A layer of Gemma 2 in MaxText: one of local attention, then one of global."""
    leaves: dict[str, Leaf] = {}
    for position, suffix in enumerate(("_local", "_global")):
        one = _attention(f"self_attention{suffix}") | _mlp(f"mlp{suffix}")
        one |= _norms(_FOUR_NORMS, suffix)
        leaves |= {k: dataclasses.replace(leaf, position=position) for k, leaf in one.items()}
    return leaves


@dataclasses.dataclass(frozen=True)
class Family:
    """The naming of a family of models, for `names=`.

    Attributes:
        layer: the leaves of a layer, by their path in it.
        model: what the names of all but the head begin with.
        cycle: how many of the PyTorch model's layers one of MaxText's is, the leaves of each with
            names of their own (Gemma 2).
        block: how many layers a step of the scan has, as "layers_0", "layers_1", … (Gemma 3).
        steps: how many steps the scan has, before the layers that remain.
        query_scaled: whether q is divided by √head_dim.
        interleaved: whether q and k are interleaved.
        gemma: the dtype of the √width by which embeddings are multiplied, a norm's scale being
            1 + w; None where they are not.
    """

    layer: Mapping[str, Leaf]
    model: str = "model"
    cycle: int = 1
    block: int = 1
    steps: int | None = None
    query_scaled: bool = False
    interleaved: bool = False
    gemma: Any = None

    def __call__(self, path: str, leaf: Any) -> Place | None:
        """The place of one leaf, None where it is no part of the decoder."""
        path = path.removeprefix("params/")
        if path in _HEAD:
            return self._place(_HEAD[path].name, _HEAD[path], leaf, _HEAD[path].axes(scanned=False))
        if path in _OUTSIDE:
            own = _OUTSIDE[path]
            return self._place(f"{self.model}.{own.name}", own, leaf, own.axes(scanned=False))
        found = _LAYER.fullmatch(path)
        if found is None or found["leaf"] not in self.layer:
            return None
        own = self.layer[found["leaf"]]
        number = self._number(own, found)
        if number is None:
            return None
        scanned = len(number) > 1
        name = self._name(own, *number)
        return self._place(name, own, leaf, own.axes(scanned=scanned))

    def fitted(self, leaves: Mapping[str, Any]) -> Family:
        """With the number of the scan's steps, of params by path."""
        for path, leaf in leaves.items():
            found = _LAYER.fullmatch(path.removeprefix("params/"))
            if self.block == 1 or found is None or getattr(leaf, "ndim", 0) <= _STACKED:
                continue
            if not found["rest"] and not found["i"] and found["k"]:
                return dataclasses.replace(self, steps=leaf.shape[_STACKED])
        return self

    def _number(self, own: Leaf, found: re.Match[str]) -> tuple[int, ...] | None:
        """The layer in the PyTorch model; of a scan the first one, and how many it goes on by."""
        i, k = (None if found[name] is None else int(found[name]) for name in "ik")
        if found["rest"]:
            if i is not None or k is None or self.block == 1:
                return None
            return (self._remainder(found[0]) + k,)
        if i is not None:
            return None if k is not None else (own.position + self.cycle * i,)
        if k is None:
            return own.position, self.cycle
        return (k, self.block) if k < self.block else None

    def _name(self, own: Leaf, first: int, step: int | None = None) -> Any:
        """The name, or of several parameters a function that makes it of their indices."""

        def name(*index: int) -> str:
            layer = first if step is None else first + step * index[-1]
            whole = f"{self.model}.layers.{layer}.{own.name}"
            return whole.replace("{expert}", str(index[0])) if own.of_experts else whole

        return name() if step is None and not own.of_experts else name

    def _remainder(self, path: str) -> int:
        """The first layer after the scan."""
        if self.steps is None:
            raise LoraError(
                f"{path!r} is of the layers that remain after a scan, and none of the scanned ones "
                "is there to tell how many come before it; wanted the whole tree."
            )
        return self.block * self.steps

    def _place(self, name: Any, own: Leaf, leaf: Any, axes: Axes) -> Place:
        values: dict[str, Any] = {}
        if self.query_scaled and own.role == "query":
            values["scale"] = math.sqrt(leaf.shape[-1])
        if self.interleaved and own.role in ("query", "key"):
            values["interleaved"] = True
        if self.gemma is not None and own.role == "embedding":
            values["scale"] = 1 / float(np.asarray(math.sqrt(leaf.shape[-1]), self.gemma))
        if self.gemma is not None and own.role == "norm":
            values["shift"] = -1.0
        if own.role == "embedding":
            return Place(name, "embedding", axes, **values)
        return Place(name, "linear" if own.contract else "vector", axes, **values)


FAMILIES: dict[str, Naming] = {
    "maxtext": Family(_DENSE | _experts("moe_block", "mlp", "gate_proj", "up_proj", "down_proj")),
    "maxtext_llama": Family(_DENSE, query_scaled=True, interleaved=True),
    "maxtext_mixtral": Family(
        _DENSE | _experts("MoeBlock_0", "block_sparse_moe", "w1", "w3", "w2"), query_scaled=True
    ),
    "maxtext_gemma2": Family(_pair(), cycle=2, query_scaled=True, gemma=np.float32),
    "maxtext_gemma3": Family(
        _attention() | _mlp() | _norms(_FOUR_NORMS),
        model="model.language_model",
        block=6,
        gemma=jnp.bfloat16,
    ),
}
