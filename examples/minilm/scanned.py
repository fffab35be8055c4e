"""The classifier with its layers stacked: one `lax.scan` over them, each rematerialised."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from minilm.encoder import Config, Embeddings, Layer, pool

Pytree = Any


@dataclasses.dataclass(frozen=True)
class ScannedClassifier:
    """`encoder.Classifier` on `stack_layers` of its variables: logits (batch, classes).

    `gather` is what becomes of a layer's params just before they are used, forward and backward.
    """

    classes: int
    config: Config = dataclasses.field(default_factory=Config)
    gather: Callable[[Pytree], Pytree] = lambda params: params

    def apply(self, variables: Pytree, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Token ids and their mask, both (batch, time), to logits (batch, classes)."""
        params, config = variables["params"], self.config

        @jax.checkpoint
        def layer(x: jax.Array, own: Pytree) -> tuple[jax.Array, None]:
            return Layer(config).apply({"params": self.gather(own)}, x, mask.astype(bool)), None

        x = Embeddings(config).apply({"params": params["bert"]["embeddings"]}, ids)
        x, _ = jax.lax.scan(layer, x, params["bert"]["encoder"]["layer"])  # (batch, time, width)
        features = pool(x, mask) * config.feature_scale
        return nn.Dense(self.classes).apply({"params": params["classifier"]}, features)


def stack_layers(variables: Pytree) -> Pytree:
    """The variables of `encoder.Classifier`, the layers' params stacked along a new first dim."""
    bert = variables["params"]["bert"]
    layers = bert["encoder"]["layer"]
    stacked = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *[layers[k] for k in sorted(layers, key=int)]
    )
    bert = bert | {"encoder": {"layer": stacked}}
    return {"params": variables["params"] | {"bert": bert}}
