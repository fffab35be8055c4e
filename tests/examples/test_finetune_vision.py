"""The digits example on a few images and steps: what is trained, what is kept, what is written."""

import json
import types

import finetune_vision
import numpy as np
import pytest
from digits import data

WIDTH, RANK = 32, 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("vision")
    options = {"steps": 2, "pretrain-steps": 12, "batch": 8, "shots": 4, "rank": RANK, "lr": 0.05}
    arguments = [f"--{name}={value}" for name, value in (options | {"out": out}).items()]
    return types.SimpleNamespace(out=out, results=finetune_vision.main(arguments))


def test_a_picture_and_the_figures_are_written(run):
    assert {file.name for file in run.out.iterdir()} == {"digits.png", "results.json"}
    assert (run.out / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert (run.out / "results.json").read_text() == json.dumps(run.results, indent=2) + "\n"


def test_each_way_trains_what_it_says(run):
    head = 4 * WIDTH * 5 + 5
    fan_ins_and_outs = [(9, 32)]  # the stem
    fan_ins_and_outs += [(9 * 32, 32)] * 2
    fan_ins_and_outs += [(32, 64), (9 * 32, 64), (9 * 64, 64)]
    fan_ins_and_outs += [(64, 128), (9 * 64, 128), (9 * 128, 128)]
    factors = sum(RANK * (fan_in + fan_out) for fan_in, fan_out in fan_ins_and_outs)
    kernels = sum(fan_in * fan_out for fan_in, fan_out in fan_ins_and_outs)
    norms = 2 * (32 + 32 + 32 + 64 + 64 + 128 + 128)
    trained = [way["trained"] for way in run.results["runs"].values()]
    assert trained == [head, head + factors, head + kernels + norms]


def test_a_head_alone_forgets_nothing_and_the_others_move(run):
    linear, *others = run.results["runs"].values()
    assert linear["old"] == run.results["pretrained"]
    assert len({old for _, old in linear["curve"].values()}) == 1
    for way in others:
        assert len({*way["curve"].values()}) > 1


def test_halves_and_splits_are_apart_and_complete():
    halves = data.load()
    assert sum(len(split) for splits in halves.values() for split in splits.values()) == 1797
    everything = np.concatenate([s.images for splits in halves.values() for s in splits.values()])
    assert len(np.unique(everything, axis=0)) == len(everything)
    assert everything.min() == -1
    assert everything.max() == 1
    few = data.load(shots=3)["new"]["train"]
    assert np.bincount(few.labels).tolist() == [3] * 5


def test_batches_hold_each_image_moved_by_a_pixel_at_most():
    images = np.full((4, 8, 8, 1), -1, np.float32)
    images[np.arange(4), 4, 4, 0] = 1
    split = data.Split(images, np.arange(4, dtype=np.int32))
    for batch in data.batches(split, steps=3, batch=8, seed=0):
        assert np.bincount(batch.labels).tolist() == [2] * 4
        _, rows, columns, _ = np.nonzero(batch.images == 1)
        assert len(rows) == 8
        assert set(rows) | set(columns) <= {3, 4, 5}
        assert len(set(zip(rows, columns, strict=True))) > 1
