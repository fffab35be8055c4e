"""The Flax models of Hugging Face `transformers` for text: encoders, decoders and both."""

import jax
import jax.numpy as jnp
import pytest

from .harness import Model, ModelCase, random_params

VOCAB, WIDTH, HEADS, LENGTH, BATCH = 24, 8, 2, 6, 2
TOKENS = jnp.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % VOCAB

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


# The name of an argument in the `jnp.clip` for which T5 was written: JAX calls it `max` now.
CLIP = jnp.clip


def clip_as_before(x, *args, a_max=None, **kwargs):
    return CLIP(x, *args, **kwargs if a_max is None else {**kwargs, "max": a_max})


def t5():
    """T5, traced with the `jnp.clip` for which it was written."""
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
        patch.setattr(jnp, "clip", clip_as_before)
        model = pretrained(
            "FlaxT5ForConditionalGeneration",
            "T5Config",
            config,
            TOKENS,
            decoder_input_ids=TOKENS[:, ::-1],
        )

    def apply_fn(*args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jnp, "clip", clip_as_before)
            return model.apply_fn(*args, **kwargs)

    return Model(apply_fn, model.params, model.args, model.kwargs)


MATRIX = r".*/(kernel|embedding)"
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
]
