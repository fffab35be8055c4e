"""Factors of every kind, with no zero in them, for tests that write and read them."""

import jax
import jax.numpy as jnp
import numpy as np

import lorax_fn as lora

STACK = lora.Axes(batch=(0,), contract=(1,), out=(2, 3))
SCALED = {"rank": 2, "alpha": 3.5}

RULES = {
    "LoRA": lora.LoRA("w", **SCALED, dropout=0.25),
    "LoRA in bfloat16": lora.LoRA("w", **SCALED, dtype=jnp.bfloat16),
    "rsLoRA": lora.LoRA("w", **SCALED, rslora=True),
    "LoRA-FA": lora.LoRA("w", **SCALED, freeze_a=True),
    "PiSSA": lora.LoRA("w", **SCALED, init="pissa"),
    "DoRA": lora.DoRA("w", **SCALED),
    "DoRA from OLoRA": lora.DoRA("w", **SCALED, init="olora"),
    "VeRA": lora.VeRA("w", rank=5, dropout=0.5),
    "LoHa": lora.LoHa("w", **SCALED),
    "LoKr": lora.LoKr("w", rank=8, alpha=3),
    "LoKr low-rank": lora.LoKr("w", rank=1, alpha=3, factor=2),
    "IA3": lora.IA3("w"),
    "IA3 in": lora.IA3("w", on="in"),
    "AdaLoRA": lora.AdaLoRA("w", **SCALED),
    "Full": lora.Full("w"),
    "TrainableTokens": lora.TrainableTokens("w", tokens=[5, 1]),
    "LoRA of a stack": lora.LoRA("stack", **SCALED, axes=STACK),
}


def moved(key, factors):
    """Factors of the same structure, every trained entry away from where it started."""
    leaves, treedef = jax.tree.flatten(factors)
    trained = jax.tree.leaves(lora.trainable_mask(factors))
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    steps = [rng.standard_normal(x.shape) * t for x, t in zip(leaves, trained, strict=True)]
    moved = [x + jnp.asarray(step, x.dtype) for x, step in zip(leaves, steps, strict=True)]
    return jax.tree.unflatten(treedef, moved)


def params(key):
    keys = jax.random.split(key, 2)
    return {
        "w": jax.random.normal(keys[0], (12, 10)),
        "stack": jax.random.normal(keys[1], (3, 6, 2, 4)),
        "bias": jnp.zeros(10),
    }


def factors_of(key, name):
    keys = jax.random.split(key, 3)
    return moved(keys[0], lora.init(keys[1], params(keys[2]), [RULES[name]]))


def assert_same(got, wanted):
    """The same structure, settings, dtypes and values."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.array_equal(a, b)
