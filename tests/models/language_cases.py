"""Language models of `tunix`, `penzai` and `jaxrwkv`: tied heads, stacks, experts, recurrence."""

import jax
import jax.numpy as jnp
import pytest

from .harness import Model, ModelCase, random_params
from .nnx_cases import functional

VOCAB, LENGTH, BATCH = 24, 6, 2
TOKENS = jnp.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % VOCAB
POSITIONS = jnp.tile(jnp.arange(LENGTH), (BATCH, 1))
CAUSAL = jnp.tile(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), (BATCH, 1, 1))


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


def rwkv(version, implementation):
    """RWKV: a linear-attention recurrence, its layers a rematerialised scan over stacked params."""
    module = pytest.importorskip(f"jaxrwkv.{version}")
    model = getattr(module, implementation)

    def make():
        params, _ = model.randomize_weights(jax.random.key(0), 2, 64, VOCAB, None, jnp.float32)
        return params, model.default_state(params, None)

    shapes, state = jax.eval_shape(make)

    def apply_fn(params, tokens, state):
        return model.forward(params, tokens, state)

    return Model(apply_fn, random_params(shapes), (TOKENS[0], jnp.zeros(state.shape, state.dtype)))


TUNIX = r".*/(w|kernel|input_embedding|per_layer_input_embedding)"
EXPERTS = TUNIX + r"|.*/(gate_proj|up_proj|down_proj|gating_einsum|linear|router_logits)"
PENZAI = r".*/(weights|embeddings)/value/data_array"
PENZAI_NORMS = r".*(/0|body/sublayers/\d)/sublayers/1/weights/.*"
RWKV = dict(targets=r"(emb|head)/weight|.*/(att|ffn)/(\w+/weight|\w+[12])", exclude=".*/ln_x/.*")
CASES = [
    ModelCase("tunix qwen3", qwen3, TUNIX, 16, exclude=".*norm.*"),
    ModelCase("tunix qwen3, remat, tied", qwen3_remat, TUNIX, 15, exclude=".*norm.*"),
    ModelCase("tunix qwen3 experts", qwen3_experts, EXPERTS, 18, exclude=".*norm.*"),
    ModelCase("tunix llama3, tied", llama3, TUNIX, 15, exclude=".*norm.*"),
    ModelCase("tunix gemma3", gemma3, TUNIX, 13),
    ModelCase("tunix gemma4 experts", gemma4_experts, EXPERTS, 25),
    ModelCase("penzai llama", lambda: penzai_llama(False), PENZAI, 16, exclude=PENZAI_NORMS),
    ModelCase(
        "penzai llama, stacked, tied", lambda: penzai_llama(True), PENZAI, 9, exclude=PENZAI_NORMS
    ),
    ModelCase("penzai gpt-neox", penzai_neox, PENZAI, 8, exclude=PENZAI_NORMS),
    ModelCase("rwkv6, scan", lambda: rwkv("rwkv6", "ScanRWKV"), adapted=14, **RWKV),
    ModelCase(
        "rwkv7, associative scan",
        lambda: rwkv("rwkv7", "AssociativeScanRWKV"),
        adapted=16,
        **RWKV,
    ),
]
