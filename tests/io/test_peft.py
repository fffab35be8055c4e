"""`save_peft` and `load_peft` on PEFT's own folders and on ours; what they refuse."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lorax_fn as lora
from lorax_fn.io import Place
from lorax_fn.io.peft_config import PeftConfig
from tests.io import jax_models
from tests.io.folders import assert_same_folder
from tests.io.trees import assert_same, moved

FIXTURES = Path(__file__).with_name("peft_fixtures")
OUTPUTS = np.load(FIXTURES / "outputs.npz")
OWN = {
    "experts": lambda: jax_models.experts(transposed=False),
    "experts-transposed": lambda: jax_models.experts(transposed=True),
    "stack": jax_models.stack,
    "stack-dora": jax_models.stack,
}


def loaded(case):
    model = OWN[case]()
    axes = jax_models.axes_of(model) if model.axes else None
    return model, axes, lora.load_peft(FIXTURES / case, model.params, names=model.names, axes=axes)


@pytest.mark.parametrize("case", OWN)
def test_experts_and_stacks_answer_as_pytorch_does(tmp_path, case):
    model, _, factors = loaded(case)
    np.testing.assert_allclose(
        jax_models.answer(model, factors), OUTPUTS[case], rtol=1e-4, atol=1e-4
    )
    lora.save_peft(tmp_path, model.params, factors, names=model.names)
    assert_same_folder(tmp_path, FIXTURES / case)


def test_experts_whose_a_faces_the_outputs(getkey, tmp_path):
    """PEFT's A lies along the last dim of a parameter whose module has no `is_transposed`."""
    model = OWN["experts"]()
    rules = [lora.LoRA(r"experts/up_proj", rank=2, alpha=3)]
    factors = lora.init(getkey(), model.params, rules, axes=jax_models.axes_of(model))
    factors = moved(getkey(), factors)
    names = {r"experts/up_proj": Place("experts.up_proj", "experts", swapped=True)}
    lora.save_peft(tmp_path, model.params, factors, names=names)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    e, d, k = model.params["experts"]["up_proj"].shape
    first = tensors["base_model.model.experts.lora_A.weight"].reshape(e, 2, k)
    second = tensors["base_model.model.experts.lora_B.weight"].reshape(d, 2, e)
    node = factors["experts"]["up_proj"]
    wanted = np.einsum("edr,erk->edk", node.a, node.b)
    np.testing.assert_allclose(np.einsum("dre,erk->edk", second, first), wanted, rtol=1e-5)
    axes = jax_models.axes_of(model)
    again = lora.load_peft(tmp_path, model.params, names=names, axes=axes)
    assert_same(again["experts"]["up_proj"], node)


@pytest.fixture
def params(getkey):
    """Flax names: an embedding, a convolution, two layers with a norm and a head."""
    shapes = {
        "embed": {"embedding": (20, 8)},
        "patch": {"kernel": (3, 3, 4, 8), "bias": (8,)},
        "layer": {
            str(i): {"up": {"kernel": (8, 6), "bias": (6,)}, "norm": {"scale": (8,), "bias": (8,)}}
            for i in range(2)
        },
        "head": {"kernel": (8, 5), "bias": (5,)},
    }
    return {
        "params": jax.tree.map(
            lambda shape: jax.random.normal(getkey(), shape),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )
    }


CONV = lora.Axes(contract=(0, 1, 2), out=(3,))
RULES = {
    "LoRA": [lora.LoRA(["up", "embed"], rank=2, alpha=3)],
    "ranks": [lora.LoRA(["layer/0/up"], rank=3, alpha=1), lora.LoRA(["up"], rank=2, alpha=5)],
    "conv": [lora.LoRA(["patch"], rank=2, alpha=3, axes=CONV)],
    "DoRA": [
        lora.DoRA(["patch"], rank=2, alpha=3, axes=CONV),
        lora.DoRA(["up", "embed"], rank=3, alpha=2),
    ],
    "rsLoRA": [lora.LoRA(["up"], rank=4, alpha=3, rslora=True, dropout=0.25)],
    "Full": [
        lora.LoRA(["up"], rank=2, alpha=3),
        lora.Full(r".*/(head|norm)/.*"),
        lora.Full(r".*/up/bias"),
    ],
}


def made(getkey, params, name):
    return moved(getkey(), lora.init(getkey(), params, RULES[name]))


@pytest.mark.parametrize("name", RULES)
def test_round_trip(getkey, tmp_path, params, name):
    """What PEFT itself says to such folders: `check_peft_loads.py`."""
    factors = made(getkey, params, name)
    lora.save_peft(tmp_path, params, factors, base_model="some/model")
    again = lora.load_peft(tmp_path, params)
    merged, wanted = lora.merge(params, again), lora.merge(params, factors)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), merged, wanted)
    assert jax.tree.structure(again, is_leaf=lambda x: x is None).num_leaves == (
        jax.tree.structure(factors, is_leaf=lambda x: x is None).num_leaves
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/model"
    if name != "Full":  # weights trained whole go through a subtraction
        lora.save_peft(tmp_path / "again", params, again)
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / "again" / file).read_bytes() == (
                (tmp_path / file).read_bytes().replace(b'"some/model"', b"null")
            )


def test_a_start_becomes_plain_lora_of_twice_the_rank(getkey, tmp_path, params):
    rules = [lora.LoRA(["up"], rank=2, alpha=3, init="pissa")]
    factors = moved(getkey(), lora.init(getkey(), params, rules))
    lora.save_peft(tmp_path, params, factors)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (4, 6, True)
    again = lora.load_peft(tmp_path, params)
    merged, wanted = lora.merge(params, again), lora.merge(params, factors)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), merged, wanted)


def test_tensors_and_config_are_as_peft_has_them(getkey, tmp_path, params):
    factors = made(getkey, params, "Full")
    lora.save_peft(tmp_path, params, factors)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        f"base_model.model.{name}": shape
        for name, shape in {
            **{f"layer.{i}.up.lora_A.weight": (2, 8) for i in range(2)},
            **{f"layer.{i}.up.lora_B.weight": (6, 2) for i in range(2)},
            **{f"layer.{i}.up.base_layer.bias": (6,) for i in range(2)},
            **{f"layer.{i}.norm.{own}": (8,) for i in range(2) for own in ("weight", "bias")},
            "head.weight": (5, 8),
            "head.bias": (5,),
        }.items()
    }
    with safetensors.safe_open(tmp_path / "adapter_model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"]) == (2, 3)
    assert config["target_modules"] == ["up"]
    assert config["bias"] == "lora_only"
    assert set(config["modules_to_save"]) == {"head", "layer.0.norm", "layer.1.norm"}


def test_a_module_saved_whole_has_its_frozen_part_too(getkey, tmp_path, params):
    rules = [lora.LoRA(["up"], rank=2, alpha=3), lora.Full(r".*/head/kernel")]
    lora.save_peft(tmp_path, params, moved(getkey(), lora.init(getkey(), params, rules)))
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    np.testing.assert_array_equal(
        tensors["base_model.model.head.bias"], params["params"]["head"]["bias"]
    )


def test_layers_that_are_left_out_stay_as_they_are(getkey, tmp_path):
    """Of a stack, a layer without tensors gets zeros, one of lower rank is padded."""
    rules = [lora.LoRA(["layer/0/up"], rank=1, alpha=3), lora.LoRA(["layer/2/up"], rank=2, alpha=1)]
    kernels = jax.random.normal(getkey(), (3, 8, 6))
    unrolled = {"layer": {str(i): {"up": {"kernel": kernels[i]}} for i in range(3)}}
    factors = moved(getkey(), lora.init(getkey(), unrolled, rules))
    lora.save_peft(tmp_path, unrolled, factors)
    stacked = {"up": kernels}
    again = lora.load_peft(tmp_path, stacked, names={"up": "layer.{}.up.weight"})
    assert again["up"].a.shape == (3, 8, 2)
    wanted = lora.merge(unrolled, factors)["layer"]
    np.testing.assert_allclose(
        lora.merge(stacked, again)["up"],
        np.stack([wanted[str(i)]["up"]["kernel"] for i in range(3)]),
        atol=1e-6,
    )
    assert bool((lora.merge(stacked, again)["up"][1] == kernels[1]).all())


def test_one_kernel_of_several_modules(getkey, tmp_path):
    """A factor that spans k and v becomes one of each, the factor that they share is repeated."""
    params = {
        "layers": {"0": {"attn": {"kv_einsum": {"w": jax.random.normal(getkey(), (2, 3, 8, 4))}}}}
    }
    axes = lora.Axes(contract=(2,), out=(0, 1, 3))
    for rule in (lora.LoRA, lora.DoRA):
        rules = [rule(r".*/w", rank=2, alpha=3, axes=axes)]
        factors = moved(getkey(), lora.init(getkey(), params, rules))
        lora.save_peft(tmp_path, params, factors, names="tunix")
        again = lora.load_peft(tmp_path, params, names="tunix")
        node = again["layers"]["0"]["attn"]["kv_einsum"]["w"]
        assert node.axes == lora.Axes(batch=(0,), contract=(2,), out=(1, 3))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
            lora.merge(params, again),
            lora.merge(params, factors),
        )


def test_names_of_maxtext(getkey, tmp_path):
    """Unrolled layers and a scan along dim 1 give one and the same folder."""
    query, out = (jax.random.normal(getkey(), shape) for shape in ((8, 3, 2, 4), (2, 3, 4, 8)))
    attention = {"query": {"kernel": query}, "out": {"kernel": out}}
    scanned = {"params": {"decoder": {"layers": {"self_attention": attention}}}}
    unrolled = {
        "params": {
            "decoder": {
                f"layers_{i}": {"self_attention": jax.tree.map(lambda w, i=i: w[:, i], attention)}
                for i in range(3)
            }
        }
    }
    axes = [lora.Axes((1,), (0,), (2, 3)), lora.Axes((1,), (0, 2), (3,))]
    rules = [
        lora.LoRA([name], rank=2, alpha=3, axes=a)
        for name, a in zip(("query", "out"), axes, strict=True)
    ]
    factors = moved(getkey(), lora.init(getkey(), scanned, rules))
    lora.save_peft(tmp_path, scanned, factors, names="maxtext")
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    wanted = (query + _delta(factors, "query", "ldr,lrhk->dlhk")).reshape(8, 3, 8)
    for i in range(3):
        prefix = f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_"
        a, b = (tensors[f"{prefix}{x}.weight"] for x in "AB")
        torch_weight = query[:, i].reshape(8, 8).T + 1.5 * b @ a
        np.testing.assert_allclose(torch_weight, wanted[:, i].T, atol=1e-5)
    again = lora.load_peft(tmp_path, scanned, names="maxtext")
    assert_same(again, factors)
    apart = lora.load_peft(tmp_path, unrolled, names="maxtext")
    lora.save_peft(tmp_path / "apart", unrolled, apart, names="maxtext")
    assert_same_folder(tmp_path / "apart", tmp_path)


def _delta(factors, name, subscripts):
    node = factors["params"]["decoder"]["layers"]["self_attention"][name]["kernel"]
    return node.scale * np.einsum(subscripts, node.a, node.b)


def test_a_base_in_half_precision(getkey, tmp_path, params):
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    factors = made(getkey, params, "Full")
    lora.save_peft(tmp_path, params, factors)
    again = lora.load_peft(tmp_path, params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        jax.tree.leaves(again),
        jax.tree.leaves(factors),
    )


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})


UP = "base_model.model.layer.1.up"
WRONG = {
    "another method": (lambda f: edit(f, peft_type="IA3"), "peft_type is 'IA3'"),
    "a field that changes the sum": (
        lambda f: edit(f, layer_replication=[[0, 1]]),
        "layer_replication is",
    ),
    "a field of the future": (lambda f: edit(f, use_magic=True), "use_magic is True"),
    "a base that moved": (
        lambda f: edit(f, init_lora_weights="pissa_niter_16"),
        "path_initial_model_for_weight_conversion",
    ),
    "a rank that is not the tensors'": (lambda f: edit(f, r=3), "has rank 2, the config says 3"),
    "no rank": (lambda f: edit(f, r="2"), "r is 2; wanted a rank"),
    "a dangerous pattern": (
        lambda f: edit(f, alpha_pattern={"(a+)+": 2}),
        "too intricate to be run safely",
    ),
    "a pattern of exponential time": (
        lambda f: edit(f, rank_pattern={"a?" * 30 + "a" * 30: 2}),
        "too intricate to be run safely",
    ),
    "a pattern of polynomial time": (
        lambda f: edit(f, rank_pattern={".*.*.*x": 2}),
        "too intricate to be run safely",
    ),
    "a pattern of many alternatives": (
        lambda f: edit(f, rank_pattern={"(a|aa)" * 40 + "b": 2}),
        "too intricate to be run safely",
    ),
    "tying that is not read": (
        lambda f: edit(f, ensure_weight_tying=True),
        "ensure_weight_tying is True",
    ),
    "no tensors": (lambda f: edit_tensors(f, dict.clear), "holds no tensors"),
    "a parameter that names call a module": (
        lambda f: edit(f, target_parameters=["head.weight"]),
        r"'head\.weight' among its target_parameters.*the layout 'linear'",
    ),
    "all biases, and none": (lambda f: edit(f, bias="all"), r"lacks \d of \d biases"),
    "a saved container without tensors": (
        lambda f: edit(f, modules_to_save=["layer.0"], target_modules=None),
        r"lacks base_model\.model\.layer\.0\.",
    ),
    "a number beyond all floats": (lambda f: edit(f, lora_alpha=10**400), "wanted a finite number"),
    "a module without tensors": (
        lambda f: edit(f, target_modules=["up", "head"]),
        r"lacks the LoRA of 'head' \('params/head/kernel'\)",
    ),
    "a saved module without tensors": (
        lambda f: edit(f, modules_to_save=["head"]),
        r"lacks base_model\.model\.head\.bias",
    ),
    "one half of a LoRA": (
        lambda f: edit_tensors(f, lambda t: t.pop(f"{UP}.lora_B.weight")),
        rf"'{re.escape(UP)}\.lora_A\.weight' lacks its partner",
    ),
    "a tensor too many": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{UP}.lora_magnitude_vector": np.ones(6)})),
        rf"'{re.escape(UP)}\.lora_magnitude_vector' is unexpected",
    ),
    "a tensor of nothing": (
        lambda f: edit_tensors(
            f, lambda t: t.update({"base_model.model.layer.7.up.weight": np.ones(2)})
        ),
        (
            r"'base_model\.model\.layer\.7\.up\.weight' belongs to 'layer\.7\.up\.weight'.*nearest.*"
            r"layer\.\d\.up\.weight"
        ),
    ),
    "a foreign prefix": (
        lambda f: edit_tensors(f, lambda t: t.update({"transformer.x.weight": np.ones(2)})),
        r"'transformer\.x\.weight' does not start with",
    ),
    "a bias of a LoRA": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{UP}.lora_B.bias": np.ones(6)})),
        r"'base_model\.model\.layer\.1\.up\.lora_B\.bias' belongs to",
    ),
    "a wrong shape": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{UP}.lora_B.weight": np.ones((7, 2))})),
        r"up\.lora_A\.weight' and its partner have shapes \[2, 8\] and \[7, 2\]",
    ),
    "another base": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{UP}.base_layer.weight": np.ones((6, 8))})),
        "is another base than 'params/layer/1/up/kernel'",
    ),
    "NaN": (
        lambda f: edit_tensors(
            f, lambda t: t.update({f"{UP}.lora_B.weight": np.full((6, 2), np.nan)})
        ),
        r"'base_model\.model\.layer\.1\.up\.lora_B\.weight' holds a NaN",
    ),
    "integers": (
        lambda f: edit_tensors(
            f, lambda t: t.update({f"{UP}.lora_B.weight": np.ones((6, 2), np.int64)})
        ),
        "has dtype I64",
    ),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "cannot be read: No such file"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "is no JSON"),
    "a pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "a pickle, which could run any code",
    ),
}


@pytest.fixture
def folder(getkey, tmp_path, params):
    lora.save_peft(
        tmp_path,
        params,
        moved(getkey(), lora.init(getkey(), params, [lora.LoRA(["up"], rank=2, alpha=3)])),
    )
    return tmp_path


@pytest.mark.parametrize("case", WRONG)
def test_load_refuses_by_name(folder, params, case):
    spoil, message = WRONG[case]
    lora.load_peft(folder, params)
    spoil(folder)
    with pytest.raises(lora.AdapterFileError, match=message):
        lora.load_peft(folder, params)


def test_of_all_biases_none_may_be_missing(tmp_path, params, getkey):
    lora.save_peft(tmp_path, params, made(getkey, params, "Full"))
    edit(tmp_path, bias="all")
    with pytest.raises(
        lora.AdapterFileError, match=r"lacks 1 of 6 biases, the first 'patch\.bias'"
    ):
        lora.load_peft(tmp_path, params)


def test_a_long_regex_of_targets_is_not_run(folder, params):
    """Such as diffusers': what the tensors say holds."""
    before = lora.load_peft(folder, params)
    edit(
        folder, target_modules="|".join([r".*up", *(rf".*\.blocks\.{i}\.(a|b)*" for i in range(9))])
    )
    assert_same(lora.load_peft(folder, params), before)


def test_abstract_params(folder, params, getkey):
    shapes = jax.eval_shape(lambda: params)
    assert_same(lora.load_peft(folder, shapes), lora.load_peft(folder, params))
    lora.save_peft(folder, params, made(getkey, params, "Full"))
    with pytest.raises(lora.LoraError, match=r"is abstract.*wanted arrays"):
        lora.load_peft(folder, shapes)


SAVE_REFUSES = {
    "VeRA": ([lora.VeRA(["up"], rank=2)], "is adapted by VeRA.*cannot hold"),
    "mixed": (
        [lora.DoRA(["layer/0/up"], rank=2), lora.LoRA(["up"], rank=2)],
        "'params/layer/0/up/kernel' is adapted by DoRA, 'params/layer/1/up/kernel' by LoRA",
    ),
    "no LoRA": ([lora.Full(["head"])], "PEFT wants one"),
}


@pytest.mark.parametrize("case", SAVE_REFUSES)
def test_save_refuses(getkey, tmp_path, params, case):
    rules, message = SAVE_REFUSES[case]
    factors = lora.init(getkey(), params, rules)
    with pytest.raises(lora.LoraError, match=message):
        lora.save_peft(tmp_path / "out", params, factors)
    assert not (tmp_path / "out").exists()


NAMES_REFUSED = {
    "unknown": ("lama", "'lama' is unknown; wanted one of"),
    "no name": ({"x": "y"}, "no name in the PyTorch model"),
    "a bad regex": ({"(": "y"}, "no regex"),
    "one name twice": (lambda path, leaf: "a.weight", "the one name 'a.weight'"),
    "a group too many": ({r".*up/kernel": r"m.\9.weight"}, "does not fit its groups"),
    "no string": (lambda path, leaf: 7, "the name 7"),
    "a vector": (lambda path, leaf: path.replace("/", ".") + ".bias", "adapts weights of modules"),
}


@pytest.mark.parametrize("case", NAMES_REFUSED)
def test_names_are_checked(getkey, tmp_path, params, case):
    names, message = NAMES_REFUSED[case]
    factors = lora.init(getkey(), params, [lora.LoRA(["up"], rank=2)])
    with pytest.raises(lora.LoraError, match=message):
        lora.save_peft(tmp_path / "out", params, factors, names=names)


def test_braces_in_names_are_letters():
    assert Place("a.{x}.{}.{0}.weight").slots((2,))[(1,)] == "a.{x}.1.{0}.weight"


def test_a_container_saved_whole(getkey, tmp_path):
    """PEFT keeps every module within; a LoRA there has no form."""
    up, dense, plain = ({"kernel": jax.random.normal(getkey(), (4, 4))} for _ in range(3))
    params = {"up": up, "head": {"kernel": jnp.ones((4, 4)), "dense": dense}, "headless": plain}
    rules = [lora.LoRA(["up"], rank=2, alpha=3), lora.Full("head/kernel")]
    factors = moved(getkey(), lora.init(getkey(), params, rules))
    lora.save_peft(tmp_path, params, factors)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.head.dense.weight" in tensors
    assert "base_model.model.headless.weight" not in tensors
    again = lora.load_peft(tmp_path, params)
    assert again["head"]["dense"]["kernel"] is not None
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        lora.merge(params, again),
        lora.merge(params, factors),
    )
    rules = [lora.LoRA(["up", "dense"], rank=2, alpha=3), lora.Full("head/kernel")]
    with pytest.raises(lora.LoraError, match=r"'head\.dense' has a LoRA, and PEFT would save"):
        lora.save_peft(tmp_path, params, lora.init(getkey(), params, rules))


def test_long_names_are_not_matched():
    config = PeftConfig(2, 3, target_modules=".*a.*b", target_parameters=("w",))
    for ask in (config.targets, config.targets_parameter):
        with pytest.raises(lora.AdapterFileError, match="has 300 letters"):
            ask("a" * 300)


def test_a_crash_between_both_files_leaves_a_folder_that_is_refused(
    folder, params, getkey, monkeypatch
):
    """Both are on disk before the first has its name; the old config is gone by then."""
    events = []
    fsync, replace = os.fsync, Path.replace

    def stops_at_the_second(self, target):
        events.append("replace")
        if events.count("replace") == 2:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(Path, "replace", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        lora.save_peft(folder, params, made(getkey, params, "rsLoRA"))
    assert events.index("replace") >= 2
    monkeypatch.undo()
    with pytest.raises(lora.AdapterFileError, match="cannot be read"):
        lora.load_peft(folder, params)


def test_a_failed_write_leaves_the_old_folder(folder, params, getkey, monkeypatch):
    before = lora.load_peft(folder, params)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("lorax_fn.io.peft_save.write_config", full)
    with pytest.raises(OSError, match="No space"):
        lora.save_peft(folder, params, made(getkey, params, "rsLoRA"))
    assert_same(lora.load_peft(folder, params), before)


@pytest.mark.parametrize("rule", [lora.DoRA, lora.LoRA])
def test_a_quantised_base(getkey, tmp_path, rule):
    """DoRA needs its norms, a module trained whole its values: those that its codes stand for."""
    pytest.importorskip("qwix")
    shapes = {"up": (64, 32), "head": (64, 32)}
    params = {m: {"kernel": jax.random.normal(getkey(), s)} for m, s in shapes.items()}
    params["head"]["bias"] = jnp.ones(32)
    base = lora.quantize(params, ["up", "head"], dtype="int8", block=32)
    rules = [rule(["up"], rank=2, alpha=3)]
    if rule is lora.LoRA:
        rules.append(lora.Full("head/bias"))
    factors = moved(getkey(), lora.init(getkey(), base, rules))
    lora.save_peft(tmp_path, base, factors)
    again = lora.load_peft(tmp_path, base)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
        lora.merge(base, again),
        lora.merge(base, factors),
    )


def test_a_stack_needs_numbered_names(getkey, tmp_path):
    params = {"up": jnp.ones((3, 8, 6))}
    rules = [lora.LoRA(["up"], rank=2, axes=lora.Axes((0,), (1,), (2,)))]
    factors = lora.init(getkey(), params, rules)
    with pytest.raises(lora.LoraError, match=r"numbers 0 dims, the leaf stacks 1.*\{\}"):
        lora.save_peft(tmp_path, params, factors, names={"up": "layer.up.weight"})


def test_damaged_folders_are_refused(tmp_path):
    """Flipped, cut and edited folders of every kind: an error of the family, or factors that fit."""
    rng = random.Random(0)
    model = OWN["stack"]()
    refused = 0
    for i in range(300):
        folder = tmp_path / "f"
        shutil.copytree(FIXTURES / ("stack", "stack-dora")[i % 2], folder, dirs_exist_ok=True)
        path = folder / rng.choice(["adapter_model.safetensors", "adapter_config.json"])
        data = bytearray(path.read_bytes())
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data) if rng.random() < 0.5 else 900)] = rng.randrange(256)
        path.write_bytes(bytes(data[: rng.choice([len(data), rng.randrange(len(data))])]))
        try:
            factors = lora.load_peft(folder, model.params, names=model.names)
        except lora.LoraError:
            refused += 1
            continue
        merged = lora.merge(model.params, factors)
        assert jax.tree.structure(merged) == jax.tree.structure(model.params)
    assert 100 < refused < 300


def test_a_weight_of_unknown_orientation(getkey, tmp_path):
    """A square "weight", (out, in) in Equinox, is never taken for (in, out)."""
    params = {"q": {"weight": jax.random.normal(getkey(), (4, 4))}, "b": {"weight": jnp.eye(4)}}
    names = {r"(\w)/weight": r"model.\1.weight"}
    axes = lora.infer_axes(
        lambda p, x: p["b"]["weight"] @ (p["q"]["weight"] @ x), params, jnp.ones(4)
    )
    rules = [lora.LoRA("q/weight", rank=2, alpha=3), lora.Full("b/weight")]
    factors = moved(getkey(), lora.init(getkey(), params, rules, axes=axes))
    with pytest.raises(lora.AxesError, match=r"'b/weight'.*infer_axes"):
        lora.save_peft(tmp_path, params, factors, names=names)
    lora.save_peft(tmp_path, params, factors, names=names, axes=axes)
    with pytest.raises(lora.AxesError, match=r"infer_axes"):
        lora.load_peft(tmp_path, params, names=names)
    again = lora.load_peft(tmp_path, params, names=names, axes=axes)
    assert again["q"]["weight"].axes == lora.Axes(contract=(1,), out=(0,))
    merged, wanted = lora.merge(params, again), lora.merge(params, factors)
    np.testing.assert_allclose(merged["q"]["weight"], wanted["q"]["weight"], atol=1e-6)
    np.testing.assert_allclose(merged["b"]["weight"], wanted["b"]["weight"], atol=1e-6)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    np.testing.assert_allclose(
        tensors["base_model.model.model.b.weight"], wanted["b"]["weight"], atol=1e-6
    )
