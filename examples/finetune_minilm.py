"""Fine-tune the pretrained sentence encoder all-MiniLM-L6-v2 with LoRA, on a real task.

The task: tell which standard-library package a docstring documents (26 of them), with the packages'
names cut out of the text. The encoder is an ordinary Flax model (`minilm/encoder.py`); LoRA comes
from outside, by `lora.wrap(model.apply)`.

    python examples/finetune_minilm.py           # two to three minutes on two CPU cores
    python examples/finetune_minilm.py --full    # and full fine-tuning beside it

Written to `--out`: the factors, the merged encoder (under the original file's tensor names, so that
it can stand in for it), the head, the figures and a picture of the run.
"""

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from minilm import data, figure, weights
from minilm.encoder import Classifier, Config
from minilm.linear_head import head_on_encoder
from minilm.options import positive
from minilm.training import Run, fit, optimiser, predict
from safetensors.numpy import load_file

import lorax_fn as lora

TOLERANCE = 1e-3  # largest difference of a logit between the adapted and the merged model


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--rank", type=int, default=8, help="rank of the factors")
    add("--alpha", type=float, default=16.0, help="the update is scaled by alpha / rank")
    add(
        "--targets",
        default=r".*/encoder/.*/kernel|.*/word_embeddings/embedding",
        help="regex on whole paths: the weights that LoRA adapts",
    )
    add("--lr", type=float, default=2e-3, help="peak learning rate of LoRA and its head")
    add("--steps", type=positive, default=220, help="training steps")
    add("--batch", type=positive, default=32, help="examples a step")
    add("--length", type=positive, default=32, help="tokens of a docstring that are read")
    add("--seed", type=int, default=0, help="draws the factors and the order of the examples")
    add("--full", action="store_true", help="fine-tune every weight too, for comparison")
    add("--full-lr", type=float, default=2e-4, help="peak learning rate of full fine-tuning")
    add("--limit", type=positive, help="cap the examples of each split, for a quick look")
    add(
        "--out",
        type=Path,
        default=Path(__file__).parent / "out" / "minilm",
        help="folder for what is written",
    )
    options = parser.parse_args(arguments)
    if options.length > Config().max_positions:
        parser.error(f"--length {options.length}: the model reads {Config().max_positions} tokens")
    return options


def main(arguments: Sequence[str] | None = None) -> dict:
    """Returns the figures that are also written to `results.json`."""
    options = parse_options(arguments)
    published = jax.device_put(weights.load_params())
    tokenizer = weights.load_tokenizer(options.length)
    splits = data.load(data.collect(), tokenizer, options.limit)
    classes = len(data.PACKAGES)
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    print(f"{classes} packages; docstrings: {sizes}\n")

    frozen = head_on_encoder(published, splits, classes, options.batch)
    model = Classifier(classes)
    variables = {"params": {"bert": published, "classifier": frozen.trained}}
    adapted = train_lora(model, variables, splits, options)
    runs = [frozen, adapted]
    if options.full:
        runs.append(train_full(model, variables, splits, options))
    print(f"\n{table(runs)}\n")

    options.out.mkdir(parents=True, exist_ok=True)
    difference = write_and_check(model, variables, adapted, splits["test"], options)
    print(f"merged against adapted: max |logit difference| {difference:.1e} (allowed {TOLERANCE})")
    figure.draw(options.out / "curves.png", frozen, runs[1:])
    results = {"options": vars(options) | {"out": str(options.out)}, "difference": difference}
    results["runs"] = {run.name: run.figures() for run in runs}
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {options.out}: {', '.join(sorted(p.name for p in options.out.iterdir()))}")
    return results


def train_lora(
    model: Classifier,
    variables: dict,
    splits: dict[str, data.Split],
    options: argparse.Namespace,
) -> Run:
    """LoRA on the targets; the head is trained on from where the frozen encoder left it."""
    rules = [
        lora.LoRA(options.targets, rank=options.rank, alpha=options.alpha),
        lora.Full(r".*/classifier/.*"),
    ]
    example = splits["train"].take(slice(options.batch))
    axes = lora.infer_axes(model.apply, variables, example.ids, example.mask)
    factors = lora.init(jax.random.key(options.seed), variables, rules, axes=axes)
    print(lora.inspect(model.apply, variables, factors, example.ids, example.mask), "\n")
    return fit(
        f"LoRA, rank {options.rank}",
        lora.wrap(model.apply),
        variables,
        factors,
        lora.freeze(optimiser(options.lr, options.steps)),
        splits,
        steps=options.steps,
        batch=options.batch,
        seed=options.seed,
    )


def train_full(
    model: Classifier,
    variables: dict,
    splits: dict[str, data.Split],
    options: argparse.Namespace,
) -> Run:
    """Every weight is trained, from the same start and in the same order of examples."""
    return fit(
        "full fine-tuning",
        lambda _, params, ids, mask: model.apply(params, ids, mask),
        None,
        jax.tree.map(jnp.copy, variables),
        optimiser(options.full_lr, options.steps),
        splits,
        steps=options.steps,
        batch=options.batch,
        seed=options.seed,
    )


def write_and_check(
    model: Classifier,
    variables: dict,
    adapted: Run,
    test: data.Split,
    options: argparse.Namespace,
) -> float:
    """Merge, write, read back; the plain model must then answer as the adapted one did.

    Returns:
        The largest difference of a logit over the whole test split.
    """
    merged = lora.merge(variables, adapted.trained, check_finite=True)["params"]
    scale = {"rank": str(options.rank), "alpha": str(options.alpha)}
    weights.save_tree(options.out / "factors.safetensors", adapted.trained, scale)
    weights.save_params(options.out / "model.safetensors", merged["bert"])
    weights.save_tree(options.out / "head.safetensors", merged["classifier"])

    served = {
        "params": {
            "bert": weights.from_tensors(load_file(options.out / "model.safetensors")),
            "classifier": load_file(options.out / "head.safetensors"),
        }
    }
    logits = predict(functools.partial(jax.jit(model.apply), served), test, options.batch)
    difference = float(np.abs(logits - adapted.test_logits).max())
    if not difference <= TOLERANCE:
        raise RuntimeError(f"merged and adapted logits differ by {difference}, over {TOLERANCE}")
    return difference


def table(runs: Sequence[Run]) -> str:
    """The runs, aligned."""
    header = ("accuracy", "test", "validation", "trained", "optimiser state", "seconds")
    rows = [
        (
            run.name,
            f"{run.test:.1%}",
            f"{run.last:.1%}",
            f"{run.parameters:,}",
            f"{run.optimiser_bytes:,} bytes",
            f"{run.seconds:.0f}",
        )
        for run in runs
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        row[0].ljust(widths[0])
        + "".join(cell.rjust(width + 3) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in (header, *rows)
    )


if __name__ == "__main__":
    main()
