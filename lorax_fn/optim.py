"""Optax transformations that train adapters and nothing else."""

from __future__ import annotations

from typing import Any

import jax
import optax

from lorax_fn.adapters import is_adapter
from lorax_fn.errors import LoraError

Pytree = Any


def trainable_mask(tree: Pytree) -> Pytree:
    """Returns the bool pytree that is True at adapters' trainable arrays and False elsewhere.

    Args:
        tree: factors, or any tree that holds adapter nodes, such as
            `{"params": params, "lora": factors}`.

    >>> import jax, jax.numpy as jnp, lorax_fn as lora
    >>> params = {"w": jnp.ones((3, 2))}
    >>> factors = lora.init(jax.random.key(0), params, [lora.LoRA("w", rank=1)])
    >>> jax.tree.leaves(lora.trainable_mask({"params": params, "lora": factors}))
    [True, True, False]
    """
    return jax.tree.map(
        lambda node: node.trainable() if is_adapter(node) else False, tree, is_leaf=is_adapter
    )


def freeze(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Makes an optimiser train adapters only.

    Args:
        tx: any optax transformation.

    Returns:
        A transformation for factors alone or for any tree that holds adapter nodes, as the params
        of a `TrainState` may. Adapters are updated by `tx`; everything else gets zero updates and
        takes no optimiser memory. Its `init` raises `LoraError` for a tree without adapters.

    >>> import jax, jax.numpy as jnp, optax, lorax_fn as lora
    >>> params = {"w": jnp.ones((300, 200))}
    >>> factors = lora.init(jax.random.key(0), params, [lora.LoRA("w", rank=1)])
    >>> state = lora.freeze(optax.adam(1e-3)).init({"params": params, "lora": factors})
    >>> sum(leaf.size for leaf in jax.tree.leaves(state))  # two moments of 300 + 200, a count
    1001
    """
    masked = optax.chain(
        optax.masked(tx, trainable_mask), optax.masked(optax.set_to_zero(), _frozen_mask)
    )

    def init(tree: Pytree) -> Any:
        if not any(map(is_adapter, jax.tree.leaves(tree, is_leaf=is_adapter))):
            raise LoraError(
                "the tree to optimise holds no adapter node, so nothing would be trained; wanted "
                "the factors that lora.init made, or a tree that holds them."
            )
        return masked.init(tree)

    return optax.GradientTransformationExtraArgs(init, masked.update)


def _frozen_mask(tree: Pytree) -> Pytree:
    return jax.tree.map(lambda trained: not trained, trainable_mask(tree))
