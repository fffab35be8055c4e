"""The comparison of ranks and alphas, on a toy that a few steps learn."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest

import lorax_fn as lora
from benchmarks import quality
from benchmarks.minilm_task import encoder
from benchmarks.quality import FEW, FULL, SMALL, Setting
from benchmarks.quality_tasks import Beginning, Ending, Examples, Small, Task

WIDTH = 32


class Toy(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(WIDTH, name="up")(nn.Dense(WIDTH, name="query")(x)))
        return nn.Dense(3, name="head")(x)


@pytest.fixture
def task(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((96, WIDTH)).astype(np.float32)
    labels = x[:, :3].argmax(-1).astype(np.int32)
    model = Toy()

    def train(steps, seed):
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            rows = rng.integers(0, 96, 32)
            yield Examples((x[rows],), labels[rows])

    params = model.init(jax.random.key(0), x[:1])
    toy = Task(
        apply=model.apply, params=params, train=train, test=Examples((x,), labels),
        kernels=r".*/(up|query)/kernel", few=(r".*/query/kernel", "query alone"),
        head=lora.Full(r".*/head/.*"), frozen=r".*/up/bias", lr=0.02, full_lr=0.02,
        ranks=(2, 16), at_once=3, small=Small(
            (lora.LoRA(r".*/up/kernel", rank=3, alpha=7.0), lora.Full(r".*/query/bias")),
            "rank 3 and a bias", lr=0.01, b_ratio=4.0,
        ), kept=lambda merged: float(merged["params"]["up"]["bias"].sum() == 0),
    )  # fmt: skip
    monkeypatch.setitem(quality.TASKS, "digits", lambda options: toy)
    monkeypatch.setattr(quality, "ALPHAS", (4.0,))
    return toy


def test_every_setting_has_a_row_and_the_sweeps_a_picture(task, tmp_path, capsys):
    file, picture = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--steps", "20", "--seeds", "2", "--json", str(file), "--picture", str(picture)]
    quality.main(arguments)
    rows = json.loads(file.read_text())["rows"]
    assert list(rows) == [
        "rank 2, alpha 4, every kernel",
        "rank 16, alpha 32, every kernel",
        "rank 8, alpha 4, every kernel",
        "rank 8, alpha 16, query alone",
        "rank 3 and a bias",
        "full fine-tuning",
    ]
    head = 3 * WIDTH + 3
    trained = [row["trained"] - head for row in rows.values()]
    pair = 2 * WIDTH
    small, full = 3 * pair + WIDTH, 2 * WIDTH * WIDTH + WIDTH
    assert trained == [4 * pair, 32 * pair, 16 * pair, 8 * pair, small, full]
    for row in rows.values():
        assert len(row["test"]) == 2
        assert row["kept"] == [1.0, 1.0]  # what is frozen is as it was
        assert min(row["test"]) > 0.5  # of three classes
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "full fine-tuning" in capsys.readouterr().out


def test_an_adapter_goes_its_own_way_beside_others(task):
    """A stack of settings, ranks padded and scales traced, trains each as it would be alone."""
    options = quality.parse(["--steps", "8", "--seeds", "2"])
    settings = [Setting(2, 8.0), Setting(8, 4.0)]
    both = quality.train(task, settings, options)
    alone = quality.train(task, settings[:1], options)
    assert both[settings[0]]["test"] == pytest.approx(alone[settings[0]]["test"], abs=0.011)


def test_the_scale_is_that_of_alpha(task):
    setting = Setting(4, 6.0)
    ones = jax.tree.map(lambda leaf: 0 * leaf + 1, quality.factors_of(task, setting, seed=0))
    scaled = quality.scaled(ones, setting.scale)["params"]
    assert scaled["up"]["kernel"].scale == 1.0
    np.testing.assert_array_equal(scaled["up"]["kernel"].b, 1.5)
    np.testing.assert_array_equal(scaled["up"]["kernel"].a, 1.0)
    np.testing.assert_array_equal(scaled["head"]["kernel"].delta, 1.0)
    assert len({FEW.group, SMALL.group, FULL.group, setting.group}) == 4
    own = quality.scaled(quality.factors_of(task, SMALL, seed=0), SMALL.scale)["params"]
    assert own["up"]["kernel"].scale == 7 / 3


def test_the_encoder_cut_in_two_is_the_encoder(monkeypatch):
    config = encoder.Config(
        vocab_size=30, max_positions=8, width=8, layers=3, heads=2, mlp_width=16
    )
    monkeypatch.setattr("benchmarks.quality_tasks.CONFIG", config)
    ids, mask = np.arange(16).reshape(2, 8), np.array([[1] * 8, [1] * 5 + [0] * 3])
    whole = encoder.Classifier(5, config)
    params = whole.init(jax.random.key(0), ids, mask)["params"]
    layers = params["bert"]["encoder"]["layer"]
    begin = {"embeddings": params["bert"]["embeddings"], "0": layers["0"]}
    end = {"1": layers["1"], "2": layers["2"], "classifier": params["classifier"]}
    hidden = Beginning(2).apply({"params": begin}, ids, mask)
    logits = Ending(2, 5).apply({"params": end}, hidden, mask)
    np.testing.assert_allclose(logits, whole.apply({"params": params}, ids, mask), atol=1e-5)
