"""The models of `peft_cases` in JAX, with the same weights: Hugging Face's Flax ports, tunix's, ours.

The weights are put in place by other means than the names under test: by tunix's own loader, and
for Flax by the few lines below.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

import lorax_fn as lora
from tests.io import peft_cases
from tests.io.peft_cases import EXPERTS, INNER, LAYERS, WIDTH, weight


@dataclasses.dataclass(frozen=True)
class JaxModel:
    """`apply_fn(params, *args)` answers as the PyTorch model does."""

    apply_fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    names: Any = None
    axes: bool = False  # whether `load_peft` needs the axes


FLAX = {
    "llama": "FlaxLlamaForCausalLM",
    "mistral": "FlaxMistralForCausalLM",
    "gemma": "FlaxGemmaForCausalLM",
    "bert": "FlaxBertForSequenceClassification",
    "vit": "FlaxViTForImageClassification",
    "gpt2": "FlaxGPT2LMHeadModel",
}


def flax(model):
    import transformers

    transformers.logging.set_verbosity_error()
    config, arguments = peft_cases.MODELS[model]
    config = getattr(transformers, config)(**arguments)
    built = getattr(transformers, FLAX[model])(config, _do_init=False)

    def fill(key_path, leaf):
        *modules, own = [entry.key for entry in key_path]
        name = ".".join([*modules, "bias" if own == "bias" else "weight"])
        if own in ("cls_token", "position_embeddings", "mask_token"):
            return weight(".".join([*modules, own]), leaf.shape)
        if own != "kernel":
            return weight(name, leaf.shape)
        if len(leaf.shape) == 4:
            height, width, channels, out = leaf.shape
            return weight(name, (out, channels, height, width)).transpose(2, 3, 1, 0)
        return weight(name, leaf.shape[::-1]).T

    params = jax.tree_util.tree_map_with_path(fill, built.params_shape_tree)
    args = jnp.asarray(peft_cases.inputs(model))

    def apply_fn(params, inputs):
        return built(inputs, params=params)[0]

    return JaxModel(apply_fn, params, (args,), "gpt2" if model == "gpt2" else None)


TUNIX = {
    "num_layers": 2,
    "embed_dim": 32,
    "hidden_dim": 48,
    "num_heads": 4,
    "head_dim": 8,
    "num_kv_heads": 2,
}
ROPE = {"vocab_size": 40, "rope_theta": 1_000_000, "norm_eps": 1e-6}
TUNIX_MODELS = {
    "llama3": ("llama3", ROPE, "params"),
    "qwen2": ("qwen2", ROPE, "params"),
    "qwen3": ("qwen3", ROPE, "params"),
    "gemma2": ("gemma", None, "params_safetensors"),
}


def tunix(model, folder):
    """tunix's model, filled by tunix's own loader from a file as Hugging Face has it."""
    import importlib

    from flax import nnx

    module, extra, loader = TUNIX_MODELS[model]
    package = importlib.import_module(f"tunix.models.{module}.model")
    if extra is None:
        extra = {
            "num_embed": 40,
            "final_logit_softcap": 30.0,
            "attn_logits_soft_cap": 50.0,
            "use_post_attn_norm": True,
            "use_post_ffw_norm": True,
            "attention_types": (package.AttentionType.GLOBAL,) * 2,
        }
    config = package.ModelConfig(**TUNIX, **extra)
    safetensors.numpy.save_file(decoder_weights(model), folder / "model.safetensors")
    load = importlib.import_module(f"tunix.models.{module}.{loader}").create_model_from_safe_tensors
    built = load(str(folder), config)
    graphdef, params = nnx.split(built)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    tokens = jnp.asarray(peft_cases.inputs(model))
    batch, length = tokens.shape
    positions = jnp.tile(jnp.arange(length), (batch, 1))
    causal = jnp.tile(jnp.tril(jnp.ones((length, length), bool)), (batch, 1, 1))

    def apply_fn(params, tokens, positions, causal):
        return nnx.merge(graphdef, params)(tokens, positions, None, causal)[0]

    return JaxModel(apply_fn, params, (tokens, positions, causal), "tunix")


def decoder_weights(model):
    """The state of the PyTorch decoder, by its own names."""
    d, inner, kv, vocab = 32, 48, 16, 40
    shapes = {"model.embed_tokens": (vocab, d), "model.norm": (d,)}
    if model != "gemma2":
        shapes["lm_head"] = (vocab, d)
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj": (d, d),
            f"{layer}.self_attn.k_proj": (kv, d),
            f"{layer}.self_attn.v_proj": (kv, d),
            f"{layer}.self_attn.o_proj": (d, d),
            f"{layer}.mlp.gate_proj": (inner, d),
            f"{layer}.mlp.up_proj": (inner, d),
            f"{layer}.mlp.down_proj": (d, inner),
            f"{layer}.input_layernorm": (d,),
            f"{layer}.post_attention_layernorm": (d,),
        }
        if model == "gemma2":
            shapes |= {f"{layer}.{at}_feedforward_layernorm": (d,) for at in ("pre", "post")}
        if model == "qwen3":
            shapes |= {f"{layer}.self_attn.{x}_norm": (8,) for x in "qk"}
    weights = {f"{name}.weight": weight(f"{name}.weight", shape) for name, shape in shapes.items()}
    if model == "qwen2":
        for i in range(2):
            for x, n in (("q", d), ("k", kv), ("v", kv)):
                name = f"model.layers.{i}.self_attn.{x}_proj.bias"
                weights[name] = weight(name, (n,))
    return weights


def experts(transposed):
    """Every expert on every row; the kernels are (E, in, out) here, whatever PyTorch has."""
    shapes = {"up_proj": (EXPERTS, WIDTH, INNER), "down_proj": (EXPERTS, INNER, WIDTH)}

    def kernel(name, shape):
        if transposed:
            return weight(f"experts.{name}", shape)
        return weight(f"experts.{name}", (shape[0], shape[2], shape[1])).transpose(0, 2, 1)

    params = {
        "router": {
            "kernel": weight("router.weight", (EXPERTS, WIDTH)).T,
            "bias": weight("router.bias", (EXPERTS,)),
        },
        "experts": {name: kernel(name, shape) for name, shape in shapes.items()},
    }

    def apply_fn(params, x):
        hidden = jnp.tanh(jnp.einsum("rd,edk->erk", x, params["experts"]["up_proj"]))
        answers = jnp.einsum("erk,ekd->erd", hidden, params["experts"]["down_proj"])
        logits = x @ params["router"]["kernel"] + params["router"]["bias"][None]
        return jnp.einsum("erd,re->rd", answers, jax.nn.softmax(logits))

    # PEFT's A faces the inputs in both: the last dim of (E, out, in), the middle one of the other,
    # whose module says `is_transposed`.
    names = {
        r"router/kernel": "router.weight",
        r"router/bias": "router.bias",
        r"experts/(\w+)_proj": r"experts.\1_proj",
    }
    args = (jnp.asarray(peft_cases.inputs("experts-transposed" if transposed else "experts")),)
    return JaxModel(apply_fn, params, args, names, axes=True)


def stack():
    """The blocks under one scan, their kernels and biases stacked."""

    def leaf(own, *shape):
        stacked = [weight(f"blocks.{i}.{own}", shape) for i in range(LAYERS)]
        return np.stack([w.T for w in stacked])

    params = {
        "up": {"kernel": leaf("up.weight", INNER, WIDTH), "bias": leaf("up.bias", INNER)},
        "down": {"kernel": leaf("down.weight", WIDTH, INNER), "bias": leaf("down.bias", WIDTH)},
    }

    def block(x, layer):
        hidden = jnp.tanh(x @ layer["up"]["kernel"] + layer["up"]["bias"][None])
        return x + hidden @ layer["down"]["kernel"] + layer["down"]["bias"][None], None

    def apply_fn(params, x):
        return jax.lax.scan(block, x, params)[0]

    names = {
        r"(up|down)/kernel": r"blocks.{}.\1.weight",
        r"(up|down)/bias": r"blocks.{}.\1.bias",
    }
    args = (jnp.asarray(peft_cases.inputs("stack")),)
    return JaxModel(apply_fn, params, args, names)


def answer(model, factors):
    """What the model says with these factors."""
    apply = jax.jit(lora.wrap(model.apply_fn, dense="allow"))
    with third_party():
        return np.asarray(apply(model.params, factors, *model.args))


def axes_of(model):
    """The roles of the dims of every leaf."""
    with third_party():
        return lora.infer_axes(model.apply_fn, model.params, *model.args)


@contextlib.contextmanager
def third_party():
    """Other people's models mix dtypes and ranks as they please."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
