"""The whole example on a few examples and steps: every file, and merged = adapted."""

import json
import types

import finetune_minilm
import numpy as np
import pytest
from minilm import weights
from minilm.data import Split
from minilm.training import batches, predict
from safetensors.numpy import load_file

RANK, ALPHA = 2, 6.0
QUERY = "encoder.layer.3.attention.self.query.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The results of a run of two steps with a learning rate that moves the weights visibly."""
    out = tmp_path_factory.mktemp("minilm")
    options = {"limit": 24, "steps": 2, "batch": 8, "length": 8, "lr": 0.01}
    options |= {"rank": RANK, "alpha": ALPHA, "out": out}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    results = finetune_minilm.main([*arguments, "--full"])
    return types.SimpleNamespace(out=out, results=results)


def test_all_files_are_written(run):
    expected = {"curves.png", "factors", "head", "model", "results.json"}
    assert {file.name.removesuffix(".safetensors") for file in run.out.iterdir()} == expected
    assert (run.out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (run.out / "results.json").read_text() == json.dumps(run.results, indent=2) + "\n"


def test_the_merged_model_answers_as_the_adapted_one(run):
    assert 0 <= run.results["difference"] <= finetune_minilm.TOLERANCE


def test_the_merged_file_is_the_published_one_plus_scaled_factors(run):
    original = load_file(weights.model_folder() / "model.safetensors")
    merged, factors = (load_file(run.out / f"{n}.safetensors") for n in ("model", "factors"))
    path = f"params/bert/{QUERY.replace('.', '/').removesuffix('weight')}kernel"
    a, b = factors[f"{path}/a"], factors[f"{path}/b"]
    assert a.shape == (384, RANK)
    change = ALPHA / RANK * (a @ b)  # (in, out)
    assert np.abs(change).max() > 1e-3
    np.testing.assert_allclose(merged[QUERY], original[QUERY] + change.T, rtol=0, atol=1e-6)
    changed = {name for name in original if not np.array_equal(merged[name], original[name])}
    kernels = {n for n in original if n.startswith("encoder") and original[n].ndim == 2}
    assert changed == kernels | {"embeddings.word_embeddings.weight"}


def test_lora_trains_few_parameters_and_keeps_optimiser_state_for_no_others(run):
    frozen, adapted, full = run.results["runs"].values()
    layers, width, mlp, classes, vocabulary = 6, 384, 1536, 26, 30522
    head = (width + 1) * classes
    factors = layers * RANK * (4 * 2 * width + 2 * (width + mlp)) + RANK * (vocabulary + width)
    assert frozen["parameters"] == head
    assert adapted["parameters"] == head + factors
    assert full["parameters"] > 22_000_000
    for each in (frozen, adapted, full):  # two float32 moments, and a step count or two
        assert 0 <= each["optimiser_bytes"] - 8 * each["parameters"] <= 16


def test_each_way_is_measured(run):
    for each in run.results["runs"].values():
        assert 0 <= each["test"] <= 1
        assert all(0 <= value <= 1 for value in each["validation"].values())
        assert np.isfinite(each["losses"]).all()
        assert each["seconds"] > 0


def numbered(count):
    ids = np.arange(count, dtype=np.int32)
    return Split(ids[:, None], np.ones((count, 1), np.int32), ids)


def test_batches_pass_over_the_split_without_repeats():
    labels = [batch.labels for batch in batches(numbered(10), steps=6, batch=3, seed=0)]
    assert all(len(rows) == 3 for rows in labels)
    first, second = np.concatenate(labels[:3]), np.concatenate(labels[3:])
    assert len(set(first)) == len(set(second)) == 9
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("count", [3, 8, 9])
def test_predictions_are_one_an_example_in_order(count):
    split = numbered(count)
    shapes = set()

    def apply(ids, mask):
        shapes.add(ids.shape)
        return ids * 2

    np.testing.assert_array_equal(predict(apply, split, batch=4), split.ids * 2)
    assert shapes == {(4, 1)}  # one shape, so one compilation
