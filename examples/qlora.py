"""QLoRA: fine-tune the sentence encoder all-MiniLM-L6-v2 on a frozen base of 4 bits a weight.

The task and the model are those of `finetune_minilm.py`. The encoder's matrices and embeddings are
quantised by `lora.quantize`; LoRA learns on top of them, once from the quantised base and, for
comparison, once from the floating one. With `--loftq` the factors start at what quantising took
away from the encoder's kernels. Needs the extra `quant`.

    python examples/qlora.py                          # NF4 in blocks of 64
    python examples/qlora.py --dtype int8 --loftq
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
from minilm import data, weights
from minilm.data import Split
from minilm.encoder import Classifier
from minilm.linear_head import head_on_encoder
from minilm.options import positive
from minilm.training import Run, fit, nbytes, optimiser

import lorax_fn as lora

Pytree = Any

KERNELS = r".*/encoder/.*/kernel"
EMBEDDINGS = r".*/(word|position)_embeddings/embedding"
HEAD = lora.Full(r".*/classifier/.*")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--dtype", choices=["nf4", "int4", "int8", "float8_e4m3"], default="nf4")
    add("--block", type=positive, default=64, help="weights that share a scale")
    add("--loftq", action="store_true", help="start the factors at what quantising took away")
    add("--rank", type=positive, default=8, help="rank of the factors")
    add("--alpha", type=float, default=16.0, help="the update is scaled by alpha / rank")
    add("--lr", type=float, default=2e-3, help="peak learning rate")
    add("--steps", type=positive, default=100, help="training steps")
    add("--batch", type=positive, default=32, help="examples a step")
    add("--length", type=positive, default=32, help="tokens of a docstring that are read")
    add("--seed", type=int, default=0, help="draws the factors and the order of the examples")
    add("--limit", type=positive, help="cap the examples of each split, for a quick look")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns the bytes and the accuracies that are also printed."""
    options = parse_options(arguments)
    splits = data.load(data.collect(), weights.load_tokenizer(options.length), options.limit)
    classes = len(data.PACKAGES)
    published = jax.device_put(weights.load_params())
    frozen = head_on_encoder(published, splits, classes, options.batch)
    model = Classifier(classes)
    variables = {"params": {"bert": published, "classifier": frozen.trained}}

    base, factors = quantised(model, variables, splits["train"], options)
    errors = lora.quantization_error(variables, base)
    example = splits["train"].take(slice(options.batch))
    print(lora.inspect(model.apply, base, factors, example.ids, example.mask), "\n")
    runs = {
        options.dtype: train(model, base, factors, splits, options.dtype, options),
        "float32": train(model, variables, adapters(model, variables, splits["train"], options),
                         splits, "float32", options),
    }  # fmt: skip

    sizes = {options.dtype: bytes_held(base), "float32": bytes_held(variables)}
    print(f"\nlargest relative error of a weight: {max(errors.values()):.1%}")
    print(f"frozen encoder, linear head: test {frozen.test:.1%}, validation {frozen.last:.1%}")
    for name, run in runs.items():
        print(
            f"LoRA on {name}: base of {sizes[name]:,} bytes, {nbytes(run.trained):,} bytes trained;"
            f" test {run.test:.1%}, validation {run.last:.1%}"
        )
    return {"bytes": sizes, "test": {name: run.test for name, run in runs.items()},
            "losses": {name: run.losses for name, run in runs.items()}}  # fmt: skip


def quantised(
    model: Classifier, variables: Pytree, split: Split, options: argparse.Namespace
) -> tuple[Pytree, Pytree]:
    """The base with its matrices quantised, and the factors that start on it."""
    types = {"dtype": options.dtype, "block": options.block}
    if not options.loftq:
        base = lora.quantize(variables, f"{KERNELS}|{EMBEDDINGS}", **types)
        return base, adapters(model, base, split, options)
    rules = [lora.LoRA(KERNELS, rank=options.rank, alpha=options.alpha, init="loftq"), HEAD]
    key, axes = jax.random.key(options.seed), axes_of(model, variables, split, options)
    base, factors = lora.loftq(key, variables, rules, axes=axes, **types)
    return lora.quantize(base, EMBEDDINGS, **types), factors


def adapters(
    model: Classifier, params: Pytree, split: Split, options: argparse.Namespace
) -> Pytree:
    """LoRA on the encoder's kernels; the head is trained on from where the encoder left it."""
    rules = [lora.LoRA(KERNELS, rank=options.rank, alpha=options.alpha), HEAD]
    key, axes = jax.random.key(options.seed), axes_of(model, params, split, options)
    return lora.init(key, params, rules, axes=axes)


def axes_of(model: Classifier, params: Pytree, split: Split, options: argparse.Namespace) -> Pytree:
    example = split.take(slice(options.batch))
    return lora.infer_axes(model.apply, params, example.ids, example.mask)


def train(
    model: Classifier,
    base: Pytree,
    factors: Pytree,
    splits: dict[str, Split],
    name: str,
    options: argparse.Namespace,
) -> Run:
    """LoRA on this base, with a progress bar."""
    return fit(
        f"LoRA on {name}",
        lora.wrap(model.apply),
        base,
        factors,
        lora.freeze(optimiser(options.lr, options.steps)),
        splits,
        steps=options.steps,
        batch=options.batch,
        seed=options.seed,
    )


def bytes_held(params: Pytree) -> int:
    """What the device holds of them: four bits are four bits there, whatever numpy says."""
    compiled = jax.jit(lambda params: params, keep_unused=True).lower(params).compile()
    return compiled.memory_analysis().argument_size_in_bytes


if __name__ == "__main__":
    main()
