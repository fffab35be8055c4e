"""A small residual network in Flax Linen, with one head for each half of the digits.

There is no LoRA in here: the model is an ordinary function of its params.
"""

import flax.linen as nn
import jax

from digits.data import CLASSES


class Block(nn.Module):
    """Two 3 × 3 convolutions on normalised inputs, and a way past them."""

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        strides = (self.stride, self.stride)
        normal = nn.relu(nn.GroupNorm(8, name="norm_in")(x))
        past = x
        if x.shape[-1] != self.width:
            past = nn.Conv(self.width, (1, 1), strides, use_bias=False, name="past")(normal)
        x = nn.Conv(self.width, (3, 3), strides, use_bias=False, name="conv_in")(normal)
        x = nn.relu(nn.GroupNorm(8, name="norm_out")(x))
        return past + nn.Conv(self.width, (3, 3), use_bias=False, name="conv_out")(x)


class ConvNet(nn.Module):
    """Images (batch, 8, 8, 1) to {"old" and "new": logits (batch, classes)}."""

    width: int = 32

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        x = nn.Conv(self.width, (3, 3), use_bias=False, name="stem")(images)  # (batch, 8, 8, width)
        x = Block(self.width, name="block_0")(x)
        x = Block(2 * self.width, stride=2, name="block_1")(x)  # (batch, 4, 4, 2 width)
        x = Block(4 * self.width, stride=2, name="block_2")(x)  # (batch, 2, 2, 4 width)
        x = nn.relu(nn.GroupNorm(8, name="norm")(x)).mean(axis=(1, 2))  # (batch, 4 width)
        return {half: nn.Dense(CLASSES, name=f"head_{half}")(x) for half in ("old", "new")}
