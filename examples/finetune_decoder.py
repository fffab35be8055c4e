"""Teach a small language model of code to write prose, with LoRA, and read what it writes.

A decoder is pretrained on the standard library's code, all comments and docstrings taken out, then
adapted to the docstrings alone: by LoRA, and by full fine-tuning beside it. Its layers run under
`nn.scan` and its embeddings are tied: LoRA adapts both. Measured on modules that no training saw,
in bits a byte: prose, which is to be learnt, and code, which may be forgotten.

    python examples/finetune_decoder.py          # about two minutes on two CPU cores

Written to `--out`: the figures, samples of each model, and a picture.
"""

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from decoder import corpus, figure
from decoder.model import Decoder
from decoder.sample import sample
from minilm.options import positive
from minilm.training import nbytes, optimiser
from tokenizers import Tokenizer
from tqdm import tqdm

import lorax_fn as lora

Pytree = Any
PROMPTS = ("Return the", "If ", "The ")
TESTED = 48  # windows of each kind


@dataclasses.dataclass
class Model:
    """One way to come by params: what was trained, what it reads well, what it writes."""

    name: str
    trained: int
    optimiser_bytes: int
    losses: list[float]
    bits: dict[str, float]  # a byte, of each kind of text
    samples: list[str]


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--rank", type=int, default=8, help="rank of the factors")
    add("--alpha", type=float, default=16.0, help="the update is scaled by alpha / rank")
    add("--targets", default=r".*/(layers/.*/kernel|embed/embedding)", help="LoRA's: a regex")
    add("--lr", type=float, default=1e-2, help="peak learning rate of LoRA")
    add("--full-lr", type=float, default=2e-3, help="peak learning rate of full fine-tuning")
    add("--steps", type=positive, default=150, help="steps of each way of adapting")
    add("--pretrain-steps", type=positive, default=500, help="steps on code")
    add("--batch", type=positive, default=16, help="stretches of text a step")
    add("--length", type=positive, default=64, help="tokens of a stretch")
    add("--vocabulary", type=positive, default=512, help="tokens that the tokenizer learns")
    add("--seed", type=int, default=0, help="draws the model, the factors and the samples")
    add("--limit", type=positive, help="cap the modules that are read, for a quick look")
    out = Path(__file__).parent / "out" / "decoder"
    add("--out", type=Path, default=out, help="folder for what is written")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict:
    """Returns the figures that are also written to `results.json`."""
    options = parse_options(arguments)
    texts = corpus.read(options.limit)
    both = [text for kind in corpus.KINDS for text in texts[kind]["train"]]
    tokenizer = corpus.train_tokenizer(both, options.vocabulary)
    tokens = {
        kind: {split: corpus.tokens_of(of, tokenizer) for split, of in texts[kind].items()}
        for kind in corpus.KINDS
    }
    for kind, splits in tokens.items():
        print(f"{kind}: " + ", ".join(f"{len(t):,} tokens to {name}" for name, t in splits.items()))
    net = Decoder(tokenizer.get_vocab_size(), longest=options.length)
    judge = functools.partial(judged, net, tokens, tokenizer, options)

    params, losses, size = pretrain(net, tokens["code"]["train"], options)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    models = [judge("pretrained on code", params, count, size, losses)]
    rules = [lora.LoRA(options.targets, rank=options.rank, alpha=options.alpha)]
    ways = {f"LoRA, rank {options.rank}": (rules, options.lr),
            "full fine-tuning": ([lora.Full(r".*")], options.full_lr)}  # fmt: skip
    for name, way in ways.items():
        adapted = adapt(name, net, params, *way, tokens["prose"]["train"], options)
        models.append(judge(name, *adapted))
    print(f"\n{table(models)}\n")
    for model in models:
        print(f"--- {model.name} writes:\n" + "\n\n".join(model.samples) + "\n")

    options.out.mkdir(parents=True, exist_ok=True)
    figure.draw(options.out / "prose.png", models)
    results = {"options": vars(options) | {"out": str(options.out)}}
    results["models"] = [dataclasses.asdict(model) for model in models]
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {options.out}: {', '.join(sorted(p.name for p in options.out.iterdir()))}")
    return results


def pretrain(net: Decoder, tokens: np.ndarray, options: argparse.Namespace) -> tuple:
    """(params, losses, bytes of optimiser state) after training on code."""
    params = jax.jit(net.init)(jax.random.key(options.seed), tokens[None, : options.length])
    tx = optimiser(3e-3, options.pretrain_steps)
    step = train_step(lambda _, params, tokens: net.apply(params, tokens), tx)
    drawn = progress("pretraining", tokens, options.pretrain_steps, options)
    return train(step, None, params, tx.init(params), drawn)


def adapt(
    name: str,
    net: Decoder,
    params: Pytree,
    rules: list,
    lr: float,
    tokens: np.ndarray,
    options: argparse.Namespace,
) -> tuple:
    """(merged params, trained numbers, bytes of optimiser state, losses), trained on prose."""
    example = tokens[None, : options.length]
    axes = lora.infer_axes(net.apply, params, example)
    factors = lora.init(jax.random.key(options.seed), params, rules, axes=axes)
    print(f"\n{lora.inspect(net.apply, params, factors, example)}\n")
    tx = lora.freeze(optimiser(lr, options.steps))
    drawn = progress(name, tokens, options.steps, options)
    count = sum(leaf.size for leaf in jax.tree.leaves(factors))
    step = train_step(lora.wrap(net.apply), tx)
    factors, losses, size = train(step, params, factors, tx.init(factors), drawn)
    return lora.merge(params, factors), count, size, losses


def progress(
    name: str, tokens: np.ndarray, steps: int, options: argparse.Namespace
) -> Iterator[np.ndarray]:
    """Training batches, with a progress bar."""
    drawn = corpus.batches(tokens, steps, options.batch, options.length, options.seed)
    return tqdm(drawn, total=steps, desc=name, unit="step")


def train(step: Callable, frozen: Pytree, trained: Pytree, state: Pytree, drawn: Any) -> tuple:
    """(trained, losses, bytes of optimiser state)."""
    size, losses = nbytes(state), []
    for tokens in drawn:
        trained, state, loss = step(frozen, trained, state, tokens)
        losses.append(float(loss))
        drawn.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return trained, losses, size


def train_step(apply: Callable[..., jax.Array], tx: Any) -> Callable[..., tuple]:
    """A compiled step: (frozen, trained, state, tokens) -> (trained, state, loss)."""

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(frozen: Pytree, trained: Pytree, state: Pytree, tokens: jax.Array) -> tuple:
        def loss_of(trained: Pytree) -> jax.Array:
            return next_token_losses(apply(frozen, trained, tokens), tokens).mean()

        loss, grads = jax.value_and_grad(loss_of)(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    return step


def next_token_losses(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Nats of each token after the first: (batch, length - 1)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])


@functools.partial(jax.jit, static_argnums=0)
def nats(net: Decoder, params: Pytree, tokens: jax.Array) -> jax.Array:
    """The loss of all tokens after each window's first, added up."""
    return next_token_losses(net.apply(params, tokens), tokens).sum()


def judged(
    net: Decoder,
    tokens: dict[str, dict[str, np.ndarray]],
    tokenizer: Tokenizer,
    options: argparse.Namespace,
    name: str,
    params: Pytree,
    count: int,
    size: int,
    losses: list[float],
) -> Model:
    """The plain model with these params, tested on both kinds of text and sampled from."""

    def bits_a_byte(tokens: np.ndarray) -> float:
        tested = corpus.windows(tokens, options.length, TESTED)
        size = sum(len(text.encode()) for text in tokenizer.decode_batch(tested[:, 1:].tolist()))
        return float(nats(net, params, jnp.asarray(tested))) / math.log(2) / size

    bits = {kind: bits_a_byte(splits["test"]) for kind, splits in tokens.items()}
    samples = sample(
        net.apply, params, list(PROMPTS), tokenizer, length=options.length, seed=options.seed
    )
    return Model(name, count, size, losses, bits, samples)


def table(models: Sequence[Model]) -> str:
    """The models, aligned."""
    rows = [("bits a byte, on modules not trained on", "prose", "code", "trained", "optimiser")]
    for model in models:
        figures = f"{model.bits['prose']:.3f}", f"{model.bits['code']:.3f}"
        rows.append((model.name, *figures, f"{model.trained:,}", f"{model.optimiser_bytes:,} B"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        row[0].ljust(widths[0])
        + "".join(cell.rjust(width + 3) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


if __name__ == "__main__":
    main()
