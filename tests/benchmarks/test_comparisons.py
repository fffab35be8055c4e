"""The comparisons on the MiniLM task, run on a toy of the same form."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kinds, optimizers
from benchmarks.minilm_task import Split, Task


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(16, name="dense")(x))


class Toy(nn.Module):
    def setup(self):
        self.bert = Bert()
        self.classifier = nn.Dense(5)

    def __call__(self, ids, mask):
        return self.classifier(self.bert(ids, mask))


class Bert(nn.Module):
    @nn.compact
    def __call__(self, ids, mask):
        x = nn.Embed(600, 16, name="word_embeddings")(ids)
        return (Layers(name="encoder")(x) * mask[..., None]).mean(1)


@pytest.fixture
def task(monkeypatch):
    """A task that a few steps learn: the label is the first token's."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 600, (96, 8)).astype(np.int32)
    split = Split(ids, np.ones((96, 8), np.float32), (ids[:, 0] % 5).astype(np.int32))
    model = Toy()
    variables = model.init(jax.random.key(0), ids[:1], split.mask[:1])
    toy = Task(model, variables, {"train": split, "validation": split, "test": split})
    for module in (kinds, optimizers):
        monkeypatch.setattr(module, "load", lambda limit: toy)
    return toy


def test_every_kind_has_a_row_of_figures(task, tmp_path, capsys):
    names = ["LoRA", "EVA", "LoRA-GA", "AdaLoRA", "tokens", "bias"]
    path = tmp_path / "kinds.json"
    kinds.main(
        ["--kinds", *names, *["--steps", "6", "--seeds", "2", "--rounds", "1", "--json"], str(path)]
    )
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == names
    assert rows["LoRA"]["trained"] == 8 * (16 + 16)
    assert rows["bias"]["trained"] == 16
    assert rows["LoRA"]["step_ratio"] == 1.0
    for row in rows.values():
        assert len(row["test"]) == len(row["validation"]) == 2
        assert row["memory"] > 0
    assert "\ntokens " in capsys.readouterr().out


def test_the_costs_alone(task, capsys):
    kinds.main(["--kinds", "IA3", "--seeds", "0", "--rounds", "1"])
    assert "\nIA3 " in capsys.readouterr().out


def test_adalora_ends_with_its_budget(task):
    run = kinds.train(task, "AdaLoRA", steps=12, seed=0, lr=None)
    node = run.trained["params"]["bert"]["encoder"]["dense"]["kernel"]
    assert int((node.e != 0).sum()) == 8


def test_methods_are_compared_at_the_loss_that_lora_reaches(task, tmp_path, capsys):
    path = tmp_path / "curves.json"
    optimizers.main([*["--steps", "5", "--seeds", "1", "--json"], str(path)])
    report = json.loads(path.read_text())
    finals = [curve[-1] for curve in report["curves"]["LoRA"].values()]
    assert report["target"] == min(finals)
    assert set(report["curves"]) == {"LoRA", "LoRA+", "preconditioned"}
    assert "steps until the loss is" in capsys.readouterr().out


def test_steps_are_counted_from_one():
    assert optimizers.steps_to(0.5, np.array([1.0, 0.5, 0.4])) == 2
    assert optimizers.steps_to(0.3, np.array([1.0, 0.5, 0.4])) is None
    np.testing.assert_allclose(optimizers.smooth([1.0, 0.0]), [1.0, 0.9])
