"""The namings of MaxText's models, against what MaxText's own converter made of the same weights."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lorax_fn as lora
from lorax_fn.io.layouts import weight_from_torch, weight_to_torch
from lorax_fn.io.maxtext_names import gemma3
from lorax_fn.io.names import slots_of
from lorax_fn.paths import leaves_with_paths
from tests.io.trees import moved

ARRAYS = load_file(Path(__file__).with_name("maxtext.safetensors"))
CASES = sorted({tuple(key.split("|")[:2]) for key in ARRAYS if "|torch|" not in key})


@pytest.fixture(params=CASES, ids=", ".join)
def case(request):
    """The model's naming, its params, and its weights in PyTorch's layout."""
    naming, structure = request.param
    tree, torch = {}, {}
    for key, array in ARRAYS.items():
        model, kind, name = key.split("|")
        if model == naming and kind == structure:
            *modules, own = name.split("/")
            node = tree
            for module in modules:
                node = node.setdefault(module, {})
            node[own] = jnp.asarray(array)
        elif model == naming and kind == "torch":
            torch[name] = array
    names = naming.partition(" ")[0]
    return (gemma3(blocks=2) if names == "maxtext_gemma3" else names), tree, torch


def part(slot, array):
    return np.moveaxis(np.asarray(array), slot.numbered, range(len(slot.numbered)))[slot.index]


def assert_close(got, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, wanted)


def test_weights_are_those_of_the_converter(case):
    names, params, torch = case
    slots = slots_of(params, names)
    assert set(slots) == set(torch)
    assert {slot.path for slot in slots.values()} == {path for path, _ in leaves_with_paths(params)}
    for name, weight in torch.items():
        slot = slots[name]
        np.testing.assert_allclose(weight_to_torch(slot, part(slot, slot.leaf)), weight, atol=1e-6)
        back = weight_from_torch(slot, weight)
        np.testing.assert_allclose(back, part(slot, slot.leaf), atol=1e-6)


@pytest.mark.parametrize("kind", [lora.LoRA, lora.DoRA])
def test_a_folder_changes_the_weights_as_the_factors_do(case, kind, getkey, tmp_path):
    """W + s·B·A of the PyTorch model is the merged weight, as the converter would have it."""
    names, params, torch = case
    axes = {slot.path: slot.axes for slot in slots_of(params, names).values()}
    rules = [
        kind(path, rank=2, alpha=3, axes=axes[path])
        for path, leaf in leaves_with_paths(params)
        if axes[path].contract and not (kind is lora.DoRA and "embedding" in path)
    ]
    factors = moved(getkey(), lora.init(getkey(), params, rules))
    lora.save_peft(tmp_path, params, factors, names=names)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    merged = slots_of(lora.merge(params, factors), names)
    changed = 0
    for name, weight in torch.items():
        after = weight_to_torch(merged[name], part(merged[name], merged[name].leaf))
        before = "base_model.model." + name.removesuffix(".weight")
        if f"{before}.lora_A.weight" in tensors:
            a, b = tensors[f"{before}.lora_A.weight"], tensors[f"{before}.lora_B.weight"]
            wanted = weight + 1.5 * b @ a
            if kind is lora.DoRA:
                length = np.linalg.norm(wanted, axis=1, keepdims=True)
                wanted *= tensors[f"{before}.lora_magnitude_vector"][:, None] / length
        elif f"{before}.lora_embedding_A" in tensors:
            a, b = tensors[f"{before}.lora_embedding_A"], tensors[f"{before}.lora_embedding_B"]
            wanted = weight + 1.5 * (b @ a).T
        else:
            np.testing.assert_allclose(after, weight, atol=1e-5)
            continue
        changed += 1
        assert np.abs(wanted - weight).max() > 1e-2
        np.testing.assert_allclose(after, wanted, rtol=1e-4, atol=1e-4)
    assert changed == len(tensors) // (3 if kind is lora.DoRA else 2)
    again = lora.load_peft(tmp_path, params, names=names)
    assert_close(lora.merge(params, again), lora.merge(params, factors))


def test_what_is_trained_whole(case, getkey, tmp_path):
    """Norms and embeddings: PEFT's `modules_to_save` hold them as the converter would."""
    names, params, torch = case
    output = next(path for path, _ in leaves_with_paths(params) if path.endswith("out/kernel"))
    axes = {slot.path: slot.axes for slot in slots_of(params, names).values()}
    rules = [
        lora.LoRA(output, rank=2, alpha=3, axes=axes[output]),
        lora.Full(r".*(norm[^/]*/scale|embedding)"),
    ]
    factors = moved(getkey(), lora.init(getkey(), params, rules))
    lora.save_peft(tmp_path, params, factors, names=names)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    merged = slots_of(lora.merge(params, factors), names)
    whole = [name for name in torch if f"base_model.model.{name}" in tensors]
    assert len(whole) > 4
    for name in whole:
        after = weight_to_torch(merged[name], part(merged[name], merged[name].leaf))
        np.testing.assert_allclose(tensors[f"base_model.model.{name}"], after, atol=1e-5)
        assert np.abs(after - torch[name]).max() > 1e-2
    again = lora.load_peft(tmp_path, params, names=names)
    assert jax.tree.structure(again) == jax.tree.structure(factors)
    assert_close(lora.merge(params, again), lora.merge(params, factors))


def test_layers_that_remain_after_a_scan_want_its_length():
    leaf = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    path = "params/decoder/layers_remainder/layers_1/mlp/wi_0/kernel"
    assert gemma3(5)(path, leaf).name == "model.language_model.layers.31.mlp.gate_proj.weight"
    with pytest.raises(lora.LoraError, match=r"maxtext_names\.gemma3\(blocks\)"):
        gemma3(None)(path, leaf)
