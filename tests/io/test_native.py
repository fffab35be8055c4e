"""`save` and `load`: what goes out comes back, whole or not at all."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax import nnx

import lorax_fn as lora
from lorax_fn.adapters import is_adapter
from lorax_fn.io.nodes import KINDS, SETTINGS
from lorax_fn.paths import leaves_with_paths
from tests.io.trees import RULES, assert_same, factors_of, moved


@pytest.mark.parametrize("name", RULES)
def test_every_kind_comes_back(getkey, tmp_path, name):
    factors = factors_of(getkey(), name)
    lora.save(tmp_path / "f", factors)
    assert_same(lora.load(tmp_path / "f"), factors)


def test_every_kind_has_a_form_in_files():
    """A new kind, or a new setting of one, is to be taught to `nodes.py`."""
    kinds = [c for c in vars(lora.adapters).values() if isinstance(c, type) and hasattr(c, "kind")]
    assert len(kinds) >= 9
    for cls in kinds:
        assert KINDS[cls.kind] is cls
        settings = {f.name for f in dataclasses.fields(cls) if f.metadata.get("static")}
        assert settings <= set(SETTINGS)
    assert {rule.__class__.__name__ for rule in RULES.values()} == set(KINDS)


def test_tree_comes_back_with_its_containers(getkey, tmp_path):
    node = factors_of(getkey(), "LoRA")["w"]
    full = factors_of(getkey(), "Full")["w"]
    tree = {
        "layers": [{"w": node, "b": None}, {"w": None, "b": full}],
        "pair": (node, None),
        "by number": {7: full, 8: None},
        "odd": {"with/slash": node, "": None, "é": full},
        "empty": {},
        "none": [],
    }
    lora.save(tmp_path / "f", tree)
    assert_same(lora.load(tmp_path / "f"), tree)
    for alone in (node, None, {}, [None]):
        lora.save(tmp_path / "f", alone)
        assert_same(lora.load(tmp_path / "f"), alone)


class Layer(eqx.Module):
    weight: jax.Array
    bias: jax.Array


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.second = nnx.Linear(4, 4, rngs=rngs)


def equinox_model():
    return [Layer(jnp.ones((4, 4)), jnp.ones(4)), Layer(jnp.ones((4, 4)), jnp.ones(4))]


@pytest.mark.parametrize(
    ("make", "target", "as_dicts"),
    [
        (equinox_model, ".*/weight", ["dict", "dict"]),
        (lambda: nnx.state(Network(nnx.Rngs(0))), ".*/kernel", None),
    ],
    ids=["equinox", "nnx"],
)
def test_modules_come_back_with_params(getkey, tmp_path, make, target, as_dicts):
    params = make()
    factors = moved(getkey(), lora.init(getkey(), params, [lora.LoRA(target, rank=2, alpha=3)]))
    lora.save(tmp_path / "f", factors)
    assert_same(lora.load(tmp_path / "f", params), factors)
    shapes = jax.eval_shape(lambda: params)
    assert_same(lora.load(tmp_path / "f", shapes), factors)
    plain = lora.load(tmp_path / "f")  # without the model: nested dicts
    assert jax.tree.leaves(plain)[0].shape == jax.tree.leaves(factors)[0].shape
    if as_dicts:
        assert [type(layer).__name__ for layer in plain] == as_dicts
        assert_same(plain[1]["weight"], factors[1].weight)
    else:
        [(_, node), _] = leaves_with_paths(factors, is_leaf=is_adapter)
        assert_same(plain["first"]["kernel"], node)


def test_loaded_factors_compute_the_same(getkey, tmp_path):
    params = {"w": jax.random.normal(getkey(), (12, 10))}
    factors = moved(getkey(), lora.init(getkey(), params, [lora.DoRA("w", rank=2, alpha=3)]))
    lora.save(tmp_path / "f", factors)
    apply = lora.wrap(lambda params, x: x @ params["w"])
    x = jax.random.normal(getkey(), (3, 12))
    np.testing.assert_array_equal(
        apply(params, lora.load(tmp_path / "f"), x), apply(params, factors, x)
    )


def test_file_says_what_it_holds_without_the_library(getkey, tmp_path):
    factors = {"layer": {"w": factors_of(getkey(), "LoRA")["w"], "b": None}}
    lora.save(tmp_path / "f", factors)
    with safetensors.safe_open(tmp_path / "f", framework="np") as file:
        assert set(file.keys()) == {"layer/w:a", "layer/w:b"}
        metadata = file.metadata()
    assert metadata["version"] == "1"
    content = json.loads(metadata["content"])
    assert content["nodes"]["layer/w"] == {
        "kind": "LoRA",
        "settings": {
            "scale": 1.75,
            "axes": {"batch": [], "contract": [0], "out": [1]},
            "dropout": 0.25,
            "freeze_a": False,
        },
    }


def test_float64_of_numpy_comes_back(tmp_path):
    factors = {"w": lora.adapters.FullDelta(np.array([1 / 3, 2.0]))}
    lora.save(tmp_path / "f", factors)
    assert lora.load(tmp_path / "f")["w"].delta.dtype == np.float64
    assert_same(lora.load(tmp_path / "f"), factors)


REFUSED = {
    "an array": ({"w": np.ones(3)}, "holds? a ndarray at 'w'"),
    "NaN": ({"w": lora.adapters.FullDelta(jnp.array([jnp.nan]))}, "'w:delta' holds a NaN"),
    "complex": ({"w": lora.adapters.FullDelta(jnp.ones(2, jnp.complex64))}, "dtype complex64"),
    "shapes": (
        {"w": lora.adapters.FullDelta(jax.ShapeDtypeStruct((3,), jnp.float32))},
        "ShapeDtypeStruct; wanted an array",
    ),
    "one path twice": (
        {"a/b": lora.adapters.FullDelta(jnp.ones(2)), "a": {"b": lora.adapters.FullDelta(jnp.ones(2))}},
        "two nodes have the path 'a/b'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_save_refuses(tmp_path, case):
    factors, message = REFUSED[case]
    with pytest.raises(lora.LoraError, match=message):
        lora.save(tmp_path / "f", factors)
    assert not list(tmp_path.iterdir())


def test_save_refuses_stacked_and_traced_factors(getkey, tmp_path):
    factors = factors_of(getkey(), "LoRA")
    with pytest.raises(lora.StructureError, match=r"at 'w'.*lora\.take"):
        lora.save(tmp_path / "f", lora.stack([factors, factors]))
    with pytest.raises(lora.LoraError, match="outside of jax"):
        jax.jit(lambda f: lora.save(tmp_path / "f", f))(factors)
    assert not list(tmp_path.iterdir())


def test_load_names_what_does_not_fit_params(getkey, tmp_path):
    lora.save(tmp_path / "f", factors_of(getkey(), "LoRA"))
    with pytest.raises(lora.AdapterFileError, match="adapt 'w', where params have no leaf"):
        lora.load(tmp_path / "f", {"v": jnp.ones((12, 10))})
    with pytest.raises(lora.AdapterFileError, match=r"factors at 'w'.*\[12, 11\]"):
        lora.load(tmp_path / "f", {"w": jnp.ones((12, 11))})


def test_load_says_what_is_wrong_with_the_path(tmp_path):
    with pytest.raises(lora.AdapterFileError, match="absent cannot be read: No such file"):
        lora.load(tmp_path / "absent")
    with pytest.raises(lora.AdapterFileError, match="cannot be read: Is a directory"):
        lora.load(tmp_path)
    safetensors.numpy.save_file({"w": np.ones(3)}, tmp_path / "other")
    with pytest.raises(lora.AdapterFileError, match=r"no file of lora\.save.*load_peft"):
        lora.load(tmp_path / "other")


def test_a_disk_that_fills_up_leaves_the_old_file(getkey, tmp_path, monkeypatch):
    old = factors_of(getkey(), "LoRA")
    lora.save(tmp_path / "f", old)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        lora.save(tmp_path / "f", factors_of(getkey(), "LoRA"))
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert_same(lora.load(tmp_path / "f"), old)


WRITER = """
import sys
import jax.numpy as jnp, lorax_fn as lora
from lorax_fn.adapters import FullDelta
print("ready", flush=True)
for i in range(10**6):
    lora.save(sys.argv[1], {"w": FullDelta(jnp.full(2_000_000, float(i)))})
"""


def test_a_kill_while_writing_leaves_a_whole_file(tmp_path):
    """Killed again and again in the midst of writing 8 MB, the file is one that was written."""
    path, root = tmp_path / "f", Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    lora.save(path, {"w": lora.adapters.FullDelta(jnp.full(2_000_000, -1.0))})
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], env=env, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob(".f.*.tmp")) and time.monotonic() < deadline:
            time.sleep(0.001)
        writer.send_signal(signal.SIGKILL)
    delta = lora.load(path)["w"].delta
    assert bool((delta == delta[0]).all())


def test_a_missing_folder_is_the_systems_error(getkey, tmp_path):
    factors = factors_of(getkey(), "Full")
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: .*/absent'"):
        lora.save(tmp_path / "absent" / "f", factors)


def test_a_symlink_stays_one(getkey, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "f")
    factors = factors_of(getkey(), "LoRA")
    lora.save(tmp_path / "link", factors)
    assert (tmp_path / "link").is_symlink()
    assert_same(lora.load(tmp_path / "real" / "f"), factors)


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "PiSSA", "LoKr", "TrainableTokens"])
def test_orbax_round_trip_with_metadata(getkey, tmp_path, name):
    """Factors are a pytree: orbax keeps the arrays, their structure says the rest."""
    factors = factors_of(getkey(), name)
    args = {"factors": ocp.args.StandardSave(factors), "run": ocp.args.JsonSave({"step": 7})}
    with ocp.CheckpointManager(tmp_path, item_names=("factors", "run")) as manager:
        manager.save(7, args=ocp.args.Composite(**args))
        manager.wait_until_finished()
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), factors
        )
        restore = ocp.args.Composite(
            factors=ocp.args.StandardRestore(shapes), run=ocp.args.JsonRestore()
        )
        restored = manager.restore(7, args=restore)
        metadata = manager.item_metadata(7).factors
    assert restored.run == {"step": 7}
    assert_same(restored.factors, factors)
    stored = sorted(str(m.shape) for m in jax.tree.leaves(metadata))
    assert stored == sorted(str(x.shape) for x in jax.tree.leaves(factors))
