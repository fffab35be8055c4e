"""Models from further packages: a diffusion U-Net, language models, experts, vision, recurrence."""

import os

import jax
import jax.numpy as jnp
import pytest

from .harness import Model, ModelCase, random_params
from .nnx_cases import functional

VOCAB, LENGTH, BATCH = 24, 6, 2
TOKENS = jnp.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % VOCAB
POSITIONS = jnp.tile(jnp.arange(LENGTH), (BATCH, 1))
CAUSAL = jnp.tile(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), (BATCH, 1, 1))


# diffusers


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


# tunix


def tunix(module, architecture, *args, config=None, **kwargs):
    """An NNX language model of `tunix` as a function of its state."""
    package = pytest.importorskip(f"tunix.models.{module}.model")
    settings = package.ModelConfig(**(config or {}))
    return functional(
        lambda rngs: getattr(package, architecture)(settings, rngs=rngs), *args, **kwargs
    )


QWEN = dict(
    num_layers=2,
    vocab_size=VOCAB,
    embed_dim=8,
    hidden_dim=12,
    num_heads=4,
    head_dim=4,
    num_kv_heads=2,
    rope_theta=10_000,
    norm_eps=1e-6,
)
GEMMA = dict(
    num_layers=2,
    num_embed=VOCAB,
    embed_dim=8,
    hidden_dim=12,
    num_heads=2,
    head_dim=4,
    num_kv_heads=1,
    sliding_window_size=4,
    param_dtype=jnp.float32,
)


def qwen3(**extra):
    return tunix("qwen3", "Qwen3", TOKENS, POSITIONS, None, CAUSAL, config=dict(QWEN, **extra))


def qwen3_remat():
    package = pytest.importorskip("tunix.models.qwen3.model")
    return qwen3(remat_config=package.RematConfig.BLOCK, use_tied_embedding=True)


def qwen3_experts():
    """Experts picked from their stack one by one, tokens dispatched by one-hot einsums."""
    return qwen3(num_experts=4, num_experts_per_tok=2)


def llama3():
    config = dict(QWEN, weight_tying=True)
    return tunix("llama3", "Llama3", TOKENS, POSITIONS, None, CAUSAL, config=config)


def gemma3():
    return tunix("gemma3", "Gemma3", TOKENS, POSITIONS, None, CAUSAL, config=GEMMA)


def gemma4_experts():
    """Routed experts by `ragged_dot`, per-layer inputs, and keys that double as values."""
    config = dict(
        GEMMA,
        global_key_size=4,
        per_layer_input_dim=4,
        enable_moe=True,
        num_experts=4,
        num_experts_per_tok=2,
        expert_dim=6,
        moe_dense_hidden_dim=12,
    )
    return tunix("gemma4", "Gemma4", TOKENS, POSITIONS, None, CAUSAL, config=config)


# penzai


def penzai(build):
    """A penzai model, frozen into an immutable pytree of named arrays."""
    pytest.importorskip("penzai")
    from penzai import pz

    model = jax.jit(lambda: pz.freeze_params(build()))()
    tokens = pz.nx.wrap(TOKENS).tag("batch", "seq")
    positions = pz.nx.wrap(POSITIONS).tag("batch", "seq")

    def apply_fn(model, tokens, positions):
        return model(tokens, token_positions=positions).unwrap("batch", "seq", "vocabulary")

    return Model(apply_fn, model, (tokens, positions))


def penzai_llama(stacked):
    pytest.importorskip("penzai")
    from penzai.models.transformer.variants import llamalike_common as llamalike

    config = llamalike.LlamalikeTransformerConfig(
        num_kv_heads=2,
        query_head_multiplier=2,
        embedding_dim=8,
        projection_dim=4,
        mlp_hidden_dim=12,
        num_decoder_blocks=2,
        vocab_size=VOCAB,
        mlp_variant="swiglu",
        tie_embedder_and_logits=stacked,
        use_layer_stack=stacked,
    )
    return penzai(lambda: llamalike.build_llamalike_transformer(config, jax.random.key(0)))


def penzai_neox():
    pytest.importorskip("penzai")
    from penzai.models.transformer.variants import gpt_neox

    config = gpt_neox.GPTNeoXTransformerConfig(
        num_attention_heads=2,
        embedding_dim=8,
        projection_dim=4,
        mlp_hidden_dim=12,
        num_decoder_blocks=1,
        vocab_size=VOCAB,
        activation_fn="gelu_exact",
        rope_subset_size=2,
        rope_wavelength=10_000,
        layernorm_epsilon=1e-5,
        parameter_dtype=jnp.float32,
        activation_dtype=jnp.float32,
    )
    return penzai(lambda: gpt_neox.build_gpt_neox_transformer(config, jax.random.key(0)))


# equimo


def equimo(architecture, *args, **config):
    """An Equinox vision model of `equimo`, arrays first; called without dropout."""
    models = pytest.importorskip("equimo.models")
    import equinox as eqx

    image = jax.random.normal(jax.random.key(1), (3, 32, 32))
    model = eqx.filter_eval_shape(
        lambda key: getattr(models, architecture)(**config, key=key), jax.random.key(0)
    )
    shapes, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def apply_fn(params, image, key):
        return eqx.combine(params, static)(image, key=key, inference=True)

    return Model(apply_fn, random_params(shapes), (image, jax.random.key(2)))


VIT = dict(img_size=32, in_channels=3, dim=8, patch_size=16, num_heads=2, depths=[1], num_classes=5)


# keras


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

    images = jax.random.normal(jax.random.key(1), (BATCH, 8, 8, 3))
    return Model(apply_fn, random_params(trained), (state, images))


# jaxrwkv


def rwkv(version, implementation):
    """RWKV: a linear-attention recurrence, its layers a rematerialised scan over stacked params."""
    module = pytest.importorskip(f"jaxrwkv.{version}")
    model = getattr(module, implementation)
    make = lambda: model.randomize_weights(jax.random.key(0), 2, 64, VOCAB, None, jnp.float32)[0]
    params = random_params(jax.eval_shape(make))
    state = jax.eval_shape(lambda p: model.default_state(p, None), params)

    def apply_fn(params, tokens, state):
        return model.forward(params, tokens, state)

    return Model(apply_fn, params, (TOKENS[0], jnp.zeros(state.shape, state.dtype)))


TUNIX = r".*/(w|kernel|input_embedding|per_layer_input_embedding)"
EXPERTS = TUNIX + r"|.*/(gate_proj|up_proj|down_proj|gating_einsum|linear|router_logits)"
PENZAI = r".*/(weights|embeddings)/value/data_array"
PENZAI_NORMS = r".*(/0|body/sublayers/\d)/sublayers/1/weights/.*"
RWKV = r"(emb|head)/weight|.*/(att|ffn)/(\w+/weight|\w*w[12])"
CASES = [
    ModelCase("diffusers unet", diffusion_unet, r".*/kernel", 82),
    ModelCase("diffusers vae", diffusion_vae, r".*/kernel", 36),
    ModelCase("tunix qwen3", qwen3, TUNIX, 16, exclude=".*norm.*"),
    ModelCase("tunix qwen3, remat, tied", qwen3_remat, TUNIX, 15, exclude=".*norm.*"),
    ModelCase("tunix qwen3 experts", qwen3_experts, EXPERTS, 18, exclude=".*norm.*"),
    ModelCase("tunix llama3, tied", llama3, TUNIX, 15, exclude=".*norm.*"),
    ModelCase("tunix gemma3", gemma3, TUNIX, 13),
    ModelCase("tunix gemma4 experts", gemma4_experts, EXPERTS, 25),
    ModelCase("penzai llama", lambda: penzai_llama(False), PENZAI, 16, exclude=PENZAI_NORMS),
    ModelCase("penzai llama, stacked, tied", lambda: penzai_llama(True), PENZAI, 9, exclude=PENZAI_NORMS),
    ModelCase("penzai gpt-neox", penzai_neox, PENZAI, 8, exclude=PENZAI_NORMS),
    ModelCase(
        "equimo vit",
        lambda: equimo("VisionTransformer", **VIT),
        ".*/weight",
        6,
        exclude=".*(norm|pos_embed).*",
    ),
    ModelCase("keras layers", keras_model, ".*kernel", 16),
    ModelCase("rwkv6, scan", lambda: rwkv("rwkv6", "ScanRWKV"), RWKV, 14, exclude=".*ln_x.*"),
    ModelCase(
        "rwkv7, associative scan",
        lambda: rwkv("rwkv7", "AssociativeScanRWKV"),
        RWKV,
        14,
        exclude=".*ln_x.*",
    ),
]
