"""What `lorax-fn` writes over, and what it does not."""

import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lorax_fn as lora
from tests.cli.test_commands import FIXTURES, ROOT
from tests.cli.test_merge import stack_weights
from tests.io.trees import moved


@pytest.fixture
def files(getkey, tmp_path):
    """A base, an adapter file of it, and somebody's notes."""
    params = {"layer": {"kernel": jnp.ones((6, 4))}}
    rules = [lora.LoRA(["kernel"], rank=2, alpha=5)]
    lora.save(tmp_path / "adapter", moved(getkey(), lora.init(getkey(), params, rules)))
    safetensors.numpy.save_file({"layer/kernel": np.ones((6, 4), "f4")}, tmp_path / "base")
    (tmp_path / "notes").write_text("mine")
    return tmp_path


def contents(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(cli, folder, *words, message):
    before = contents(folder)
    done = cli(*words)
    assert (done.code, message in done.err) == (2, True), done
    assert contents(folder) == before


def test_merge_replaces_no_file_unasked(cli, files):
    merge = ("merge", files / "base", files / "adapter", "-o")
    refused(cli, files, *merge, files / "notes", message="is there already; wanted another place")
    for force in ((), ("--force",)):
        refused(cli, files, *merge, files / "base", *force, message="is the base itself")
        refused(cli, files, *merge, files / "adapter", *force, message="belongs to the adapter")
    assert cli(*merge, files / "notes", "--force").code == 0
    assert (files / "notes").read_bytes() != b"mine"


def test_merge_writes_nothing_into_the_folder_of_the_adapter(cli, files):
    peft = shutil.copytree(FIXTURES / "stack", files / "peft")
    safetensors.numpy.save_file(stack_weights(), files / "stack")
    for name in ("new", "adapter_model.safetensors"):
        words = ("merge", files / "stack", peft, "-o", peft / name, "--force")
        refused(cli, files, *words, message="belongs to the adapter")


def test_convert_replaces_no_file_unasked(cli, files):
    peft = shutil.copytree(FIXTURES / "llama", files / "peft")
    refused(cli, files, "convert", peft, files / "notes", message="is there already")
    refused(cli, files, "convert", peft, peft / "new", "-f", message="belongs to the adapter")
    refused(cli, files, "convert", files / "adapter", peft, message="is there already")
    words = ("convert", peft, files / "base", "--base", files / "base", "--force")
    refused(cli, files, *words, message="is the base itself")
    assert cli("convert", peft, files / "notes", "--force").code == 0
    assert lora.load(files / "notes")


def test_combine_replaces_no_file_unasked(cli, files):
    peft = shutil.copytree(FIXTURES / "llama", files / "peft")
    combine = ("combine", files / "adapter", files / "adapter", "-o")
    refused(cli, files, *combine, files / "notes", message="is there already")
    refused(cli, files, *combine, files / "adapter", "-f", message="belongs to the adapter")
    refused(cli, files, "combine", peft, peft, "-o", peft, "-f", message="belongs to the adapter")
    assert cli(*combine, files / "notes", "--force").code == 0
    assert lora.load(files / "notes")


def test_float64_survives_a_merge_without_variables(getkey, tmp_path):
    weight = np.full((6, 4), 1 + 1e-12)
    safetensors.numpy.save_file({"layer/kernel": weight}, tmp_path / "base")
    params = {"layer": {"kernel": jnp.ones((6, 4))}}
    lora.save(tmp_path / "adapter", lora.init(getkey(), params, [lora.LoRA(["kernel"], rank=2)]))
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "JAX_ENABLE_X64")}
    words = ["merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out"]
    subprocess.run(
        [sys.executable, "-m", "lorax_fn.cli", *map(str, words)],
        check=True,
        env={**env, "PYTHONPATH": str(ROOT)},
    )
    np.testing.assert_array_equal(
        safetensors.numpy.load_file(tmp_path / "out")["layer/kernel"], weight
    )
