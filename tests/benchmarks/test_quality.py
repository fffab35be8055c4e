"""The comparison of ranks and alphas, on a toy of its task that a few steps learn."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from benchmarks import quality
from benchmarks.quality import QUERY_VALUE, Problem, Setting

WIDTH = 32
SETTINGS = (
    Setting(2, 4.0),
    Setting(16, 32.0),
    Setting(8, 4.0),
    Setting(8, 16.0, QUERY_VALUE),
    Setting(None, 0.0),
)


class Toy(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.tanh(nn.Dense(WIDTH, name="up")(nn.Dense(WIDTH, name="query")(x)))

        pooled = (Layer(name="5")(x) * mask[..., None]).mean(1)
        return nn.Dense(3, name="classifier")(pooled)


@pytest.fixture
def problem(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((96, 4, WIDTH)).astype(np.float32)
    labels = x.mean(1)[:, :3].argmax(-1).astype(np.int32)
    split = quality.Split(x, np.ones((96, 4), np.float32), labels)
    model = Toy()
    variables = model.init(jax.random.key(0), x[:1], split.mask[:1])
    toy = Problem(model, variables, dict.fromkeys(("train", "validation", "test"), split))
    monkeypatch.setattr(quality, "prepare", lambda layers, limit: toy)
    monkeypatch.setattr(quality, "SETTINGS", SETTINGS)
    return toy


def test_every_setting_has_a_row_and_a_place_in_the_picture(problem, tmp_path, capsys):
    files = {name: tmp_path / name for name in ("out.json", "out.png")}
    quality.main([*["--steps", "4", "--seeds", "2", "--json"], str(files["out.json"]),
                  "--picture", str(files["out.png"])])  # fmt: skip
    rows = json.loads(files["out.json"].read_text())["rows"]
    assert set(rows) == {setting.name for setting in SETTINGS}
    for row in rows.values():
        assert len(row["test"]) == len(row["validation"]) == 2
    assert rows["full fine-tuning"]["trained"] == 2 * (WIDTH * WIDTH + WIDTH)
    assert rows["rank 2, alpha 4, every kernel"]["trained"] == 2 * 2 * (WIDTH + WIDTH)
    assert rows["rank 8, alpha 16, q, v"]["trained"] == 8 * (WIDTH + WIDTH)
    assert files["out.png"].read_bytes().startswith(b"\x89PNG")
    assert "full fine-tuning" in capsys.readouterr().out


def test_an_adapter_goes_its_own_way_beside_others(problem):
    """A stack of settings, ranks padded and scales traced, trains each as it would be alone."""
    options = quality.parse(["--steps", "5", "--seeds", "2"])
    settings = [Setting(2, 8.0), Setting(8, 4.0)]
    both = quality.train(problem, settings, options)
    alone = quality.train(problem, settings[:1], options)
    assert both[settings[0]]["test"] == pytest.approx(alone[settings[0]]["test"], abs=0.011)
    assert both[settings[0]]["trained"] == alone[settings[0]]["trained"]


def test_the_scale_is_that_of_alpha(problem):
    setting = Setting(4, 6.0)
    factors = problem.factors(setting, seed=0)
    node = factors["params"]["5"]["query"]["kernel"]
    ones = jax.tree.map(lambda leaf: 0 * leaf + 1, factors)
    scaled = quality.scaled(ones, setting.scale)["params"]["5"]["query"]["kernel"]
    assert node.scale == 1.0
    np.testing.assert_array_equal(scaled.b, 1.5)
    np.testing.assert_array_equal(scaled.a, 1.0)
