"""Writes `peft_reference.npz`: what PyTorch PEFT computes for every kind that it has too.

    python -m venv env && env/bin/pip install torch==2.13.0 peft==0.21.2 numpy
    env/bin/python tests/adapters/make_peft_reference.py

One linear layer with random adapter weights for each kind. Stored as PyTorch lays them out, by
"<kind>/<name>": the adapter's tensors, and the layer's output for the stored inputs.
"""

import re
from pathlib import Path

import numpy as np
import peft
import torch

IN, OUT, RANK, ALPHA = 24, 15, 3, 7.5

CONFIGS = {
    "LoRA": peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"]),
    "rsLoRA": peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_rslora=True, target_modules=["layer"]),
    "DoRA": peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=True, target_modules=["layer"]),
    "VeRA": peft.VeraConfig(r=5, target_modules=["layer"]),
    "IA3": peft.IA3Config(target_modules=["layer"], feedforward_modules=[]),
    "IA3 in": peft.IA3Config(target_modules=["layer"], feedforward_modules=["layer"]),
    "LoHa": peft.LoHaConfig(r=RANK, alpha=ALPHA, target_modules=["layer"]),
    "LoKr": peft.LoKrConfig(r=RANK, alpha=ALPHA, target_modules=["layer"]),
    "LoKr low-rank": peft.LoKrConfig(r=1, alpha=2.5, target_modules=["layer"]),
}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(IN, OUT)

    def forward(self, x):
        return self.layer(x)


def main():
    torch.manual_seed(0)
    model = Model()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(4, IN)
    arrays = {"x": x, "weight": weights["layer.weight"], "bias": weights["layer.bias"]}
    for kind, config in CONFIGS.items():
        model = Model()
        model.load_state_dict(weights)
        adapted = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, value in adapted.named_parameters():
                if value.requires_grad:
                    value.copy_(torch.randn_like(value) / 2)
                short = re.search(r"(lora|vera|ia3|hada|lokr)_\w+", name)
                if short:
                    arrays[f"{kind}/{short[0]}"] = value.clone()
            for name, value in adapted.named_buffers():
                short = re.search(r"vera_[AB]", name)
                if short:
                    arrays[f"{kind}/{short[0]}"] = value.clone()
            adapted.eval()
            arrays[f"{kind}/output"] = adapted(x)
    path = Path(__file__).with_name("peft_reference.npz")
    np.savez_compressed(path, **{name: value.numpy() for name, value in arrays.items()})
    for name, value in arrays.items():
        print(name, tuple(value.shape))


if __name__ == "__main__":
    main()
