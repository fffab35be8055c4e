"""Writes `peft_combinations.npz`: what PyTorch PEFT's `add_weighted_adapter` makes of adapters.

    python -m venv env && env/bin/pip install torch==2.13.0 peft==0.21.2 numpy
    env/bin/python tests/adapters/make_peft_combinations.py

One linear layer with three random adapters, of which the methods that need one rank combine two.
Stored as PyTorch lays them out: "<adapter>/A" (r, in) and "<adapter>/B" (out, r); for each method
"<method>/delta" (out, in), what the combined adapter adds to the weight; for the methods on factors
"<method>/A" and "<method>/B"; and "<method>/kept/<i>", what DARE's i-th draw kept.
"""

from pathlib import Path

import numpy as np
import peft
import torch

IN, OUT = 24, 15
ADAPTERS = {"p": (3, 7.5), "q": (3, 4.0), "s": (5, 6.0)}  # rank, alpha
WEIGHTS = [0.7, -0.4, 1.2]
DENSITY = 0.6
SVD_RANK = 4
ON_FACTORS = ("linear", "ties", "ties frequency", "dare_linear", "dare_ties", "magnitude_prune")
ON_DELTAS = ("cat", "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(IN, OUT)

    def forward(self, x):
        return self.layer(x)


def adapted_model():
    """A model with the three adapters, every tensor of them random."""
    torch.manual_seed(0)
    configs = {
        name: peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"])
        for name, (rank, alpha) in ADAPTERS.items()
    }
    model = peft.get_peft_model(Model(), configs["p"], adapter_name="p")
    for name in ("q", "s"):
        model.add_adapter(name, configs[name])
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn_like(value) / 2)
    return model


def record_draws():
    """Makes `torch.bernoulli` note what it returns; returns the notes."""
    draws, bernoulli = [], torch.bernoulli

    def noted(*args, **kwargs):
        draws.append(bernoulli(*args, **kwargs))
        return draws[-1]

    torch.bernoulli = noted
    return draws


def main():
    model = adapted_model()
    layer = model.base_model.model.layer
    draws = record_draws()
    arrays = {}
    for name in ADAPTERS:
        arrays[f"{name}/A"] = layer.lora_A[name].weight
        arrays[f"{name}/B"] = layer.lora_B[name].weight
    for method in ON_FACTORS + ON_DELTAS:
        names = ["p", "q"] if method in ON_FACTORS else ["p", "q", "s"]
        draws.clear()
        kind, _, frequency = method.partition(" ")
        options = {"svd_rank": SVD_RANK} if "svd" in method else {}
        options |= {"majority_sign_method": frequency} if frequency else {}
        options |= {} if method in ("linear", "cat", "svd") else {"density": DENSITY}
        new = method.replace(" ", "_")
        model.add_weighted_adapter(
            names, WEIGHTS[: len(names)], new, combination_type=kind, **options
        )
        arrays[f"{method}/delta"] = layer.get_delta_weight(new)
        if method in ON_FACTORS:
            arrays[f"{method}/A"] = layer.lora_A[new].weight
            arrays[f"{method}/B"] = layer.lora_B[new].weight
        arrays |= {f"{method}/kept/{i}": draw for i, draw in enumerate(draws)}
    path = Path(__file__).with_name("peft_combinations.npz")
    np.savez_compressed(path, **{name: value.detach().numpy() for name, value in arrays.items()})
    for name, value in arrays.items():
        print(name, tuple(value.shape))


if __name__ == "__main__":
    main()
