"""`combine` gives what PyTorch PEFT's `add_weighted_adapter` gave, stored from a run of it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_fn as lora

STORED = np.load(Path(__file__).with_name("peft_combinations.npz"))
ALPHAS = {"p": 7.5, "q": 4.0, "s": 6.0}
WEIGHTS = [0.7, -0.4, 1.2]
ON_FACTORS = ("linear", "ties", "ties frequency", "dare_linear", "dare_ties", "magnitude_prune")
ON_DELTAS = ("cat", "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")


def adapter(name):
    a, b = STORED[f"{name}/A"].T, STORED[f"{name}/B"].T
    node = lora.adapters.LoRAFactors(
        jnp.asarray(a),
        jnp.asarray(b),
        scale=ALPHAS[name] / a.shape[1],
        axes=lora.Axes(contract=(0,), out=(1,)),
        dropout=0.0,
    )
    return {"w": node}


@pytest.mark.parametrize("method", ON_FACTORS + ON_DELTAS)
def test_agrees_with_peft(method, monkeypatch):
    names = ["p", "q"] if method in ON_FACTORS else ["p", "q", "s"]
    kind, _, frequency = method.partition(" ")
    options = {"rank": 4} if "svd" in method else {}
    options |= {"majority_sign_method": frequency} if frequency else {}
    options |= {} if method in ("linear", "cat", "svd") else {"density": 0.6}
    if "dare" in method:  # what PyTorch drew, one array after another
        options["key"] = jax.random.key(0)
        draws = iter([STORED[n].T for n in STORED if n.startswith(f"{method}/kept/")])
        monkeypatch.setattr(jax.random, "bernoulli", lambda k, p, shape: next(draws) > 0)
    combined = lora.combine(
        list(map(adapter, names)), WEIGHTS[: len(names)], method=kind, **options
    )
    merged = lora.merge({"w": np.zeros((24, 15), np.float32)}, combined)["w"]
    np.testing.assert_allclose(merged, STORED[f"{method}/delta"].T, atol=2e-5)
    if method in ON_FACTORS:
        np.testing.assert_allclose(combined["w"].a, STORED[f"{method}/A"].T, atol=1e-6)
        np.testing.assert_allclose(combined["w"].b, STORED[f"{method}/B"].T, atol=1e-6)
