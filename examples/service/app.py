"""The HTTP interface, on Starlette: requests are checked here and nowhere else.

POST   /classify           {"text": "…", "adapter": "name" or null}  → label and score
GET    /adapters           the names and their labels
PUT    /adapters/{name}    a file of lora.save; ?labels=a,b,c         → added or replaced
DELETE /adapters/{name}    → removed
"""

from __future__ import annotations

import asyncio
import json
import re

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tokenizers import Tokenizer

from service.engine import BASE, Engine, OverloadedError
from service.slots import BadAdapterError, Entry, FullError, Slots

LARGEST_QUESTION = 64 * 1024  # bytes
LONGEST_TEXT = 20_000  # characters; the model reads the first tokens of it
LARGEST_ADAPTER = 64 * 1024 * 1024  # bytes
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Service:
    """The handlers, and what they share."""

    def __init__(
        self, engine: Engine, slots: Slots, tokenizer: Tokenizer, labels: tuple[str, ...]
    ) -> None:
        """`labels`: those of the base's own head."""
        self.engine, self.slots, self.tokenizer = engine, slots, tokenizer
        self.base = Entry(BASE, labels)

    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/classify", self.classify, methods=["POST"]),
                Route("/adapters", self.list, methods=["GET"]),
                Route("/adapters/{name}", self.put, methods=["PUT"]),
                Route("/adapters/{name}", self.delete, methods=["DELETE"]),
            ],
            exception_handlers={HTTPException: _refused, Exception: _failed},
        )

    async def classify(self, request: Request) -> Response:
        """Answers one text with one adapter."""
        text, name = _question(await _body(request, LARGEST_QUESTION))
        entry = self.base if name is None else self._entry(name)
        encoding = self.tokenizer.encode(text)
        try:
            answer = self.engine.ask(encoding.ids, encoding.attention_mask, entry.slot)
        except OverloadedError as e:
            raise HTTPException(503, str(e), headers={"Retry-After": "1"}) from e
        logits = await asyncio.wrap_future(answer)
        scores = _softmax(logits[: len(entry.labels)])
        best = int(scores.argmax())
        return JSONResponse(
            {"adapter": name, "label": entry.labels[best], "score": float(scores[best])}
        )

    async def list(self, _: Request) -> Response:
        """The adapters that can be asked for."""
        entries = sorted(self.slots.entries.items())
        return JSONResponse({"adapters": {name: list(entry.labels) for name, entry in entries}})

    async def put(self, request: Request) -> Response:
        """Adds an adapter, or puts a new one in the place of an old one."""
        name = _checked_name(request.path_params["name"])
        labels = _labels(request.query_params.get("labels", ""), len(self.base.labels))
        data = await _body(request, LARGEST_ADAPTER)
        try:
            padded = await asyncio.to_thread(self.slots.read, data)
            slot = self.slots.reserve()
        except BadAdapterError as e:
            raise HTTPException(422, str(e)) from e
        except FullError as e:
            raise HTTPException(409, str(e)) from e
        try:
            await asyncio.wrap_future(self.engine.change(lambda: self.slots.write(slot, padded)))
        except BaseException:  # also if the request is cancelled; the slot waits for the write
            self.engine.change(lambda: self.slots.free.append(slot))
            raise
        old = self.slots.entries.get(name)
        self.slots.entries[name] = Entry(slot, labels)
        await self._release(old)
        return JSONResponse({"adapter": name}, 201 if old is None else 200)

    async def delete(self, request: Request) -> Response:
        """Removes an adapter; who asked before is still answered by it."""
        name = request.path_params["name"]
        entry = self._entry(name)
        del self.slots.entries[name]
        await self._release(entry)
        return Response(status_code=204)

    def _entry(self, name: str) -> Entry:
        if name not in self.slots.entries:
            raise HTTPException(404, f"there is no adapter {name[:64]!r}")
        return self.slots.entries[name]

    async def _release(self, entry: Entry | None) -> None:
        """Frees a slot once all that was asked of it is answered."""
        if entry is not None:
            free = self.slots.free
            await asyncio.wrap_future(self.engine.change(lambda: free.append(entry.slot)))


async def _body(request: Request, largest: int) -> bytes:
    """The body, of which no more than that is ever held."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > largest:
            raise HTTPException(413, f"the body is over {largest} bytes")
        parts.append(part)
    return b"".join(parts)


def _question(body: bytes) -> tuple[str, str | None]:
    """(text, adapter) of a request to classify."""
    try:
        question = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise HTTPException(400, "the body is no JSON") from e
    if not isinstance(question, dict) or not set(question) <= {"text", "adapter"}:
        raise HTTPException(422, 'wanted {"text": "…", "adapter": "name" or null}')
    text, name = question.get("text"), question.get("adapter")
    if not isinstance(text, str) or not text.strip() or len(text) > LONGEST_TEXT:
        raise HTTPException(422, f"text: wanted a string of 1 to {LONGEST_TEXT} characters")
    if not isinstance(name, str | None):
        raise HTTPException(422, "adapter: wanted a name or null")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise HTTPException(422, "text: half of a surrogate pair is no character") from e
    return text, name


def _checked_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise HTTPException(422, "a name has 1 to 64 letters, digits, dots, hyphens, underscores")
    return name


def _labels(text: str, most: int) -> tuple[str, ...]:
    labels = tuple(label.strip() for label in text.split(","))
    if not all(labels) or len(set(labels)) < len(labels) or len(labels) > most:
        raise HTTPException(422, f"labels: wanted 1 to {most} different ones, ?labels=a,b,c")
    return labels


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max())
    return shares / shares.sum()


def _refused(_: Request, error: Exception) -> Response:
    status, detail = getattr(error, "status_code", 500), getattr(error, "detail", "")
    return JSONResponse({"error": detail}, status, headers=getattr(error, "headers", None))


def _failed(_: Request, __: Exception) -> Response:
    return JSONResponse({"error": "the service failed to answer"}, 500)
