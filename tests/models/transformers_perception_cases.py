"""The Flax models of Hugging Face `transformers` for images and speech."""

import jax
import jax.numpy as jnp
import pytest

from .harness import Model, ModelCase, random_params
from .transformers_text_cases import (
    BART,
    BATCH,
    BERT,
    HEADS,
    MATRIX,
    TOKENS,
    VOCAB,
    WIDTH,
    pretrained,
)

IMAGES = jax.random.normal(jax.random.key(1), (BATCH, 3, 16, 16))
SPEECH = jax.random.normal(jax.random.key(2), (BATCH, 64))
SPECTROGRAM = jax.random.normal(jax.random.key(3), (BATCH, 8, 12))

VISION = dict(
    hidden_size=WIDTH,
    num_hidden_layers=1,
    num_attention_heads=HEADS,
    intermediate_size=12,
    image_size=16,
    patch_size=8,
)


def vision(architecture, config_class, config, **kwargs):
    return lambda: pretrained(architecture, config_class, config, IMAGES, **kwargs)


def regnet_in_training():
    """The Linen module itself: batch statistics are mutable and part of the answer."""
    transformers = pytest.importorskip("transformers")
    config = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4)
    architecture = transformers.FlaxRegNetForImageClassification
    model = architecture(transformers.RegNetConfig(**config), _do_init=False)

    def apply_fn(variables, images):
        out, update = model.module.apply(
            variables, images, deterministic=False, mutable=["batch_stats"]
        )
        return out.logits, update

    images = jnp.transpose(IMAGES, (0, 2, 3, 1))
    return Model(apply_fn, random_params(model.params_shape_tree), [images])


def clip():
    towers = dict(
        text_config=dict(BERT, projection_dim=6, eos_token_id=VOCAB - 1),
        vision_config=dict(VISION, projection_dim=6),
        projection_dim=6,
    )
    tokens = TOKENS.at[:, -1].set(VOCAB - 1)  # the text is read off at its end token
    return pretrained(
        "FlaxCLIPModel", "CLIPConfig", towers, tokens, IMAGES, select="logits_per_image"
    )


def wav2vec2():
    config = dict(
        {k: v for k, v in BERT.items() if k != "max_position_embeddings"},
        conv_dim=(8, 8),
        conv_stride=(2, 2),
        conv_kernel=(4, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
    )
    return pretrained(
        "FlaxWav2Vec2ForCTC", "Wav2Vec2Config", config, SPEECH, init={"input_shape": (1, 64)}
    )


def whisper():
    config = dict(
        {k: v for k, v in BART.items() if k != "max_position_embeddings"},
        num_mel_bins=8,
        max_source_positions=6,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return pretrained(
        "FlaxWhisperForConditionalGeneration",
        "WhisperConfig",
        config,
        SPECTROGRAM,
        init={"input_shape": (1, 8, 12)},
        decoder_input_ids=TOKENS,
    )


KERNEL = r".*/kernel"
RESNET = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck")
CASES = [
    # Whisper stops the gradient at its encoder's (sinusoidal) position table.
    ModelCase("hf whisper", whisper, MATRIX, 20, exclude=".*encoder/embed_positions.*"),
    ModelCase("hf wav2vec2", wav2vec2, KERNEL, 16),
    ModelCase("hf clip", clip, MATRIX, 24),
    ModelCase("hf vit", vision("FlaxViTForImageClassification", "ViTConfig", VISION), KERNEL, 8),
    ModelCase(
        "hf beit",
        vision(
            "FlaxBeitForImageClassification",
            "BeitConfig",
            dict(VISION, use_relative_position_bias=True),
        ),
        r".*/(kernel|relative_position_bias_table)",
        9,
    ),
    ModelCase(
        "hf dinov2",
        vision("FlaxDinov2ForImageClassification", "Dinov2Config", VISION),
        KERNEL,
        8,
    ),
    ModelCase(
        "hf resnet",
        vision("FlaxResNetForImageClassification", "ResNetConfig", RESNET),
        KERNEL,
        9,
    ),
    ModelCase("hf regnet, batch norm", regnet_in_training, KERNEL, 14),
]
