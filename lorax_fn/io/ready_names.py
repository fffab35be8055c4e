"""Ready namings: from leaves of well-known JAX trees to parameters of `transformers`' models.

"flax"     Hugging Face's Flax ports of Llama, Mistral, Gemma, BERT, ViT, … and whatever calls its
           modules as the PyTorch model does: "/" for ".", kernel = weightᵀ, embedding and scale =
           weight. The first component "params" is not part of the name.
"gpt2"     The same for GPT-2, whose Flax kernels are (out, in) and whose PyTorch ones are not.
"tunix"    The Llama, Qwen and Gemma of tunix, where q, k and v are three-dimensional.
"torch"    A flat dict of a PyTorch model's own parameters, such as its safetensors file.
"maxtext", "maxtext_llama", "maxtext_mixtral", "maxtext_gemma2", "maxtext_gemma3"
           MaxText's decoders, their layers unrolled or scanned: see `maxtext_names.py`.
"""

from __future__ import annotations

import re
from typing import Any

from lorax_fn.axes import Axes
from lorax_fn.io.maxtext_names import FAMILIES
from lorax_fn.io.places import Layout, Naming, Place

_EMBEDDING = re.compile(r".*(embed(ding)?s?|embed_tokens|wte|wpe)")


def flax(path: str, leaf: Any) -> Place:
    """Flax names: see the module's docstring."""
    *modules, own = path.removeprefix("params/").split("/")
    name = ".".join(
        [*modules, {"kernel": "weight", "embedding": "weight", "scale": "weight"}.get(own, own)]
    )
    if own == "embedding":
        return Place(name, "embedding", Axes(contract=(0,), out=(1,)))
    if own == "kernel" and leaf.ndim > 2:
        last = leaf.ndim - 1
        return Place(name, "conv", Axes(contract=tuple(range(last)), out=(last,)))
    return Place(name, "linear" if own == "kernel" else "vector")


def gpt2(path: str, leaf: Any) -> Place:
    """Flax names, with the products of GPT-2's Conv1D."""
    place = flax(path, leaf)
    if re.fullmatch(r".*/(c_attn|c_proj|c_fc|q_attn)/kernel", path):
        return Place(place.name, "fan_in_fan_out", Axes(contract=(1,), out=(0,)))
    return place


def torch(path: str, leaf: Any) -> Place:
    """PyTorch's own names, in the layouts of PyTorch."""
    name = path.replace("/", ".")
    module, _, own = name.rpartition(".")
    if own != "weight" or leaf.ndim < 2:
        return Place(name, "vector")
    if leaf.ndim > 2:
        return Place(name, "conv", Axes(contract=tuple(range(1, leaf.ndim)), out=(0,)))
    if _EMBEDDING.fullmatch(module.rpartition(".")[2]):
        return Place(name, "embedding", Axes(contract=(0,), out=(1,)))
    return Place(name, "linear", Axes(contract=(1,), out=(0,)))


def tunix(path: str, _: Any) -> Place | None:
    """tunix's Llama 3, Qwen 2 and 3, Gemma 1 to 3."""
    for pattern, name, layout, axes in _TUNIX:
        found = re.fullmatch(pattern, path)
        if found:
            return Place(_numbered(found, name), layout, axes)
    return None


READY: dict[str, Naming] = {
    "flax": flax,
    "gpt2": gpt2,
    "torch": torch,
    "tunix": tunix,
    **FAMILIES,
}

_ATTENTION = r"layers/(\d+)/attn/"
_LAYER = r"layers/(\d+)/"
_IN = Axes(contract=(0,), out=(1,))
_IN_HEADS = Axes(contract=(0,), out=(1, 2))  # (embed, heads, head)
_HEADS_OUT = Axes(contract=(0, 1), out=(2,))  # (heads, head, embed)
_HEADS_FIRST = Axes(contract=(1,), out=(0, 2))  # (heads, embed, head)
_SEVERAL = Axes(batch=(0,), contract=(2,), out=(1, 3))  # ({k, v}, heads, embed, head)
_ONE = r"model.layers.\1."

_TUNIX: list[tuple[str, str, Layout, Axes | None]] = [
    (r"embedder/input_embedding", "model.embed_tokens.weight", "embedding", _IN),
    (r"lm_head/w", "lm_head.weight", "linear", _IN),
    (r"final_norm/(?:w|scale)", "model.norm.weight", "vector", None),
    (_ATTENTION + r"([qkv]_proj)/w", _ONE + r"self_attn.\2.weight", "linear", _IN_HEADS),
    (_ATTENTION + r"o_proj/w", _ONE + "self_attn.o_proj.weight", "linear", _HEADS_OUT),
    (_ATTENTION + r"([qkv])_bias", _ONE + r"self_attn.\2_proj.bias", "vector", None),
    (_ATTENTION + r"q_einsum/w", _ONE + "self_attn.q_proj.weight", "linear", _HEADS_FIRST),
    (_ATTENTION + r"kv_einsum/w", _ONE + "self_attn.{kv}_proj.weight", "linear", _SEVERAL),
    (_ATTENTION + r"qkv_einsum/w", _ONE + "self_attn.{qkv}_proj.weight", "linear", _SEVERAL),
    (_ATTENTION + r"attn_vec_einsum/w", _ONE + "self_attn.o_proj.weight", "linear", _HEADS_OUT),
    (_ATTENTION + r"([qk])_norm/w", _ONE + r"self_attn.\2_norm.weight", "vector", None),
    (_ATTENTION + r"_query_norm/scale", _ONE + "self_attn.q_norm.weight", "vector", None),
    (_ATTENTION + r"_key_norm/scale", _ONE + "self_attn.k_norm.weight", "vector", None),
    (
        _LAYER + r"mlp/(gate|up|down)_proj/kernel",
        _ONE + r"mlp.\2_proj.weight",
        "linear",
        _IN,
    ),
    (_LAYER + r"mlp/router/kernel", _ONE + "mlp.gate.weight", "linear", _IN),
    (
        _LAYER + r"mlp/(gate|up|down)_proj",
        _ONE + r"mlp.experts.{}.\2_proj.weight",
        "linear",
        Axes(batch=(0,), contract=(1,), out=(2,)),
    ),
    (
        _LAYER + r"(input_layernorm|post_attention_layernorm)/w",
        _ONE + r"\2.weight",
        "vector",
        None,
    ),
    (_LAYER + r"pre_attention_norm/scale", _ONE + "input_layernorm.weight", "vector", None),
    (
        _LAYER + r"post_att(?:entio)?n_norm/scale",
        _ONE + "post_attention_layernorm.weight",
        "vector",
        None,
    ),
    (_LAYER + r"pre_ffw_norm/scale", _ONE + "pre_feedforward_layernorm.weight", "vector", None),
    (_LAYER + r"post_ffw_norm/scale", _ONE + "post_feedforward_layernorm.weight", "vector", None),
]


def _numbered(found: re.Match[str], name: str) -> Any:
    """A name with the groups of the match; "{kv}" picks a letter by the index of the batch dim."""
    name = found.expand(name)
    letters = re.search(r"\{(\w+)\}", name)
    if letters is None:
        return name
    return lambda i: name.replace(letters[0], letters[1][i])
