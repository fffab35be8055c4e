"""A load test on loopback: clients ask, adapters come and go, hostile requests come too."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx
import jax
import numpy as np
import uvicorn
from starlette.applications import Starlette

COMPILED = "/jax/core/compile/backend_compile_duration"
HOSTILE: tuple[tuple[str, str, bytes], ...] = (
    ("POST", "/classify", b""),
    ("POST", "/classify", b"{"),
    ("POST", "/classify", b"\xff\xfe\x00"),
    ("POST", "/classify", b"[" * 20_000),
    ("POST", "/classify", b"9" * 20_000),
    ("POST", "/classify", b"null"),
    ("POST", "/classify", b'{"text": 3}'),
    ("POST", "/classify", b'{"text": ""}'),
    ("POST", "/classify", b'{"text": "\\ud800"}'),
    ("POST", "/classify", b'{"text": "a", "adapter": 1e999}'),
    ("POST", "/classify", b'{"text": "a", "adapter": "../../etc/passwd"}'),
    ("POST", "/classify", b'{"text": "a", "slot": 3}'),
    ("POST", "/classify", b'{"text": "' + b"a" * 100_000 + b'"}'),
    ("GET", "/classify", b""),
    ("GET", "/adapters/..%2f..", b""),
    ("DELETE", "/adapters/nobody", b""),
    ("PUT", "/adapters/a%20b?labels=x", b"x"),
    ("PUT", "/adapters/x", b"x"),
    ("PUT", "/adapters/x?labels=a,a", b"x"),
    ("PUT", "/adapters/x?labels=a,b", b""),
    ("PUT", "/adapters/x?labels=a,b", b"\x80\x04pickle"),
    ("PUT", "/adapters/x?labels=a,b", (2**63).to_bytes(8, "little") + b"{}"),
    ("PUT", "/adapters/x?labels=a,b", (2).to_bytes(8, "little") + b"{}"),
)


class Compilations:
    """Counts what XLA compiles in this process."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, _: float, **__: Any) -> None:
        self.count += event == COMPILED


@dataclasses.dataclass
class Report:
    """What the load test came to; latencies in seconds."""

    latencies: list[float]
    failed: list[str]
    changes: int
    refused: int
    compilations: int
    seconds: float

    def __str__(self) -> str:
        """A few lines."""
        p50, p90, p99 = (1e3 * q for q in np.quantile(self.latencies, [0.5, 0.9, 0.99]))
        return (
            f"{len(self.latencies)} requests in {self.seconds:.1f} s "
            f"({len(self.latencies) / self.seconds:.0f}/s), {len(self.failed)} failed\n"
            f"latency ms: median {p50:.0f}, 90 % {p90:.0f}, 99 % {p99:.0f}\n"
            f"adapters added or removed meanwhile: {self.changes}\n"
            f"hostile requests refused with 4xx: {self.refused} of {len(HOSTILE)}\n"
            f"compilations during the test: {self.compilations}"
        )


@contextlib.contextmanager
def running(app: Starlette, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """The app on a server of its own thread; yields its address."""
    config = uvicorn.Config(app, host, port, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()


async def run(
    address: str,
    compilations: Compilations,
    expected: Mapping[tuple[str, str | None], str],
    spares: Sequence[bytes],
    *,
    requests: int,
    clients: int,
    seed: int = 0,
) -> Report:
    """Asks, with that many clients at once, while adapters change.

    Args:
        address: of the service.
        compilations: started before the service was warmed up.
        expected: the right label of each (text, adapter).
        spares: adapters' files, added and removed in turn, under ever new names.
        requests: how many to make.
        clients: how many at a time.
        seed: draws the order.
    """
    questions = random.Random(seed).choices(sorted(expected, key=str), k=requests)
    report, before, started = Report([], [], 0, 0, 0, 0.0), compilations.count, time.monotonic()
    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        asked = asyncio.gather(
            *(_ask(client, questions[i::clients], expected, report) for i in range(clients))
        )
        changing = asyncio.create_task(_change(client, spares, report))
        hostile = asyncio.create_task(_offend(client, report))
        await asked
        report.seconds = time.monotonic() - started
        changing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await changing
        await hostile
    report.compilations = compilations.count - before
    return report


async def _ask(
    client: httpx.AsyncClient,
    questions: Sequence[tuple[str, str | None]],
    expected: Mapping[tuple[str, str | None], str],
    report: Report,
) -> None:
    for text, adapter in questions:
        begin = time.monotonic()
        answer = await client.post("/classify", json={"text": text, "adapter": adapter})
        report.latencies.append(time.monotonic() - begin)
        if answer.status_code != 200:
            report.failed.append(f"{adapter}: {answer.status_code} {answer.text}")
        elif answer.json()["label"] != expected[text, adapter]:
            report.failed.append(f"{adapter}: {answer.json()}, not {expected[text, adapter]}")


async def _change(client: httpx.AsyncClient, spares: Sequence[bytes], report: Report) -> None:
    """Adds and removes adapters, without end."""
    for spare in itertools.cycle(spares):
        name = f"spare-{report.changes}"
        added = await client.put(f"/adapters/{name}?labels=a,b", content=spare)
        used = await client.post("/classify", json={"text": "some text", "adapter": name})
        removed = await client.delete(f"/adapters/{name}")
        statuses = added.status_code, used.status_code, removed.status_code
        if statuses != (201, 200, 204):
            report.failed.append(f"{name} was added, used, removed with {statuses}")
        report.changes += 2


async def _offend(client: httpx.AsyncClient, report: Report) -> None:
    for method, path, body in HOSTILE:
        answer = await client.request(method, path, content=body)
        refused = 400 <= answer.status_code < 500 and "Traceback" not in answer.text
        report.refused += refused
        if not refused:
            report.failed.append(f"{method} {path} {body[:40]!r}: {answer.status_code}")
