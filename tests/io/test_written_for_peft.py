"""Adapters made here, on models that PyTorch has too: written for PEFT, and read again.

By default those on models of our own. With `PEFT_FOLDERS=folder` all, and they are kept there with
our answers for `check_peft_loads.py`, which loads them into PEFT and compares. `.ci/run peft` does
both.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lora
from tests.io import jax_models
from tests.io.trees import moved

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's models

SCALED = {"rank": 2, "alpha": 5}
ATTENTION = ["q_proj", "k_proj", "v_proj"]
CONV = lora.Axes(contract=(0, 1, 2), out=(3,))
ROWS = lora.Axes(contract=(1,), out=(0,))
LAYERS = lora.Axes(batch=(0,), contract=(1,), out=(2,))

# Of each: the model's name in PyTorch, its port, and the rules.
ADAPTERS = {
    "LoRA": ("llama", "flax", [lora.LoRA([*ATTENTION, "down_proj"], **SCALED)]),
    "rsLoRA of several ranks": (
        "llama",
        "flax",
        [
            lora.LoRA(["layers/1/self_attn/q_proj"], rank=4, alpha=7, rslora=True),
            lora.LoRA(["q_proj", "o_proj"], rank=2, alpha=3, rslora=True),
            lora.LoRA(["up_proj"], rank=3, alpha=1),
        ],
    ),
    "DoRA": ("llama", "flax", [lora.DoRA(["q_proj", "embed_tokens", "gate_proj"], **SCALED)]),
    "PiSSA": ("llama", "flax", [lora.LoRA(["q_proj", "up_proj"], **SCALED, init="pissa")]),
    "one layer": ("llama", "flax", [lora.LoRA(["layers/1/self_attn/v_proj"], **SCALED)]),
    "embedding and whole modules": (
        "llama",
        "flax",
        [
            lora.LoRA(["embed_tokens", "v_proj"], **SCALED),
            lora.Full(r"lm_head/kernel"),
            lora.Full(r".*/(input_layernorm|norm)/weight"),
        ],
    ),
    "mistral": ("mistral", "flax", [lora.LoRA([*ATTENTION, "gate_proj"], **SCALED)]),
    "gemma": ("gemma", "flax", [lora.LoRA([*ATTENTION, "o_proj"], **SCALED)]),
    "bert": (
        "bert",
        "flax",
        [
            lora.LoRA(["query", "intermediate/dense", "word_embeddings"], **SCALED),
            lora.Full(r"classifier/.*"),
            lora.Full(r".*/query/bias"),
        ],
    ),
    "gpt2": (
        "gpt2",
        "flax",
        [lora.LoRA(["c_attn", "c_proj", "c_fc"], **SCALED, axes=ROWS), lora.Full(r".*/ln_1/.*")],
    ),
    "gpt2 DoRA": ("gpt2", "flax", [lora.DoRA(["c_attn", "c_proj"], **SCALED, axes=ROWS)]),
    "vit": (
        "vit",
        "flax",
        [
            lora.LoRA(["projection"], rank=3, alpha=2, axes=CONV),
            lora.LoRA(["query", "value"], **SCALED),
            lora.Full(r"classifier/kernel"),
        ],
    ),
    "vit DoRA": ("vit", "flax", [lora.DoRA(["projection"], **SCALED, axes=CONV)]),
    "tunix llama3": ("llama3", "tunix", [lora.LoRA([*ATTENTION, "o_proj"], **SCALED)]),
    "tunix qwen2": (
        "qwen2",
        "tunix",
        [lora.LoRA([*ATTENTION, "up_proj"], **SCALED), lora.Full(r".*/[kv]_bias")],
    ),
    "tunix qwen3": (
        "qwen3",
        "tunix",
        [lora.DoRA([*ATTENTION, "o_proj", "lm_head"], **SCALED)],
    ),
    "tunix gemma2": (
        "gemma2",
        "tunix",
        [lora.LoRA(["q_einsum", "kv_einsum", "attn_vec_einsum", "gate_proj"], **SCALED)],
    ),
    "experts": ("experts", "own", [lora.LoRA(["up_proj"], rank=3, alpha=2), lora.LoRA(["down_proj", "router"], **SCALED)]),
    "one parameter of experts": ("experts", "own", [lora.LoRA(["down_proj"], **SCALED)]),
    "transposed experts": ("experts-transposed", "own", [lora.LoRA(["up_proj", "down_proj"], **SCALED)]),
    "scanned": (
        "stack",
        "own",
        [
            lora.LoRA(["up"], rank=3, alpha=2, axes=LAYERS),
            lora.LoRA(["down"], **SCALED, axes=LAYERS),
            lora.Full(r"up/bias"),
        ],
    ),
    "scanned DoRA": ("stack", "own", [lora.DoRA(["up", "down"], **SCALED, axes=LAYERS)]),
}  # fmt: skip
OWN = {
    "experts": lambda: jax_models.experts(transposed=False),
    "experts-transposed": lambda: jax_models.experts(transposed=True),
    "stack": jax_models.stack,
}


ALL = "PEFT_FOLDERS" in os.environ


@pytest.mark.parametrize("name", [name for name, a in ADAPTERS.items() if ALL or a[1] == "own"])
def test_what_is_written_comes_back(getkey, tmp_path, name):
    torch_name, port, rules = ADAPTERS[name]
    with jax_models.third_party():
        if port == "own":
            model = OWN[torch_name]()
        else:
            pytest.importorskip({"flax": "transformers", "tunix": "tunix"}[port])
            (tmp_path / "model").mkdir()
            model = (
                jax_models.flax(torch_name)
                if port == "flax"
                else jax_models.tunix(torch_name, tmp_path / "model")
            )
    axes = jax_models.axes_of(model)
    params = jax.tree.map(jnp.asarray, model.params)
    factors = lora.init(getkey(), params, rules, axes=axes)
    factors = jax.tree.map(lambda x, y: x + (y - x) / 4, factors, moved(getkey(), factors))
    root = Path(os.environ.get("PEFT_FOLDERS", tmp_path))
    folder = root / f"{torch_name}@{name.replace(' ', '-')}"
    lora.save_peft(folder, params, factors, names=model.names)
    expected = jax_models.answer(model, factors)
    np.save(folder / "expected.npy", expected)
    again = lora.load_peft(folder, params, names=model.names, axes=axes)
    np.testing.assert_allclose(jax_models.answer(model, again), expected, rtol=1e-4, atol=1e-4)
