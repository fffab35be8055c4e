"""`lorax-fn merge`: what PyTorch's merge would write, in place of the base's bytes."""

import errno
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
from lorax_fn.cli import merge as merging
from tests.io.peft_cases import EXPERTS, INNER, LAYERS, WIDTH, weight
from tests.io.trees import moved

FIXTURES = Path(__file__).parents[1] / "io" / "peft_fixtures"


def stack_weights():
    shapes = {"up": (INNER, WIDTH), "down": (WIDTH, INNER)}
    return {
        f"blocks.{i}.{own}.{part}": weight(
            f"blocks.{i}.{own}.{part}", shape[: 2 - (part == "bias")]
        )
        for i in range(LAYERS)
        for own, shape in shapes.items()
        for part in ("weight", "bias")
    }


def peft_delta(case, module):
    """s·B·A of a fixture, by hand."""
    tensors = safetensors.numpy.load_file(FIXTURES / case / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
    return 2.5 * b @ a


@pytest.fixture
def folder(tmp_path):
    """A base of three shards, with an index, a config, and the pickle that it once was."""
    base = tmp_path / "base"
    base.mkdir()
    weights = stack_weights()
    weight_map = {}
    for i in range(LAYERS):
        shard = {name: w for name, w in weights.items() if name.startswith(f"blocks.{i}.")}
        name = f"model-{i + 1:05d}-of-00003.safetensors"
        safetensors.numpy.save_file(shard, base / name, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"old weights")
    return base


def read_all(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(path)
    return tensors


def test_shards_are_merged(cli, folder, tmp_path):
    out = tmp_path / "out"
    done = cli("merge", folder, FIXTURES / "stack", "-o", out, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["merged"] == 2 * LAYERS
    assert sorted(p.name for p in out.iterdir()) == sorted(
        p.name for p in folder.iterdir() if p.suffix != ".bin"
    )
    merged = read_all(out)
    for name, before in stack_weights().items():
        if name.endswith("bias"):
            np.testing.assert_array_equal(merged[name], before)
        else:
            wanted = before + peft_delta("stack", name.removesuffix(".weight"))
            np.testing.assert_allclose(merged[name], wanted, atol=1e-5)


def test_in_half_precision_the_sum_is_rounded_once(cli, tmp_path):
    half = {name: w.astype(jnp.bfloat16) for name, w in stack_weights().items()}
    safetensors.numpy.save_file(half, tmp_path / "base.safetensors")
    assert (
        cli("merge", tmp_path / "base.safetensors", FIXTURES / "stack", "-o", tmp_path / "out").code
        == 0
    )
    with safetensors.safe_open(tmp_path / "out", framework="flax") as file:
        for name in file.keys():  # noqa: SIM118 (no dict)
            wanted = np.asarray(half[name], np.float32)
            if name.endswith("weight"):
                wanted = wanted + peft_delta("stack", name.removesuffix(".weight"))
            tensor = file.get_tensor(name)
            assert tensor.dtype == jnp.bfloat16
            # Sums of other orders may fall on the other side of a rounding.
            np.testing.assert_allclose(
                np.asarray(tensor, np.float32), wanted, rtol=2**-8, atol=1e-6
            )


@pytest.mark.parametrize(
    "case",
    [
        "llama",
        "llama-patterns",
        "llama-dora",
        "gpt2",
        "gpt2-dora",
        "qwen2",
        "bert",
        "vit",
        "vit-dora",
    ],
)
def test_every_kind_merges_as_in_memory(cli, tmp_path, case):
    """Against `load_peft` on the same tensors, named by hand."""
    weights = torch_weights(case)
    safetensors.numpy.save_file(weights, tmp_path / "base.safetensors")
    done = cli("merge", tmp_path / "base.safetensors", FIXTURES / case, "-o", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    merged = safetensors.numpy.load_file(tmp_path / "out")
    names = torch_names(case)
    factors = lora.load_peft(FIXTURES / case, weights, names=names)
    wanted = lora.merge(weights, factors)
    touched = 0
    for name, before in weights.items():
        np.testing.assert_allclose(merged[name], wanted[name], atol=1e-6)
        touched += not np.array_equal(merged[name], before)
    assert touched > 1


def torch_weights(case):
    """The weights that an adapter's tensors imply, and a few that it leaves alone."""
    tensors = safetensors.numpy.load_file(FIXTURES / case / "adapter_model.safetensors")
    config = json.loads((FIXTURES / case / "adapter_config.json").read_text())
    weights = {"untouched.weight": weight("untouched.weight", (3, 5))}
    for key, a in tensors.items():
        name = key.removeprefix("base_model.model.")
        if ".lora_A." in name:
            b = tensors[key.replace("lora_A", "lora_B")]
            shape = (b.shape[0], *a.shape[1:])
            if config["fan_in_fan_out"]:
                shape = shape[::-1]
            name = name.replace("lora_A.weight", "weight")
        elif name.endswith("lora_embedding_A"):
            shape = (a.shape[1], tensors[key.replace("embedding_A", "embedding_B")].shape[0])
            name = name.replace("lora_embedding_A", "weight")
        elif "lora_" in name:
            continue
        else:
            name, shape = name.replace(".base_layer", ""), a.shape
        weights[name] = weight(name, shape)
    return weights


def torch_names(case):
    linear = lora.Axes(contract=(1,), out=(0,))

    def names(path, leaf):
        if "embeddings" in path and leaf.ndim == 2:
            return lora.io.Place(path, "embedding", lora.Axes((), (0,), (1,)))
        if leaf.ndim == 1:
            return lora.io.Place(path, "vector")
        if leaf.ndim == 4:
            return lora.io.Place(path, "conv", lora.Axes((), (1, 2, 3), (0,)))
        if case.startswith("gpt2"):
            return lora.io.Place(path, "fan_in_fan_out", lora.Axes((), (0,), (1,)))
        return lora.io.Place(path, "linear", linear)

    return names


def test_experts_merge(cli, tmp_path):
    shapes = {"up_proj": (EXPERTS, INNER, WIDTH), "down_proj": (EXPERTS, WIDTH, INNER)}
    weights = {f"experts.{own}": weight(f"experts.{own}", shape) for own, shape in shapes.items()}
    weights["router.weight"] = weight("router.weight", (EXPERTS, WIDTH))
    safetensors.numpy.save_file(weights, tmp_path / "base.safetensors")
    done = cli("merge", tmp_path / "base.safetensors", FIXTURES / "experts", "-o", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    merged = safetensors.numpy.load_file(tmp_path / "out")
    tensors = safetensors.numpy.load_file(FIXTURES / "experts" / "adapter_model.safetensors")
    for own, prefix, scale, rank in (
        ("up_proj", "experts.base_layer", 5 / 2, 2),
        ("down_proj", "experts", 5 / 3, 3),
    ):
        a, b = (tensors[f"base_model.model.{prefix}.lora_{x}.weight"] for x in "AB")
        a, b = a.reshape(EXPERTS, rank, -1), b.reshape(-1, rank, EXPERTS)
        wanted = weights[f"experts.{own}"] + scale * np.einsum("ore,eri->eoi", b, a)
        np.testing.assert_allclose(merged[f"experts.{own}"], wanted, atol=1e-5)


def test_names_may_lack_the_prefix_of_the_adapters(cli, tmp_path):
    """GPT-2's published weights are those of the model without its head."""
    weights = {name.removeprefix("transformer."): w for name, w in torch_weights("gpt2").items()}
    safetensors.numpy.save_file(weights, tmp_path / "base.safetensors")
    done = cli("merge", tmp_path / "base.safetensors", FIXTURES / "gpt2", "-o", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    merged = safetensors.numpy.load_file(tmp_path / "out")
    delta = peft_delta("gpt2", "transformer.h.1.attn.c_attn").T
    name = "h.1.attn.c_attn.weight"
    np.testing.assert_allclose(merged[name], weights[name] + delta, atol=1e-5)


KINDS = {
    "LoRA": lora.LoRA(["kernel"], rank=3, alpha=2),
    "PiSSA": lora.LoRA(["kernel"], rank=3, alpha=2, init="pissa"),
    "DoRA": lora.DoRA(["kernel"], rank=3, alpha=2),
    "VeRA": lora.VeRA(["kernel"], rank=3),
    "LoHa": lora.LoHa(["kernel"], rank=3, alpha=2),
    "LoKr": lora.LoKr(["kernel"], rank=3, alpha=2),
    "IA3": lora.IA3(["kernel"]),
    "AdaLoRA": lora.AdaLoRA(["kernel"], rank=3, alpha=2),
    "Full": lora.Full(r".*"),
    "TrainableTokens": lora.TrainableTokens(["kernel"], tokens=[3, 1]),
    "DoRA of rows": lora.DoRA(["kernel"], rank=3, alpha=2, axes=lora.Axes((), (1,), (0,))),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("separator", ["/", "."])
def test_our_own_files_merge_in_blocks_of_rows(cli, getkey, tmp_path, monkeypatch, kind, separator):
    monkeypatch.setattr(merging, "BLOCK", 7 * 10 * 4)  # of 24 rows: 7, 7, 7, 3
    params = {"layer": {"kernel": jax.random.normal(getkey(), (24, 10)), "bias": jnp.ones(10)}}
    factors = moved(getkey(), lora.init(getkey(), params, [KINDS[kind]]))
    lora.save(tmp_path / "adapter", factors)
    flat = {f"layer{separator}{own}": np.asarray(w) for own, w in params["layer"].items()}
    safetensors.numpy.save_file(flat, tmp_path / "base")
    done = cli("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    merged = safetensors.numpy.load_file(tmp_path / "out")
    for own, wanted in lora.merge(params, factors)["layer"].items():
        np.testing.assert_allclose(merged[f"layer{separator}{own}"], wanted, atol=2e-5)


def test_a_merge_that_was_cut_off_goes_on(cli, folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write = merging._write
    count = 0

    def fails_at_the_second(*args):
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args)

    monkeypatch.setattr(merging, "_write", fails_at_the_second)
    done = cli("merge", folder, FIXTURES / "stack", "-o", out)
    assert done.code == 1
    assert done.err == "lorax-fn: No space left on device\n"
    left = sorted(p.name for p in out.iterdir())
    assert left == [".lorax-fn-merge.json", "model-00001-of-00003.safetensors"]

    other = cli("merge", folder, FIXTURES / "stack-dora", "-o", out)
    assert (other.code, "unfinished merge of other files" in other.err) == (2, True)

    (out / f".{left[1]}.1234.tmp").write_bytes(b"what a kill leaves")
    first = (out / left[1]).stat().st_mtime_ns
    done = cli("merge", folder, FIXTURES / "stack", "-o", out, "--json")
    assert (done.code, done.json["already_done"]) == (0, 1)
    assert (out / left[1]).stat().st_mtime_ns == first
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    whole = tmp_path / "whole"
    assert cli("merge", folder, FIXTURES / "stack", "-o", whole).code == 0
    for name, tensor in read_all(whole).items():
        np.testing.assert_array_equal(read_all(out)[name], tensor)


def test_a_merge_that_was_killed_before_it_had_a_state_goes_on(cli, folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / f".{merging.STATE}.12345678.tmp").write_text("{")
    assert cli("merge", folder, FIXTURES / "stack", "-o", out).code == 0
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_file_that_is_replaced_needs_room_beside_the_old_one(cli, tmp_path, monkeypatch):
    safetensors.numpy.save_file(stack_weights(), tmp_path / "base")
    (tmp_path / "out").write_bytes(b"old")
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    words = (tmp_path / "base", FIXTURES / "stack", "-o", tmp_path / "out", "--force")
    done = cli("merge", *words)
    assert (done.code, "GiB free" in done.err) == (2, True)
    assert (tmp_path / "out").read_bytes() == b"old"


def test_a_full_disk_is_seen_before_anything_is_written(cli, folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    done = cli("merge", folder, FIXTURES / "stack", "-o", tmp_path / "out")
    assert (done.code, "GiB free" in done.err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_without_help_of_the_kernel_bytes_are_copied_all_the_same(
    cli, folder, tmp_path, monkeypatch
):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    assert cli("merge", folder, FIXTURES / "stack", "-o", tmp_path / "out").code == 0
    np.testing.assert_array_equal(
        read_all(tmp_path / "out")["blocks.1.up.bias"], stack_weights()["blocks.1.up.bias"]
    )


PEAK = """
import sys
from lorax_fn.cli import main
try:
    main()
finally:
    with open("/proc/self/status") as file:
        print(dict(line.split(":", 1) for line in file)["VmHWM"].split()[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells peaks on Linux alone")
def test_memory_does_not_grow_with_the_base(getkey, tmp_path):
    """240 MB in three tensors, merged in less than half of that beyond what a tiny base takes."""
    peaks = []
    for rows in (100, 40_000):
        base = {f"layer{i}/kernel": np.zeros((rows, 500), np.float32) for i in range(3)}
        rules = [lora.LoRA(["kernel"], rank=2, alpha=3)]
        lora.save(tmp_path / "adapter", moved(getkey(), lora.init(getkey(), base, rules)))
        safetensors.numpy.save_file(base, tmp_path / "base")
        words = ["merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / f"out{rows}"]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", PEAK, *map(str, words)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
        peaks.append(int(done.stdout.split()[-1]) * 1024)
    assert (tmp_path / "out40000").stat().st_size > 240_000_000
    assert peaks[1] - peaks[0] < 110_000_000


def test_integers_are_copied(cli, tmp_path):
    weights = stack_weights() | {"steps": np.arange(7), "mask": np.array([True, False])}
    safetensors.numpy.save_file(weights, tmp_path / "base")
    assert cli("merge", tmp_path / "base", FIXTURES / "stack", "-o", tmp_path / "out").code == 0
    merged = safetensors.numpy.load_file(tmp_path / "out")
    np.testing.assert_array_equal(merged["steps"], weights["steps"])
    np.testing.assert_array_equal(merged["mask"], weights["mask"])


def test_what_merge_refuses(cli, folder, tmp_path):
    adapter = FIXTURES / "stack"
    for words, message in (
        ((folder, adapter, "-o", folder), "is the base itself"),
        ((folder, FIXTURES / "llama", "-o", tmp_path / "o"), "no leaf of params is called"),
        ((tmp_path / "none", adapter, "-o", tmp_path / "o"), "cannot be read: No such file"),
        ((tmp_path, adapter, "-o", tmp_path / "o"), "holds no safetensors file"),
        ((folder, folder / "config.json", "-o", tmp_path / "o"), "no safetensors file"),
        ((folder, adapter, "-o", folder / "config.json"), "is a file, the base a folder"),
        ((folder, adapter), "Missing option"),
    ):
        done = cli("merge", *words)
        assert (done.code, message in done.err) == (2, True), done.err
        assert done.err.count("\n") == 1
    assert not (tmp_path / "o").exists()

    index = folder / "model.safetensors.index.json"
    for weight_map, message in (
        ({"x": "../../etc/passwd"}, "wanted a name without path"),
        ({"x": "absent.safetensors"}, "lacks 'absent.safetensors'"),
        (7, "is no index of shards"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        done = cli("merge", folder, adapter, "-o", tmp_path / "o")
        assert (done.code, message in done.err) == (2, True), done.err


def test_a_folder_with_things_in_it_is_left_alone(cli, folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    done = cli("merge", folder, FIXTURES / "stack", "-o", tmp_path / "out")
    assert (done.code, "is not empty" in done.err) == (2, True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
