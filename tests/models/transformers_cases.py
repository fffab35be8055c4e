"""The Flax models of Hugging Face `transformers`: text, vision, speech, and encoder–decoders."""

import jax
import jax.numpy as jnp
import pytest

from .harness import Model, ModelCase, random_params

VOCAB, WIDTH, HEADS, LENGTH, BATCH = 24, 8, 2, 6, 2
TOKENS = jnp.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % VOCAB
IMAGES = jax.random.normal(jax.random.key(1), (BATCH, 3, 16, 16))
SPEECH = jax.random.normal(jax.random.key(2), (BATCH, 64))
SPECTROGRAM = jax.random.normal(jax.random.key(3), (BATCH, 8, 12))

# The same sizes under the names that the families of configurations give them.
BERT = dict(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    intermediate_size=12,
    max_position_embeddings=16,
)
GPT = dict(vocab_size=VOCAB, n_positions=16, n_embd=WIDTH, n_layer=2, n_head=HEADS)
LLAMA = dict(BERT, num_key_value_heads=1)
BART = dict(
    vocab_size=VOCAB,
    d_model=WIDTH,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=HEADS,
    decoder_attention_heads=HEADS,
    encoder_ffn_dim=12,
    decoder_ffn_dim=12,
    max_position_embeddings=16,
    decoder_start_token_id=2,
)
VISION = dict(
    hidden_size=WIDTH,
    num_hidden_layers=1,
    num_attention_heads=HEADS,
    intermediate_size=12,
    image_size=16,
    patch_size=8,
)


def pretrained(architecture, config_class, config, *args, select=0, init=None, **kwargs):
    """A Flax model with random params; its answer is entry `select` of the model's output."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    settings = getattr(transformers, config_class)(**config)
    model = getattr(transformers, architecture)(settings, _do_init=False, **(init or {}))

    def apply_fn(params, *args, **kwargs):
        return model(*args, params=params, **kwargs)[select]

    return Model(apply_fn, random_params(model.params_shape_tree), args, kwargs)


def text(architecture, config_class, config):
    return lambda: pretrained(architecture, config_class, config, TOKENS)


def encoder_decoder(architecture, config_class, config):
    return lambda: pretrained(
        architecture, config_class, config, TOKENS, decoder_input_ids=TOKENS[:, ::-1]
    )


def vision(architecture, config_class, config, **kwargs):
    return lambda: pretrained(architecture, config_class, config, IMAGES, **kwargs)


def bert_in_training():
    """Dropout on: a function of the params, the tokens and the key."""
    return pretrained(
        "FlaxBertForSequenceClassification",
        "BertConfig",
        BERT,
        TOKENS,
        train=True,
        dropout_rng=jax.random.key(4),
    )


def gpt2_with_cache():
    """One decoding step; the attention caches are an argument and part of the answer."""
    model = pretrained("FlaxGPT2LMHeadModel", "GPT2Config", GPT, TOKENS)
    transformers = pytest.importorskip("transformers")
    step = transformers.FlaxGPT2LMHeadModel(transformers.GPT2Config(**GPT), _do_init=False)
    shapes = jax.eval_shape(lambda: step.init_cache(BATCH, 8))
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def apply_fn(params, cache, token, position):
        mask = jnp.ones((BATCH, 8), jnp.int32)
        out = step(token, mask, position, params=params, past_key_values=cache)
        return out.logits, out.past_key_values

    positions = jnp.zeros((BATCH, 1), jnp.int32)
    return Model(apply_fn, model.params, (cache, TOKENS[:, :1], positions))


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
    return pretrained(
        "FlaxCLIPModel", "CLIPConfig", towers, TOKENS, IMAGES, select="logits_per_image"
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


def t5():
    """T5 was written for a `jnp.clip` with `a_max`, which JAX renamed to `max`."""
    config = dict(
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_kv=4,
        d_ff=12,
        num_layers=1,
        num_heads=HEADS,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jnp, "clip", _clip_as_before)
        model = pretrained(
            "FlaxT5ForConditionalGeneration",
            "T5Config",
            config,
            TOKENS,
            decoder_input_ids=TOKENS[:, ::-1],
        )

    def apply_fn(*args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jnp, "clip", _clip_as_before)
            return model.apply_fn(*args, **kwargs)

    return Model(apply_fn, model.params, model.args, model.kwargs)


def _clip_as_before(x, a_min=None, a_max=None, *, min=None, max=None):
    if a_min is not None or a_max is not None:
        min, max = a_min, a_max
    return jax.numpy.minimum(jnp.maximum(x, x if min is None else min), x if max is None else max)


KERNEL, MATRIX = r".*/kernel", r".*/(kernel|embedding)"
RESNET = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck")
CASES = [
    ModelCase("hf bert", text("FlaxBertForMaskedLM", "BertConfig", BERT), MATRIX, 16),
    ModelCase("hf bert, dropout", bert_in_training, MATRIX, 17),
    ModelCase(
        "hf roberta",
        text("FlaxRobertaForMaskedLM", "RobertaConfig", dict(BERT, pad_token_id=1)),
        MATRIX,
        16,
    ),
    ModelCase(
        "hf albert",
        text("FlaxAlbertForMaskedLM", "AlbertConfig", dict(BERT, embedding_size=4)),
        MATRIX,
        11,
    ),
    ModelCase(
        "hf distilbert",
        text(
            "FlaxDistilBertForMaskedLM",
            "DistilBertConfig",
            dict(vocab_size=VOCAB, dim=WIDTH, n_layers=1, n_heads=HEADS, hidden_dim=12),
        ),
        MATRIX,
        9,
    ),
    ModelCase("hf gpt2", text("FlaxGPT2LMHeadModel", "GPT2Config", GPT), MATRIX, 10),
    ModelCase("hf gpt2, cached decoding", gpt2_with_cache, MATRIX, 10),
    ModelCase(
        "hf gpt-j", text("FlaxGPTJForCausalLM", "GPTJConfig", dict(GPT, rotary_dim=4)), MATRIX, 14
    ),
    ModelCase(
        "hf bloom",
        text(
            "FlaxBloomForCausalLM",
            "BloomConfig",
            dict(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=1, n_head=HEADS),
        ),
        MATRIX,
        5,
    ),
    ModelCase("hf llama", text("FlaxLlamaForCausalLM", "LlamaConfig", LLAMA), MATRIX, 16),
    ModelCase("hf mistral", text("FlaxMistralForCausalLM", "MistralConfig", LLAMA), MATRIX, 16),
    ModelCase(
        "hf gemma",
        text("FlaxGemmaForCausalLM", "GemmaConfig", dict(LLAMA, head_dim=4)),
        MATRIX,
        15,
    ),
    ModelCase(
        "hf bart",
        encoder_decoder("FlaxBartForConditionalGeneration", "BartConfig", BART),
        MATRIX,
        19,
    ),
    ModelCase("hf t5", t5, MATRIX, 22),
    ModelCase("hf whisper", whisper, MATRIX, 21),
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
