"""Serve many adapters of one MiniLM encoder over HTTP, each request answered by the one it names.

The encoder is loaded once. Requests for different adapters share a batch: `lora.wrap_batched`
multiplies with the base once for all of them, and each with its own adapter's factors. Adapters are
added and removed while requests run; nothing compiles, and no request is lost.

    python examples/serve.py                        # trains three adapters at the first start
    curl -d '{"text": "Read a message", "adapter": "package"}' localhost:8000/classify
    curl -T mine.safetensors 'localhost:8000/adapters/mine?labels=yes,no'

    python examples/serve.py --load-test 2000       # asks itself, and prints what came of it

Needs what `finetune_minilm.py` needs, and `pip install '.[serve]'`. It listens on the loopback
interface and knows no users: put what does in front of it.
"""

import argparse
import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from minilm import data, weights
from minilm.encoder import Classifier
from minilm.linear_head import head_on_encoder
from minilm.options import positive
from minilm.training import fit, optimiser
from service import load_test
from service.app import Service
from service.engine import Engine
from service.slots import Entry, Slots

import lorax_fn as lora

Pytree = Any
LARGEST_RANK = 8
SAMPLES = 12  # texts that the load test asks about
KERNELS, HEAD = r".*/encoder/.*/kernel", r".*/classifier/.*"
AREAS = {
    "network": "asyncio email http imaplib ipaddress mailbox urllib wsgiref xmlrpc",
    "files": "pathlib tarfile zipfile importlib logging xml",
    "values": "collections datetime decimal statistics typing",
    "running": "doctest inspect multiprocessing pydoc threading unittest",
}


@dataclasses.dataclass(frozen=True)
class Task:
    """What an adapter is trained to tell, and the rank and scale of its factors."""

    labels: tuple[str, ...]
    rank: int
    alpha: float

    def of(self, split: data.Split) -> data.Split:
        """The split with this task's labels in place of the packages."""
        if self.labels == data.PACKAGES:
            return split
        areas = {package: i for i, names in enumerate(AREAS.values()) for package in names.split()}
        of_package = np.array([areas[package] for package in data.PACKAGES], np.int32)
        return dataclasses.replace(split, labels=of_package[split.labels])


TASKS = {
    "package": Task(data.PACKAGES, rank=8, alpha=16.0),
    "package-small": Task(data.PACKAGES, rank=2, alpha=6.0),
    "area": Task(tuple(AREAS), rank=4, alpha=8.0),
}


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--port", type=int, default=8000, help="port on the loopback interface")
    add("--slots", type=positive, default=16, help="how many adapters fit at a time")
    add("--length", type=positive, default=32, help="tokens of a text that are read")
    add("--load-test", type=positive, metavar="REQUESTS", help="test the service, then end")
    add("--clients", type=positive, default=32, help="of the load test, at a time")
    add("--steps", type=positive, default=60, help="training steps of an adapter that is missing")
    add("--limit", type=positive, help="cap the examples of each split, for a quick look")
    add(
        "--out",
        type=Path,
        default=Path(__file__).parent / "out" / "serve",
        help="folder of the adapters, <name>.safetensors",
    )
    options = parser.parse_args(arguments)
    if options.slots <= len(TASKS):
        parser.error(f"--slots {options.slots}: wanted more than the {len(TASKS)} own adapters")
    if options.steps < 2:
        parser.error("--steps 1: wanted at least 2, the first of which warms up")
    return options


def main(arguments: Sequence[str] | None = None) -> load_test.Report | None:
    """Serves until interrupted; returns the report of a load test."""
    options = parse_options(arguments)
    compilations = load_test.Compilations()
    tokenizer = weights.load_tokenizer(options.length)
    examples = data.collect()
    splits = data.load(examples, tokenizer, options.limit)
    published = jax.device_put(weights.load_params())
    model = Classifier(len(data.PACKAGES))
    head = head_on_encoder(published, splits, len(data.PACKAGES), batch=32)
    variables = {"params": {"bert": published, "classifier": head.trained}}

    files = adapter_files(model, variables, splits, options)
    slots = Slots(jax.eval_shape(lambda: factors_of(model, variables, splits)), options.slots)
    engine = Engine(model.apply, variables, slots, length=options.length)
    for name, file in files.items():
        slot = slots.reserve()
        slots.write(slot, slots.read(file))
        slots.entries[name] = Entry(slot, TASKS[name].labels)
    service = Service(engine, slots, tokenizer, data.PACKAGES)
    engine.start()
    try:
        if options.load_test is None:
            serve(service, options.port)
            return None
        texts = [example.text for example in examples[:SAMPLES]]
        expected = by_merging(model, variables, slots, service, texts)
        return tested(service, compilations, expected, list(files.values()), options)
    finally:
        engine.stop()


def factors_of(
    model: Classifier,
    variables: Pytree,
    splits: dict[str, data.Split],
    rank: int = LARGEST_RANK,
    alpha: float = LARGEST_RANK,
    seed: int = 0,
) -> Pytree:
    """Fresh factors of an adapter: LoRA on the encoder's kernels, and a head of its own."""
    example = splits["train"].take(slice(2))
    axes = lora.infer_axes(model.apply, variables, example.ids, example.mask)
    rules = [lora.LoRA(KERNELS, rank=rank, alpha=alpha), lora.Full(HEAD)]
    return lora.init(jax.random.key(seed), variables, rules, axes=axes)


def adapter_files(
    model: Classifier,
    variables: Pytree,
    splits: dict[str, data.Split],
    options: argparse.Namespace,
) -> dict[str, bytes]:
    """Each task's adapter, as a file's content; trained and written if it is not there."""
    options.out.mkdir(parents=True, exist_ok=True)
    files = {}
    for seed, (name, task) in enumerate(TASKS.items()):
        file = options.out / f"{name}.safetensors"
        if not file.is_file():
            factors = factors_of(model, variables, splits, task.rank, task.alpha, seed)
            run = fit(
                f"adapter {name!r}",
                lora.wrap(model.apply),
                variables,
                factors,
                lora.freeze(optimiser(2e-3, options.steps)),
                {split: task.of(examples) for split, examples in splits.items()},
                steps=options.steps,
                batch=32,
                seed=seed,
            )
            print(f"adapter {name!r}: {run.test:.1%} of the test split right")
            lora.save(file, run.trained)
        files[name] = file.read_bytes()
    return files


def serve(service: Service, port: int) -> None:
    """Until interrupted."""
    import uvicorn

    uvicorn.run(service.app(), host="127.0.0.1", port=port)


def by_merging(
    model: Classifier, variables: Pytree, slots: Slots, service: Service, texts: Sequence[str]
) -> dict[tuple[str, str | None], str]:
    """The right label of each (text, adapter): by merged models, one text at a time."""
    plain = jax.jit(model.apply)
    models = {None: (variables, service.base.labels)}
    for name, entry in slots.entries.items():
        merged = lora.merge(variables, lora.take(slots.stacked, entry.slot))
        models[name] = (merged, entry.labels)
    expected: dict[tuple[str, str | None], str] = {}
    for name, (merged, labels) in models.items():
        for text in texts:
            encoding = service.tokenizer.encode(text)
            ids, mask = (np.array([x], np.int32) for x in (encoding.ids, encoding.attention_mask))
            logits = np.asarray(plain(merged, ids, mask))[0, : len(labels)]
            expected[text, name] = labels[int(logits.argmax())]
    return expected


def tested(
    service: Service,
    compilations: load_test.Compilations,
    expected: Mapping[tuple[str, str | None], str],
    spares: Sequence[bytes],
    options: argparse.Namespace,
) -> load_test.Report:
    """Runs the load test against the service on a port of its own.

    Raises:
        SystemExit: if a request failed, or something was compiled.
    """
    with load_test.running(service.app()) as address:
        report = asyncio.run(
            load_test.run(
                address,
                compilations,
                expected,
                spares,
                requests=options.load_test,
                clients=options.clients,
            )
        )
    print(report)
    if report.failed or report.compilations:
        raise SystemExit("\n".join(["the load test failed", *report.failed[:20]]))
    return report


if __name__ == "__main__":
    main()
