"""The namings of MaxText's models, against what MaxText's own converter made of the same weights."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorax_fn as lora
from lorax_fn.io import Place
from lorax_fn.io.layouts import weight_from_torch, weight_to_torch
from lorax_fn.io.maxtext_names import FAMILIES
from lorax_fn.io.names import slots_of
from lorax_fn.paths import leaves_with_paths
from tests.io.trees import moved

ARRAYS = load_file(Path(__file__).with_name("maxtext.safetensors"))
CASES = sorted({tuple(key.split("|")[:2]) for key in ARRAYS if "|torch|" not in key})


@pytest.fixture(params=CASES, ids=", ".join)
def case(request):
    """The model's naming, its params, and its weights in PyTorch's layout."""
    return request.param[0].partition(" ")[0], *tree_of(*request.param)


def tree_of(naming, structure):
    """The params of a model, and its weights in PyTorch's layout."""
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
    return tree, torch


def parameter(slot):
    """Of the PyTorch model, from the leaf."""
    return weight_to_torch(slot, slot.part(np.asarray(slot.leaf)))


def assert_close(got, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, wanted)


def test_weights_are_those_of_the_converter(case):
    names, params, torch = case
    slots = slots_of(params, names)
    assert set(slots) == set(torch)
    assert {slot.path for slot in slots.values()} == {path for path, _ in leaves_with_paths(params)}
    for name, weight in torch.items():
        slot = slots[name]
        np.testing.assert_allclose(parameter(slot), weight, atol=1e-6)
        back = weight_from_torch(slot, weight)
        np.testing.assert_allclose(back, slot.part(np.asarray(slot.leaf)), atol=1e-6)


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
        after = parameter(merged[name])
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
        after = parameter(merged[name])
        np.testing.assert_allclose(tensors[f"base_model.model.{name}"], after, atol=1e-5)
        assert np.abs(after - torch[name]).max() > 1e-2
    again = lora.load_peft(tmp_path, params, names=names)
    assert jax.tree.structure(again) == jax.tree.structure(factors)
    assert_close(lora.merge(params, again), lora.merge(params, factors))


@pytest.mark.parametrize("naming", ["maxtext_llama", "maxtext_gemma3"])
def test_in_half_precision_no_value_is_rounded_twice(naming, getkey, tmp_path):
    """Two products that cancel (PiSSA) still do when B is scaled; and norms keep their digits."""
    params, _ = tree_of(naming, "unrolled")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    axes = {slot.path: slot.axes for slot in slots_of(params, naming).values()}
    query = next(path for path, _ in leaves_with_paths(params) if path.endswith("query/kernel"))
    pissa = {"rank": 3, "alpha": 4, "init": "pissa", "dtype": jnp.bfloat16}
    rules = [lora.LoRA(query, **pissa, axes=axes[query]), lora.Full(r".*norm/scale")]
    factors = lora.init(getkey(), params, rules)
    factors = jax.tree.map(lambda x: x + jnp.asarray(0.01, x.dtype), factors)
    lora.save_peft(tmp_path, params, factors, names=naming)
    again = lora.load_peft(tmp_path, params, names=naming)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    changes = [jax.tree.map(np.subtract, lora.merge(wide, each), wide) for each in (again, factors)]
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(changes[1]))
    jax.tree.map(
        lambda got, wanted: np.testing.assert_allclose(got, wanted, atol=2e-3 * largest), *changes
    )


def test_a_base_stored_beside_its_lora_is_known(getkey, tmp_path):
    """PEFT stores embeddings that it adapts; a base that differs in a small entry is refused."""
    params, torch = tree_of("maxtext_gemma3", "unrolled")
    rules = [lora.LoRA(r".*/embedding", rank=2, alpha=3)]
    factors = moved(getkey(), lora.init(getkey(), params, rules))
    lora.save_peft(tmp_path, params, factors, names="maxtext_gemma3")
    file = tmp_path / "adapter_model.safetensors"
    name = "model.language_model.embed_tokens"
    stored = {f"base_model.model.{name}.base_layer.weight": torch[f"{name}.weight"].copy()}
    save_file(load_file(file) | stored, file, {"format": "pt"})
    assert_close(lora.load_peft(tmp_path, params, names="maxtext_gemma3"), factors)
    (weight,) = stored.values()
    weight[np.unravel_index(np.abs(weight).argmin(), weight.shape)] *= 1.01
    save_file(load_file(file) | stored, file, {"format": "pt"})
    with pytest.raises(lora.AdapterFileError, match="another base"):
        lora.load_peft(tmp_path, params, names="maxtext_gemma3")


def test_layers_that_remain_after_a_scan_are_counted_on_from_it():
    gemma3, leaf = FAMILIES["maxtext_gemma3"], jax.ShapeDtypeStruct((4, 3), jnp.float32)
    path = "params/decoder/layers_remainder/layers_1/mlp/wi_0/kernel"
    with pytest.raises(lora.LoraError, match=r"layers_remainder/layers_1.*wanted the whole tree"):
        gemma3(path, leaf)
    scanned = jax.ShapeDtypeStruct((4, 5, 3), jnp.float32)
    gemma3 = gemma3.fitted({"params/decoder/layers/layers_2/mlp/wi_0/kernel": scanned})
    assert gemma3(path, leaf).name == "model.language_model.layers.31.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("naming", "layer"),
    [
        ("maxtext_gemma3", "layers_remainder"),
        ("maxtext_gemma3", "layers_3/layers_1"),
        ("maxtext_gemma3", "layers/layers_6"),
        ("maxtext", "layers/layers_1"),
        ("maxtext", "layers_remainder/layers_1"),
    ],
)
def test_layers_that_the_family_does_not_have(naming, layer):
    leaf = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    assert FAMILIES[naming](f"decoder/{layer}/mlp/wi_0/kernel", leaf) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.0}, "scale=0.0"),
        ({"scale": -1.0}, "scale=-1.0"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"shift": 1.0}, "shift=1.0 of a Place of layout 'linear'"),
    ],
)
def test_a_place_wants_a_scale_above_zero_and_shifts_vectors_alone(settings, message):
    with pytest.raises(lora.LoraError, match=message):
        Place("a.weight", **settings)


def test_an_odd_number_of_outputs_is_not_interleaved(tmp_path):
    params = {"w": jnp.ones((4, 3))}
    factors = lora.init(jax.random.key(0), params, [lora.LoRA("w", rank=1)])
    with pytest.raises(lora.LoraError, match=r"'w'.*even number"):
        lora.save_peft(tmp_path, params, factors, names={"w": Place("a.weight", interleaved=True)})
