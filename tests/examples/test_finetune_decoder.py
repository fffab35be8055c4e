"""The decoder example on a few modules and steps: the texts, the model, the samples, the files."""

import ast
import json
import types

import finetune_decoder
import jax
import numpy as np
import pytest
from decoder import corpus
from decoder.model import Decoder
from decoder.sample import sample

RANK = 2
MODULES = 60


@pytest.fixture(scope="module")
def texts():
    return corpus.read(MODULES)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("decoder")
    options = {"steps": 2, "pretrain-steps": 2, "batch": 2, "length": 16, "vocabulary": 300}
    options |= {"limit": MODULES, "rank": RANK, "alpha": 6, "lr": 0.1, "out": out}
    results = finetune_decoder.main([f"--{name}={value}" for name, value in options.items()])
    return types.SimpleNamespace(out=out, results=results)


def test_code_has_no_docstring_and_prose_is_all_docstrings(texts):
    modules = [ast.parse(text) for split in texts["code"].values() for text in split]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    documented = [n for m in modules for n in ast.walk(m) if isinstance(n, kinds)]
    assert len(documented) > 200
    assert not any(ast.get_docstring(node) for node in documented)
    assert len(texts["prose"]["train"]) > 50
    assert all(len(text.split()) >= 5 for text in texts["prose"]["train"])


def test_no_text_is_in_both_splits(texts):
    for splits in texts.values():
        assert splits["train"]
        assert splits["test"]
        assert not set(splits["train"]) & {text for text in splits["test"] if len(text) > 200}


def test_every_text_can_be_written_and_read_back():
    tokenizer = corpus.train_tokenizer(["def f(x):\n    return x"], 300)
    for text in ("def f(x):\n    return x", "Straße, 値\t—", " two  spaces"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_windows_are_from_all_over_and_batches_are_stretches():
    tokens = np.arange(100, dtype=np.int32)
    assert corpus.windows(tokens, 10, limit=4)[:, 0].tolist() == [0, 30, 60, 90]
    for batch in corpus.batches(tokens, steps=3, batch=5, length=7, seed=0):
        assert (np.diff(batch, axis=1) == 1).all()
        assert batch.shape == (5, 7)


def test_the_decoder_sees_nothing_of_what_comes():
    net = Decoder(50, width=16, heads=2, longest=8)
    tokens = jax.random.randint(jax.random.key(0), (1, 8), 0, 50)
    params = net.init(jax.random.key(1), tokens)
    logits = net.apply(params, tokens)
    changed = net.apply(params, tokens.at[0, 5].add(1))
    np.testing.assert_array_equal(logits[0, :5], changed[0, :5])
    assert np.abs(logits[0, 5:] - changed[0, 5:]).max() > 1e-3


def test_samples_go_on_from_their_prompts_until_the_separator():
    tokenizer = corpus.train_tokenizer(["abc abc"], 300)
    end, a = (tokenizer.token_to_id(token) for token in (corpus.SEPARATOR, "a"))

    def apply(_, tokens):  # "a" three times, then the end
        last = jax.nn.one_hot(end, 300) * (tokens == a).sum(1)[:, None, None]
        return 1e3 * (2.5 * jax.nn.one_hot(a, 300) + last) + 0.0 * tokens[:, :, None]

    prompts = ["xy", "x"]
    assert sample(apply, None, prompts, tokenizer, length=12, seed=0) == ["xyaaa", "xaaa"]


def test_a_picture_and_the_figures_are_written(run):
    assert {file.name for file in run.out.iterdir()} == {"prose.png", "results.json"}
    assert (run.out / "prose.png").read_bytes().startswith(b"\x89PNG")
    assert (run.out / "results.json").read_text() == json.dumps(run.results, indent=2) + "\n"


def test_lora_adapts_the_stacked_layers_and_the_tied_embedding(run):
    pretrained, adapted, full = run.results["models"]
    layers, width, vocabulary = 3, 128, 300
    inner = layers * RANK * (4 * 2 * width + 2 * 5 * width)
    assert adapted["trained"] == inner + RANK * (vocabulary + width)
    assert full["trained"] == pretrained["trained"] > 600_000
    for each in run.results["models"]:  # two float32 moments, and a step count or two
        assert 0 <= each["optimiser_bytes"] - 8 * each["trained"] <= 16


def test_each_model_is_tested_on_both_kinds_and_sampled(run):
    pretrained, *others = run.results["models"]
    for model in run.results["models"]:
        assert set(model["bits"]) == {"code", "prose"}
        assert all(0 < bits < 20 for bits in model["bits"].values())
        for prompt, text in zip(finetune_decoder.PROMPTS, model["samples"], strict=True):
            assert text.startswith(prompt)
    for model in others:
        assert model["bits"]["prose"] != pretrained["bits"]["prose"]
