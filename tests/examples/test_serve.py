"""The service: its slots and its manners on a small model, then all of it under a load test."""

import asyncio
import dataclasses
import tempfile
import types
from pathlib import Path

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import serve
from minilm import data
from minilm.encoder import Classifier
from service.app import Service
from service.engine import SIZES, Engine, OverloadedError
from service.load_test import HOSTILE, Compilations
from service.slots import BadAdapterError, Slots

import lorax_fn as lora

LENGTH, CLASSES, RANK = 5, 4, 3
LABELS = ("north", "east", "south", "west")


def apply_fn(params, ids, mask):
    x = params["embed"][ids] * mask[:, :, None].astype(jnp.float32)
    return jnp.tanh(x.sum(1) @ params["w"]) @ params["head"]


@pytest.fixture
def params(getkey):
    shapes = {"embed": (50, 8), "w": (8, 9), "head": (9, CLASSES)}
    return {name: jax.random.normal(getkey(), shape) for name, shape in shapes.items()}


def factors_of(params, rank, alpha, seed=0):
    rules = [lora.LoRA("w", rank=rank, alpha=alpha), lora.Full("head")]
    factors = lora.init(jax.random.key(seed), params, rules)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape), x.dtype), factors)


class Words:
    """Stands for the tokenizer."""

    def encode(self, text):
        ids = [sum(word.encode()) % 50 for word in text.split()[:LENGTH]]
        gap = [0] * (LENGTH - len(ids))
        return types.SimpleNamespace(ids=ids + gap, attention_mask=[1] * len(ids) + gap)


@pytest.fixture
def service(params):
    """A service with three slots, whose engine has not started."""
    blank = jax.eval_shape(lambda: factors_of(params, RANK, float(RANK)))
    slots = Slots(blank, capacity=3)
    engine = Engine(apply_fn, params, slots, length=LENGTH, backlog=8)
    service = Service(engine, slots, Words(), LABELS)
    yield service
    if engine._thread.is_alive():
        engine.stop()


def to_bytes(factors):
    """What `lora.save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        lora.save(f"{folder}/adapter.safetensors", factors)
        return Path(folder, "adapter.safetensors").read_bytes()


def talk(service, conversation):
    """Runs `conversation(client)` against the app, without a socket."""

    async def run():
        transport = httpx.ASGITransport(service.app(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await conversation(client)

    return asyncio.run(run())


def label(params, text):
    encoding = Words().encode(text)
    logits = apply_fn(params, jnp.array([encoding.ids]), jnp.array([encoding.attention_mask]))
    return LABELS[int(np.argmax(logits[0]))]


TEXTS = [f"{word} of {other}" for word in ("salt", "wine", "bread") for other in ("sea", "hill")]


def test_adapters_of_any_rank_come_and_go_without_compiling(service, params):
    """Each answers as its merged model; the base answers for null."""
    service.engine.start()
    each = {f"rank-{r}": factors_of(params, r, 2.5 * r, seed=r) for r in (1, 2, 3)}
    merged = {name: lora.merge(params, factors) for name, factors in each.items()}
    files = {name: to_bytes(factors) for name, factors in each.items()}
    wanted = [(t, n, label(merged.get(n, params), t)) for t in TEXTS for n in (*each, None)]
    compilations = Compilations()

    async def conversation(client):
        for name, file in files.items():
            added = await client.put(f"/adapters/{name}?labels={','.join(LABELS)}", content=file)
            assert added.status_code == 201
        questions = [{"text": text, "adapter": name} for text, name, _ in wanted]
        answers = [await client.post("/classify", json=question) for question in questions]
        assert [answer.json()["label"] for answer in answers] == [label for *_, label in wanted]
        listed = (await client.get("/adapters")).json()["adapters"]
        assert listed == {name: list(LABELS) for name in each}

        full = await client.put("/adapters/more?labels=a", content=files["rank-1"])
        assert full.status_code == 409
        assert (await client.delete("/adapters/rank-3")).status_code == 204
        gone = await client.post("/classify", json={"text": "a", "adapter": "rank-3"})
        assert gone.status_code == 404
        replaced = await client.put("/adapters/rank-1?labels=up,down", content=files["rank-2"])
        assert replaced.status_code == 200
        answer = await client.post("/classify", json={"text": "a", "adapter": "rank-1"})
        assert answer.json()["label"] in {"up", "down"}

    talk(service, conversation)
    assert compilations.count == 0


def test_who_asked_before_a_removal_is_answered_by_what_was_there(service, params):
    """Requests, a removal and an addition to the same slot wait in one queue, in their order."""
    old, new = (factors_of(params, 2, 5.0, seed=s) for s in (1, 2))
    slots, engine = service.slots, service.engine
    slots.write(0, slots.read(to_bytes(old)))
    encoding = Words().encode("salt of the sea")
    ask = lambda: engine.ask(encoding.ids, encoding.attention_mask, 0)
    before = [ask() for _ in range(3)]
    padded = slots.read(to_bytes(new))
    engine.change(lambda: slots.write(0, padded))
    after = ask()
    engine.start()
    apply = lora.wrap(apply_fn)
    ids, mask = (np.array([x]) for x in (encoding.ids, encoding.attention_mask))
    for answer in before:
        np.testing.assert_allclose(answer.result(60), apply(params, old, ids, mask)[0], atol=1e-5)
    np.testing.assert_allclose(after.result(60), apply(params, new, ids, mask)[0], atol=1e-5)
    assert engine.batches == 2  # the three together


def test_what_waits_is_bounded_and_answered_before_the_end(service):
    engine = service.engine
    encoding = Words().encode("bread")
    waiting = [engine.ask(encoding.ids, encoding.attention_mask, -1) for _ in range(8)]
    with pytest.raises(OverloadedError):
        engine.ask(encoding.ids, encoding.attention_mask, -1)

    async def conversation(client):
        return await client.post("/classify", json={"text": "bread"})

    answer = talk(service, conversation)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    engine.start()
    engine.stop()
    assert all(np.isfinite(future.result(0)).all() for future in waiting)


def test_hostile_requests_are_refused_in_words(service, params):
    service.engine.start()
    good = factors_of(params, 2, 5.0)
    assert service.slots.read(to_bytes(good)) is not None
    bodies = [
        to_bytes(good | {"w": dataclasses.replace(good["w"], a=a, b=b)})
        for a, b in (
            (jnp.ones((8, 4)), jnp.ones((4, 9))),  # of a rank above the stack's
            (jnp.ones((7, 2)), jnp.ones((2, 9))),
        )
    ]
    whole = to_bytes(good)
    bodies += [to_bytes({"w": good["w"]}), to_bytes({"head": None, "v": good["w"]})]
    bodies += [
        whole[:-3],
        whole[:-1] + bytes([whole[-1] ^ 1]),
        safetensors.numpy.save({"w": np.ones(3)}),
    ]
    for body in bodies:
        with pytest.raises(BadAdapterError):
            service.slots.read(body)
    requests = [*HOSTILE, *(("PUT", "/adapters/x?labels=a", body) for body in bodies)]

    async def conversation(client):
        return [await client.request(m, path, content=body) for m, path, body in requests]

    for request, answer in zip(requests, talk(service, conversation), strict=True):
        assert 400 <= answer.status_code < 500, request
        assert set(answer.json()) == {"error"}, request
        assert "Traceback" not in answer.text
    assert service.slots.entries == {}
    assert sorted(service.slots.free) == [0, 1, 2]


def test_a_failure_within_is_no_traceback(service, monkeypatch):
    def broken(*_):
        raise RuntimeError("secret")

    monkeypatch.setattr(service.engine, "_answer", broken)
    service.engine.start()

    async def conversation(client):
        return [await client.post("/classify", json={"text": "bread"}) for _ in range(2)]

    for answer in talk(service, conversation):
        assert answer.status_code == 500
        assert "secret" not in answer.text


def test_a_slot_whose_adapter_was_not_written_is_free_again(service, params, monkeypatch):
    def broken(*_):
        raise RuntimeError("secret")

    monkeypatch.setattr(service.slots, "write", broken)
    service.engine.start()
    file = to_bytes(factors_of(params, 2, 5.0))

    async def conversation(client):
        return [await client.put("/adapters/x?labels=a", content=file) for _ in range(4)]

    assert [answer.status_code for answer in talk(service, conversation)] == [500] * 4
    service.engine.stop()
    assert sorted(service.slots.free) == [0, 1, 2]
    assert service.slots.entries == {}


def test_bfloat16_adapters_are_taken(service, params):
    factors = factors_of(params, 2, 5.0)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), factors)
    got, wanted = (service.slots.read(to_bytes(f)) for f in (half, factors))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=0.02, atol=0.02)


def test_batches_have_few_sizes(service):
    """So what is compiled before the first request is all there is."""
    shapes = set()
    answer = service.engine._answer
    service.engine._answer = lambda ids, mask, slots: (
        shapes.add(ids.shape) or answer(ids, mask, slots)
    )
    encoding = Words().encode("wine")
    for count in (1, 2, 4, 7):
        futures = [service.engine.ask(encoding.ids, encoding.attention_mask, -1)
                   for _ in range(count)]  # fmt: skip
        if count == 1:
            service.engine.start()
        assert all(future.result(60) is not None for future in futures)
    assert shapes <= {(size, LENGTH) for size in SIZES}


def random_file(task):
    """An adapter of MiniLM that nobody trained."""
    example = np.zeros((2, 8), np.int32)
    model = Classifier(len(data.PACKAGES))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), example, example + 1))
    split = data.Split(example, example + 1, example[:, 0])
    shapes = jax.eval_shape(
        lambda: serve.factors_of(model, variables, {"train": split}, task.rank, task.alpha)
    )
    rng = np.random.default_rng(task.rank)
    return to_bytes(
        jax.tree.map(lambda s: jnp.asarray(0.05 * rng.normal(size=s.shape), s.dtype), shapes)
    )


def test_the_whole_service_under_load(tmp_path):
    """MiniLM and three adapters, one of them trained a little: none fails, nothing compiles."""
    for name in ("package", "package-small"):
        (tmp_path / f"{name}.safetensors").write_bytes(random_file(serve.TASKS[name]))
    arguments = {"steps": 2, "limit": 16, "length": 8, "clients": 8, "load-test": 60}
    options = [f"--{name}={value}" for name, value in (arguments | {"out": tmp_path}).items()]
    report = serve.main(options)
    assert len(report.latencies) == 60
    assert (report.failed, report.compilations) == ([], 0)
    assert report.refused == len(HOSTILE)
    assert report.changes > 0
    assert {file.stem for file in tmp_path.iterdir()} == set(serve.TASKS)
