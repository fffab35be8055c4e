"""`load_peft`: factors from a folder that Hugging Face PEFT wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax

from lorax_fn.errors import AdapterFileError
from lorax_fn.io.names import Names, slots_of
from lorax_fn.io.peft_config import WEIGHTS, read_config
from lorax_fn.io.peft_reader import Reader
from lorax_fn.io.tensors import TensorFile, open_tensors
from lorax_fn.leaves import structure
from lorax_fn.paths import leaves_with_paths

Pytree = Any


def load_peft(
    folder: str | os.PathLike[str],
    params: Pytree,
    *,
    names: Names = None,
    axes: Pytree | None = None,
) -> Pytree:
    r"""Reads an adapter that PEFT, or `save_peft`, wrote.

    Every tensor of the file is used, and every leaf that the config targets or saves has its
    tensors, or the file is refused, with the tensor's name; a name in the config that fits no leaf
    is passed over. A leaf that the JAX model ties (embedding and output head) changes in both uses,
    though PEFT adapts one of the two. Layers of a stack that the adapter leaves out get zeros,
    layers of lower rank are padded.

    Args:
        folder: holds `adapter_model.safetensors` and `adapter_config.json`.
        params: the base. Arrays where the adapter is DoRA's or holds whole modules, which are kept
            as their difference from the base; for others `jax.ShapeDtypeStruct`s do.
        names: what `save_peft` takes.
        axes: what `infer_axes` returned for params. Needed, where the names do not say them, for
            leaves of more than two dims and for those called "weight", which Equinox has (out, in).
            Any other leaf of two dims is taken for (in, out).

    Returns:
        Factors of the structure of params: LoRA or DoRA nodes in the file's dtype (B in float32
        where the names scale it), `Full` ones for modules that were trained whole.

    Raises:
        AdapterFileError: if the folder is damaged, of a kind that is not known here, or does not
            fit params.
        AxesError: if the axes of an adapted leaf are unknown.
        LoraError: if names are wrong, or a leaf is quantised and qwix is not installed.

    >>> import tempfile, jax, jax.numpy as jnp, lorax_fn as lora
    >>> params = {"h": {"0": {"attn": {"w": jnp.ones((4, 3))}}}}
    >>> names = {r"h/(\d+)/attn/w": r"model.layers.\1.self_attn.q_proj.weight"}
    >>> factors = lora.init(jax.random.key(0), params, [lora.LoRA(["attn"], rank=2, alpha=4)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora.save_peft(folder, params, factors, names=names)
    ...     loaded = lora.load_peft(folder, params, names=names)
    >>> loaded["h"]["0"]["attn"]["w"].b.shape, loaded["h"]["0"]["attn"]["w"].scale
    ((2, 3), 2.0)
    """
    folder = Path(folder)
    config = read_config(folder)
    reader = Reader(open_weights(folder), config, slots_of(params, names, axes))
    paths = [path for path, _ in leaves_with_paths(params)]
    known = reader.paths
    factors = [reader.node(path) if path in known else None for path in paths]
    return jax.tree.unflatten(structure(params), factors)


def open_weights(folder: Path) -> TensorFile:
    """The tensors of a folder.

    Raises:
        AdapterFileError: if there are none, or none that can be read without running code.
    """
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise AdapterFileError(
            f"{folder} holds adapter_model.bin, a pickle, which could run any code; not read. "
            "Save the adapter again with PEFT's save_pretrained, as safetensors."
        )
    file = open_tensors(folder / WEIGHTS)
    if not file.entries:
        raise AdapterFileError(f"{file.path} holds no tensors: the adapter changes nothing.")
    return file
