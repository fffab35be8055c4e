"""`lorax-fn inspect`, `convert`, `diff`; help, exit codes, and extras that are missing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lorax_fn as lora
from lorax_fn.adapters import LoRAFactors
from tests.io.folders import assert_same_folder
from tests.io.trees import assert_same, moved

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "io" / "peft_fixtures"


@pytest.fixture
def adapter(getkey, tmp_path):
    params = {"layer": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
    rules = [lora.LoRA(["kernel"], rank=2, alpha=5), lora.Full(r".*/bias")]
    lora.save(tmp_path / "adapter", moved(getkey(), lora.init(getkey(), params, rules)))
    return tmp_path / "adapter"


def test_inspect_our_own(cli, adapter):
    done = cli("inspect", adapter)
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].split() == ["path", "kind", "rank", "scale", "arrays", "dtype"]
    assert "layer/kernel  LoRA  2     2.5    a[6, 2] b[2, 4]  float32" in lines
    assert lines[-1].startswith("lorax_fn, 2 weights, 24 numbers, ")
    described = cli("inspect", adapter, "--json").json
    assert described["nodes"][1]["settings"]["axes"] == {"batch": [], "contract": [0], "out": [1]}


def test_inspect_peft(cli):
    described = cli("inspect", FIXTURES / "llama-patterns", "--json").json
    nodes = {node["path"]: node for node in described["nodes"]}
    node = nodes["model.layers.1.self_attn.q_proj"]
    assert (node["kind"], node["rank"]) == ("LoRA", 4)
    assert node["arrays"]["lora_A.weight"] == [4, 32]
    np.testing.assert_allclose(node["scale"], 5 / 2)  # rsLoRA: alpha / √4
    assert "whole" in {
        node["kind"] for node in cli("inspect", FIXTURES / "bert", "--json").json["nodes"]
    }


@pytest.mark.parametrize("case", ["llama", "llama-patterns", "gpt2", "vit-lora", "experts"])
def test_convert_there_and_back(cli, tmp_path, case):
    """A plain LoRA needs no base: its tensors tell the shapes of the weights."""
    source = FIXTURES / case
    if case == "vit-lora":  # of convolutions
        weights = {"projection": {"kernel": jnp.ones((4, 4, 3, 8))}}
        rules = [lora.LoRA(["projection"], rank=2, alpha=3, axes=lora.Axes((), (0, 1, 2), (3,)))]
        source = tmp_path / "source"
        lora.save_peft(source, weights, lora.init(jax.random.key(0), weights, rules))
    assert cli("convert", source, tmp_path / "file").code == 0
    done = cli("convert", tmp_path / "file", tmp_path / "folder")
    assert (done.code, done.err) == (0, "")
    assert_same_folder(tmp_path / "folder", source)
    assert cli("diff", source, tmp_path / "folder").code == 0
    assert cli("diff", source, tmp_path / "file").code == 0


def test_convert_with_a_regex_that_is_not_run(cli, tmp_path):
    """Then the tensors alone say what is adapted."""
    source = shutil.copytree(FIXTURES / "llama", tmp_path / "source")
    config = json.loads((source / "adapter_config.json").read_text())
    config["target_modules"] = r".*model.*layers.*proj"
    (source / "adapter_config.json").write_text(json.dumps(config))
    assert cli("convert", source, tmp_path / "file").code == 0
    assert_same(lora.load(tmp_path / "file"), as_file(cli, FIXTURES / "llama", tmp_path / "plain"))


def as_file(cli, folder, path):
    assert cli("convert", folder, path).code == 0
    return lora.load(path)


def test_convert_to_the_names_of_params(cli, getkey, tmp_path):
    """With the base in JAX's layout: the file is what `load` and `load_peft` give."""
    params = {
        "model": {"up_proj": {"kernel": jax.random.normal(getkey(), (6, 4)), "bias": jnp.ones(4)}}
    }
    rules = [lora.DoRA(["up_proj"], rank=2, alpha=3), lora.Full(r".*/bias")]
    factors = moved(getkey(), lora.init(getkey(), params, rules))
    lora.save_peft(tmp_path / "folder", params, factors)
    flat = {f"model/up_proj/{own}": np.asarray(w) for own, w in params["model"]["up_proj"].items()}
    safetensors.numpy.save_file(flat, tmp_path / "base.safetensors")
    base = ("--base", tmp_path / "base.safetensors", "--names", "flax")
    done = cli("convert", tmp_path / "folder", tmp_path / "file", *base)
    assert (done.code, done.err) == (0, "")
    assert_same(lora.load(tmp_path / "file"), lora.load_peft(tmp_path / "folder", params))
    done = cli("convert", tmp_path / "file", tmp_path / "again", *base)
    assert (done.code, done.err) == (0, "")
    assert_same_folder(tmp_path / "again", tmp_path / "folder")


def test_convert_says_when_it_needs_the_base(cli, tmp_path):
    done = cli("convert", FIXTURES / "llama-dora", tmp_path / "file")
    assert (done.code, "give it, by --base" in done.err) == (2, True)
    done = cli("convert", FIXTURES / "llama", tmp_path / "file", "--names", "flax")
    assert (done.code, "--names needs --base" in done.err) == (2, True)
    assert not (tmp_path / "file").exists()


def test_diff(cli, getkey, tmp_path, adapter):
    same = cli("diff", adapter, adapter)
    assert (same.code, same.out) == (0, "The adapters are the same.\n")
    factors = lora.load(adapter)
    factors["layer"]["kernel"] = jax.tree.map(lambda x: x + 0.5, factors["layer"]["kernel"])
    lora.save(tmp_path / "other", factors)
    other = cli("diff", adapter, tmp_path / "other")
    assert other.code == 1
    assert "layer/kernel  values      a ±0.5, b ±0.5" in other.out
    rules = [lora.LoRA(["kernel"], rank=3, alpha=5)]
    params = {"layer": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
    lora.save(tmp_path / "third", lora.init(getkey(), params, rules))
    rows = cli("diff", adapter, tmp_path / "third", "--json").json["differences"]
    assert {row["path"]: row["difference"] for row in rows} == {
        "layer/bias": "only in A",
        "layer/kernel": "settings or shapes",
    }


def test_inspect_asks_for_ranks_of_parameters(cli):
    described = cli("inspect", FIXTURES / "experts", "--json").json
    nodes = {node["path"]: node for node in described["nodes"]}
    up, down = nodes["experts.base_layer"], nodes["experts"]
    assert [(node["rank"], node["scale"]) for node in (up, down)] == [(2, 5 / 2), (3, 5 / 3)]


def test_diff_of_wide_and_narrow_dtypes(cli, tmp_path):
    """Differences below float32's are seen, and so is a dtype alone."""
    for name, value, dtype in (("a", 1, "f8"), ("b", 1 + 1e-12, "f8"), ("c", 1, "f4")):
        axes = lora.Axes(contract=(0,), out=(1,))
        ones = np.full((4, 2), value, dtype), np.full((2, 3), value, dtype)
        node = LoRAFactors(*ones, scale=1.0, axes=axes, dropout=0.0)
        lora.save(tmp_path / name, {"w": node})
    assert cli("diff", tmp_path / "a", tmp_path / "a").code == 0
    done = cli("diff", tmp_path / "a", tmp_path / "b")
    assert (done.code, "a ±1e-12, b ±1e-12" in done.out) == (1, True)
    done = cli("diff", tmp_path / "a", tmp_path / "c")
    assert (done.code, "a ['float64', 'float32']" in done.out) == (1, True)


def test_names_of_files_do_not_speak_to_the_terminal(cli, getkey, tmp_path):
    name = "w\x1b[2J\nfake\x9b"
    rules = [lora.LoRA(r"(?s).*", rank=2, alpha=3)]
    lora.save(tmp_path / "adapter", lora.init(getkey(), {name: jnp.ones((4, 3))}, rules))
    safetensors.numpy.save_file({"v": np.ones((4, 3), "f4")}, tmp_path / "base")
    shown = cli("inspect", tmp_path / "adapter")
    assert "w?[2J?fake?" in shown.out
    failed = cli("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out")
    for text in (shown.out, failed.err, cli("inspect", tmp_path / "adapter", "--json").out):
        assert not any(escape in text for escape in ("\x1b", "\x9b"))


def test_combine_our_own(cli, getkey, tmp_path):
    params = {"layer": {"kernel": jax.random.normal(getkey(), (6, 4)), "bias": jnp.ones(4)}}
    each = [
        moved(getkey(), lora.init(getkey(), params, [lora.LoRA(["kernel"], rank=r, alpha=3)]))
        for r in (1, 2)
    ]
    for name, factors in zip("ab", each, strict=True):
        lora.save(tmp_path / name, factors)
    files = (tmp_path / "a", tmp_path / "b")
    done = cli("combine", *files, "-o", tmp_path / "c", "-w", 0.75, "-w", -2)
    assert (done.code, done.err) == (0, "")
    change = sum(
        w * (lora.merge(params, f)["layer"]["kernel"] - params["layer"]["kernel"])
        for w, f in zip((0.75, -2), each, strict=True)
    )
    merged = lora.merge(params, lora.load(tmp_path / "c"))["layer"]["kernel"]
    np.testing.assert_allclose(merged, params["layer"]["kernel"] + change, atol=1e-5)

    done = cli("combine", *files, "-o", tmp_path / "d", "-w", 1)
    assert (done.code, "1 weights and 2 adapters" in done.err) == (2, True)
    done = cli("combine", *files, "-o", tmp_path / "d", "--method", "ties")
    assert (done.code, "density" in done.err) == (2, True)
    done = cli("combine", *files, FIXTURES / "llama", "-o", tmp_path / "d")
    assert (done.code, "are mixed" in done.err) == (2, True)
    assert not (tmp_path / "d").exists()


def test_combine_folders_of_peft(cli, tmp_path):
    """The mean of an adapter and itself is itself; of ranks that differ, the sum."""
    out = tmp_path / "out"
    case = FIXTURES / "llama-patterns"
    options = ("--method", "svd", "--rank", 4)
    assert cli("combine", case, case, "-o", out, *options).code == 0
    with_base = torch_base(case)
    merged = [
        lora.merge(with_base, lora.load_peft(f, with_base, names="torch")) for f in (case, out)
    ]
    for name, wanted in merged[0].items():
        np.testing.assert_allclose(merged[1][name], wanted, atol=1e-4)


def torch_base(folder):
    """Weights of the shapes that the adapter's tensors tell."""
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix).replace("lora_A.", ""): np.zeros(
            (tensors[name.replace("lora_A", "lora_B")].shape[0], a.shape[1]), np.float32
        )
        for name, a in tensors.items()
        if "lora_A" in name
    }


def test_bad_input_is_one_line_and_exit_code_two(cli, tmp_path):
    (tmp_path / "bad").write_bytes(b"no adapter")
    for words in (
        ("inspect", tmp_path / "bad"),
        ("inspect", tmp_path / "absent"),
        ("inspect", tmp_path),
        ("inspect",),
        ("inspect", tmp_path / "bad", "--nonsense"),
        ("nonsense",),
        ("diff", tmp_path / "bad", FIXTURES / "llama"),
        ("convert", tmp_path / "bad", tmp_path / "out"),
    ):
        done = cli(*words)
        assert (done.code, done.out) == (2, ""), words
        assert done.err.startswith("lorax-fn: ")
        assert done.err.count("\n") == 1


def test_help(cli):
    done = cli("--help")
    assert done.code == 0
    for command in ("inspect", "merge", "convert", "diff", "combine"):
        assert command in done.out
        described = cli(command, "--help")
        assert described.code == 0
        assert "--json" in described.out


def run_script(*words, code="from lorax_fn.cli import main; main()"):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=env)


def test_entry_point(adapter):
    done = run_script("inspect", adapter)
    assert (done.returncode, done.stderr) == (0, "")
    assert "layer/kernel" in done.stdout


def test_a_missing_extra_is_named():
    code = "import sys; sys.modules['typer'] = None; from lorax_fn.cli import main; main()"
    done = run_script("--help", code=code)
    assert done.returncode == 2
    assert done.stderr == (
        "lorax-fn needs the package 'typer', which is not installed: pip install 'lorax-fn[cli]'\n"
    )
