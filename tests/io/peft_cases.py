"""Adapters that PEFT and this library both compute with, described without either.

The models are tiny and random: each weight is drawn from its own name in the PyTorch model, so
that both sides have it without a file. Needs numpy alone, since PyTorch and JAX are not installed
in one environment.
"""

import zlib

import numpy as np

DECODER = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rope_theta": 1e4,
}
ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 3,
}
# The config's class in transformers, and its arguments.
MODELS = {
    "llama": ("LlamaConfig", DECODER | {"tie_word_embeddings": False}),
    "llama3": ("LlamaConfig", DECODER | {"tie_word_embeddings": False, "rope_theta": 1e6}),
    "mistral": ("MistralConfig", DECODER | {"tie_word_embeddings": False}),
    "gemma": ("GemmaConfig", DECODER | {"head_dim": 8}),
    "gemma2": ("Gemma2Config", DECODER | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "qwen2": ("Qwen2Config", DECODER | {"tie_word_embeddings": False, "rope_theta": 1e6}),
    "qwen3": (
        "Qwen3Config",
        DECODER | {"head_dim": 8, "tie_word_embeddings": False, "rope_theta": 1e6},
    ),
    "bert": ("BertConfig", ENCODER | {"vocab_size": 40, "max_position_embeddings": 16}),
    "vit": ("ViTConfig", ENCODER | {"image_size": 8, "patch_size": 4}),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 16},
    ),
}

SCALED = {"r": 2, "lora_alpha": 5}
# The model, and the arguments of a LoraConfig.
CASES = {
    "llama": ("llama", SCALED | {"target_modules": ["q_proj", "v_proj", "gate_proj"]}),
    "llama-patterns": (
        "llama",
        SCALED
        | {
            "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"],
            "use_rslora": True,
            "rank_pattern": {"k_proj": 3, r"layers.1.self_attn.q_proj": 4},
            "alpha_pattern": {"down_proj": 7, r".*\.0\.self_attn\.q_proj": 2.5},
        },
    ),
    "llama-dora": ("llama", SCALED | {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "llama-embedding": (
        "llama",
        SCALED | {"target_modules": ["embed_tokens", "v_proj"], "modules_to_save": ["lm_head"]},
    ),
    "llama-layers": (
        "llama",
        SCALED | {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ),
    "llama3": (
        "llama3",
        SCALED
        | {
            "target_modules": ["embed_tokens", "q_proj", "v_proj", "o_proj"],
            "rank_pattern": {"v_proj": 3},
            "use_dora": True,
        },
    ),
    "mistral": ("mistral", SCALED | {"target_modules": ["q_proj", "down_proj"]}),
    "gemma": ("gemma", SCALED | {"target_modules": ["q_proj", "v_proj", "o_proj"]}),
    "gemma2": ("gemma2", SCALED | {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    "qwen2": ("qwen2", SCALED | {"target_modules": ["k_proj", "up_proj"], "bias": "lora_only"}),
    "qwen3": ("qwen3", SCALED | {"target_modules": ["q_proj", "o_proj", "gate_proj", "lm_head"]}),
    "bert": (
        "bert",
        SCALED
        | {
            "target_modules": ["query", "value", "word_embeddings"],
            "modules_to_save": ["classifier"],
            "bias": "lora_only",
        },
    ),
    "gpt2": (
        "gpt2",
        SCALED | {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
    "gpt2-dora": (
        "gpt2",
        SCALED | {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "vit": (
        "vit",
        SCALED | {"target_modules": ["query", "projection"], "modules_to_save": ["classifier"]},
    ),
    "vit-dora": ("vit", SCALED | {"target_modules": ["projection", "value"], "use_dora": True}),
    "experts": (
        "experts",
        SCALED
        | {
            "target_modules": ["router"],
            "target_parameters": ["experts.up_proj", "experts.down_proj"],
            "rank_pattern": {r"experts.down_proj": 3},
        },
    ),
    "experts-transposed": (
        "experts-transposed",
        SCALED | {"target_modules": [], "target_parameters": ["up_proj", "down_proj"]},
    ),
    "stack": ("stack", SCALED | {"target_modules": ["up", "down"]}),
    "stack-dora": ("stack", SCALED | {"target_modules": ["up"], "use_dora": True}),
}

EXPERTS, WIDTH, INNER, LAYERS = 4, 12, 20, 3


def weight(name, shape):
    """A weight of a model, by its name in PyTorch; those of norms are about one."""
    draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    is_norm = len(shape) == 1 and name.endswith("weight")
    return (0.25 * draw + is_norm).astype(np.float32)


def inputs(model):
    """What a model is given: tokens, pixels (batch, channels, height, width), or features."""
    rng = np.random.RandomState(len(model))
    if model == "vit":
        return rng.standard_normal((2, 3, 8, 8)).astype(np.float32)
    if model in ("experts", "experts-transposed", "stack"):
        return rng.standard_normal((5, WIDTH)).astype(np.float32)
    return rng.randint(0, 40, (2, 6))
