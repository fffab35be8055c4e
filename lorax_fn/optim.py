"""Optax transformations that train adapters and nothing else, and that know A from B."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorax_fn.adapters import LoRAFactors, is_adapter
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

    Also of factors alone: those of some kinds hold frozen arrays (DoRA's norms, VeRA's projections,
    the start of PiSSA), which have no gradient, but which weight decay would change.

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
    _check_transformation("freeze", tx)
    return optax.chain(
        optax.masked(tx, _trained_mask), optax.masked(optax.set_to_zero(), _frozen_mask)
    )


def _trained_mask(tree: Pytree) -> Pytree:
    """`trainable_mask`, of a tree that has to hold adapters.

    Checked here, not in an `init` of `freeze`'s own: `optax.tree_utils.tree_map_params`, which
    places the state on a mesh, initialises an optimiser on a placeholder that masks never see.
    """
    if not any(map(is_adapter, jax.tree.leaves(tree, is_leaf=is_adapter))):
        raise LoraError(
            "the tree to optimise holds no adapter node, so nothing would be trained; wanted the "
            "factors that lora.init made, or a tree that holds them."
        )
    return trainable_mask(tree)


def _check_transformation(name: str, tx: Any) -> None:
    """Raises `LoraError` unless tx is an optax transformation, made already."""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise LoraError(
            f"{name} got a {type(tx).__name__}; wanted an optax transformation, such as "
            "optax.adamw(1e-4)."
        )


def _frozen_mask(tree: Pytree) -> Pytree:
    return jax.tree.map(lambda trained: not trained, trainable_mask(tree))


def param_labels(tree: Pytree) -> Pytree:
    """Labels for `optax.partition`: the name of each trained array's field, else "frozen".

    The names are those of the adapter nodes: "a", "b", "magnitude", "delta", "gain", ….

    Args:
        tree: factors, or any tree that holds adapter nodes.

    >>> import jax, jax.numpy as jnp, optax, lorax_fn as lora
    >>> params = {"w": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    >>> rules = [lora.LoRA("w", rank=1), lora.Full("bias")]
    >>> factors = lora.init(jax.random.key(0), params, rules)
    >>> jax.tree.leaves(lora.param_labels(factors))
    ['delta', 'a', 'b']
    >>> transforms = {"a": optax.adam(1e-4), "b": optax.adam(1e-3), "delta": optax.adam(1e-4)}
    >>> tx = optax.partition(transforms, lora.param_labels)
    """

    def labels(node: Any) -> Any:
        if not is_adapter(node):
            return "frozen"
        trained = node.trainable()
        return dataclasses.replace(trained, **{
            field.name: jax.tree.map(lambda on: field.name if on else "frozen",  # noqa: B023
                                     getattr(trained, field.name))
            for field in dataclasses.fields(trained)
            if not field.metadata.get("static")
        })  # fmt: skip

    return jax.tree.map(labels, tree, is_leaf=is_adapter)


def lora_plus(
    tx: optax.GradientTransformation, ratio: float = 16.0
) -> optax.GradientTransformationExtraArgs:
    """LoRA+: any optimiser, with the learning rate of B `ratio` times that of A.

    Hayou et al. 2024, arXiv:2402.12354. A starts random and B at zero; in wide models they learn
    well at different rates. All other arrays, such as `Full`'s, keep the rate of A. Stands within
    `freeze` or around it. Decoupled weight decay of B is multiplied too.

    Args:
        tx: an optimiser whose updates are proportional to its learning rate, as optax's are.
        ratio: what the updates of B are multiplied by; the paper's advice is about 16.

    Raises:
        LoraError: if ratio is no positive number.

    >>> import jax, jax.numpy as jnp, optax, lorax_fn as lora
    >>> factors = lora.init(jax.random.key(0), {"w": jnp.ones((3, 2))}, [lora.LoRA("w", rank=1)])
    >>> tx = lora.freeze(lora.lora_plus(optax.sgd(1.0), ratio=4))
    >>> grads = jax.tree.map(jnp.ones_like, factors)
    >>> updates, _ = tx.update(grads, tx.init(factors), factors)
    >>> updates["w"].a[0, 0].item(), updates["w"].b[0, 0].item()
    (-1.0, -4.0)
    """
    _check_transformation("lora_plus", tx)
    if not isinstance(ratio, int | float) or not (ratio > 0 and math.isfinite(ratio)):
        raise LoraError(f"ratio={ratio!r}: wanted a positive number, such as 16.")

    def scale_b(updates: Pytree, _: Pytree | None = None) -> Pytree:
        return jax.tree_util.tree_map_with_path(
            lambda path, update: update * ratio if _is_b(path) else update, updates
        )

    return optax.with_extra_args_support(optax.chain(tx, optax.stateless(scale_b)))


def _is_b(path: Any) -> bool:
    """Whether a path of the tree ends at the second factor of an adapter: its field b, b1 or b2."""
    last = path[-1]
    return isinstance(last, jax.tree_util.GetAttrKey) and last.name in ("b", "b1", "b2")


def precondition(delta: float = 1e-6) -> optax.GradientTransformation:
    """Riemannian preconditioning: each factor's gradient in the metric of the other factor.

        g_A ← g_A (B·Bᵀ + δI)⁻¹        g_B ← (Aᵀ·A + δI)⁻¹ g_B

    Zhang & Pilanci 2024, arXiv:2402.02347. Put it before the optimiser:
    `lora.freeze(optax.chain(lora.precondition(), optax.adamw(1e-3)))`. The r×r systems are solved
    in float32, for each layer and expert of a stack. Acts on LoRA and DoRA; with `freeze_a`
    (LoRA-FA) it has to stand outside of `freeze`, which hides A.

    Args:
        delta: keeps the systems regular where a factor is still zero.

    Raises:
        LoraError: if delta is not positive; when updating, without params or where A is hidden.

    >>> import jax, jax.numpy as jnp, optax, lorax_fn as lora
    >>> factors = lora.init(jax.random.key(0), {"w": jnp.ones((3, 2))}, [lora.LoRA("w", rank=1)])
    >>> tx = lora.freeze(optax.chain(lora.precondition(), optax.sgd(1.0)))
    >>> state = tx.init(factors)
    """
    if not isinstance(delta, int | float) or not (delta > 0 and math.isfinite(delta)):
        raise LoraError(f"delta={delta!r}: wanted a small positive number, such as 1e-6.")

    def update(updates: Pytree, params: Pytree | None = None) -> Pytree:
        if params is None:
            raise LoraError(
                "precondition needs the factors: call tx.update(grads, state, factors)."
            )

        def each(grad: Any, node: Any) -> Any:
            if not isinstance(grad, LoRAFactors):
                return grad
            return _preconditioned(grad, node, delta)

        with jax.default_matmul_precision("highest"):
            return jax.tree.map(
                each, updates, params, is_leaf=lambda node: isinstance(node, LoRAFactors)
            )

    return optax.stateless(update)


def _preconditioned(grad: LoRAFactors, node: LoRAFactors, delta: float) -> LoRAFactors:
    hidden = [name for name in "ab" if isinstance(getattr(node, name), optax.MaskedNode)]
    if hidden:
        raise LoraError(
            f"precondition sees no {' and '.join(hidden)}: lora.freeze hides a frozen A, "
            "optax.partition what has another label. Put it outside of them: "
            "optax.chain(lora.precondition(), lora.freeze(tx))."
        )
    n_batch = len(node.axes.batch)
    batch, rank = node.a.shape[:n_batch], node.rank

    def matrix(array: jax.Array, *shape: int) -> jax.Array:
        return array.astype(jnp.float32).reshape(*batch, *shape)

    def solve(gram: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.linalg.solve(gram + delta * jnp.eye(rank).reshape((1,) * n_batch + (rank, rank)),
                                rows)  # fmt: skip

    a, b = matrix(node.a, -1, rank), matrix(node.b, rank, -1)  # (batch…, in, r), (batch…, r, out)
    g_b = solve(jnp.swapaxes(a, -1, -2) @ a, matrix(grad.b, rank, -1))
    b_update = g_b.reshape(node.b.shape).astype(grad.b.dtype)
    if node.freeze_a:
        return dataclasses.replace(grad, b=b_update)
    g_a = solve(b @ jnp.swapaxes(b, -1, -2), jnp.swapaxes(matrix(grad.a, -1, rank), -1, -2))
    a_update = jnp.swapaxes(g_a, -1, -2).reshape(node.a.shape).astype(grad.a.dtype)
    return dataclasses.replace(grad, a=a_update, b=b_update)
