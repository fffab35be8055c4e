"""Image models: Stable Diffusion's parts, Equinox models of `equimo`, and a Keras graph."""

import os

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from .harness import Model, ModelCase, random_params


def diffusion_unet():
    """The denoiser of Stable Diffusion: ResNet and cross-attention blocks, down and up again."""
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.FlaxUNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=8,
    )
    shapes = jax.eval_shape(lambda: unet.init_weights(jax.random.key(0)))

    def apply_fn(params, latents, step, text):
        return unet.apply({"params": params}, latents, step, text).sample

    latents = jax.random.normal(jax.random.key(1), (1, 4, 8, 8))
    text = jax.random.normal(jax.random.key(2), (1, 3, 8))
    return Model(apply_fn, random_params(shapes), (latents, jnp.array([7]), text))


def diffusion_vae():
    """Encoder and decoder of Stable Diffusion's latent space."""
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.FlaxAutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=8,
    )
    shapes = jax.eval_shape(lambda: vae.init_weights(jax.random.key(0)))

    def apply_fn(params, images):
        return vae.apply({"params": params}, images).sample

    return Model(
        apply_fn, random_params(shapes), [jax.random.normal(jax.random.key(1), (1, 3, 8, 8))]
    )


def equimo(architecture, *args, **config):
    """An Equinox vision model of `equimo`, arrays first; called without dropout."""
    models = pytest.importorskip("equimo.models")
    image = jax.random.normal(jax.random.key(1), (3, 32, 32))
    model = eqx.filter_eval_shape(
        lambda key: getattr(models, architecture)(**config, key=key), jax.random.key(0)
    )
    shapes, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def apply_fn(params, image, key):
        return eqx.combine(params, static)(image, key=key, inference=True)

    return Model(apply_fn, random_params(shapes), (image, jax.random.key(2)))


VIT = dict(img_size=32, in_channels=3, dim=8, patch_size=16, num_heads=2, depths=[1], num_classes=5)
CONVNEXT = dict(in_channels=3, dims=[8] * 2, depths=[1] * 2, num_classes=5)
MAMBA = dict(
    img_size=32, in_channels=3, dim=8, depths=[1, 1, 0, 0], num_heads=[2] * 4, num_classes=5
)


def keras_model():
    """A Keras graph: separable and transposed convolutions, recurrence, attention, EinsumDense."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    layers = keras.layers
    image = keras.Input((8, 8, 3))
    x = layers.SeparableConv2D(8, 3, strides=2, padding="same", activation="relu")(image)
    x = layers.BatchNormalization()(layers.DepthwiseConv2D(3, depth_multiplier=2)(x))
    x = layers.Conv2DTranspose(6, 3, strides=2, activation="relu")(x)
    x = layers.Reshape((-1, 6))(x)
    x = layers.LSTM(6, return_sequences=True)(layers.GroupQueryAttention(4, 2, 1)(x, x))
    x = layers.Bidirectional(layers.GRU(5, return_sequences=True))(x)
    x = layers.EinsumDense("btd,dhk->bthk", output_shape=(None, 2, 3), bias_axes="hk")(x)
    model = keras.Model(image, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))
    names = [variable.path for variable in model.trainable_variables]
    trained = {variable.path: variable.value for variable in model.trainable_variables}
    state = [variable.value for variable in model.non_trainable_variables]

    def apply_fn(params, state, images):
        return model.stateless_call([params[name] for name in names], state, images, training=True)

    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    return Model(apply_fn, random_params(trained), (state, images))


# Biases and layer scales have other names than `weight`; norms and position tables do not.
WEIGHT = dict(targets=".*/weight", exclude=".*(norm|pos_embed).*")
CASES = [
    ModelCase("diffusers unet", diffusion_unet, r".*/kernel", 82, spread=0.1, tolerance=1e-3),
    ModelCase("diffusers vae", diffusion_vae, r".*/kernel", 36),
    ModelCase("equimo vit", lambda: equimo("VisionTransformer", **VIT), adapted=6, **WEIGHT),
    ModelCase("equimo convnext", lambda: equimo("ConvNeXt", **CONVNEXT), adapted=9, **WEIGHT),
    ModelCase("equimo mamba", lambda: equimo("Vssd", **MAMBA), adapted=29, **WEIGHT),
    ModelCase("keras layers", keras_model, ".*kernel", 16),
]
