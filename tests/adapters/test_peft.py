"""The kinds that PyTorch PEFT has too give what PEFT gives, on tensors stored from a run of it."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import lorax_fn as lora

STORED = np.load(Path(__file__).with_name("peft_reference.npz"))
SCALED = {"rank": 3, "alpha": 7.5}

# The rule, and our arrays from PEFT's, which PyTorch keeps as (out, in).
KINDS = {
    "LoRA": (lora.LoRA("w", **SCALED), {"a": "lora_A", "b": "lora_B"}),
    "rsLoRA": (lora.LoRA("w", **SCALED, rslora=True), {"a": "lora_A", "b": "lora_B"}),
    "DoRA": (
        lora.DoRA("w", **SCALED),
        {"a": "lora_A", "b": "lora_B", "magnitude": "lora_magnitude_vector"},
    ),
    "VeRA": (
        lora.VeRA("w", rank=5),
        {"a": "vera_A", "b": "vera_B", "d": "vera_lambda_d", "g": "vera_lambda_b"},
    ),
    "IA3": (lora.IA3("w"), {"gain": "ia3_l"}),
    "IA3 in": (lora.IA3("w", on="in"), {"gain": "ia3_l"}),
    "LoHa": (
        lora.LoHa("w", **SCALED),
        {"a1": "hada_w1_b", "b1": "hada_w1_a", "a2": "hada_w2_b", "b2": "hada_w2_a"},
    ),
    "LoKr": (lora.LoKr("w", **SCALED), {"left": "lokr_w1", "right": "lokr_w2"}),
    "LoKr low-rank": (
        lora.LoKr("w", rank=1, alpha=2.5),
        {"left": "lokr_w1", "a": "lokr_w2_b", "b": "lokr_w2_a"},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_peft(kind):
    rule, names = KINDS[kind]
    params = {"w": STORED["weight"].T, "bias": STORED["bias"]}
    node = lora.init(jax.random.key(0), params, [rule])["w"]
    arrays = {ours: STORED[f"{kind}/{theirs}"].T for ours, theirs in names.items()}
    arrays = {name: array.reshape(getattr(node, name).shape) for name, array in arrays.items()}
    factors = {"w": dataclasses.replace(node, **arrays), "bias": None}

    def layer(params, x):
        return x @ params["w"] + params["bias"][None]

    expected = STORED[f"{kind}/output"]
    if kind == "IA3":  # PEFT scales the bias too; ours belongs to the weight
        expected = expected + params["bias"][None] * (1 - STORED["IA3/ia3_l"].T)
    wrapped = jax.jit(lora.wrap(layer, dense="error"))
    output = wrapped(params, factors, STORED["x"])
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-4)
    merged = layer(lora.merge(params, factors), STORED["x"])
    np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-4)
    assert np.abs(output - layer(params, STORED["x"])).max() > 0.1  # the adapter does something
