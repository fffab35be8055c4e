"""One thread that owns the model: it answers requests in small batches, in the order they came.

Changes of the stack of adapters wait in the same queue, so a request is answered with the slots as
they were when it came. Batches have a few fixed sizes, each compiled once, before the first of
them.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np

import lorax_fn as lora
from service.slots import Slots

BASE = -1
SIZES = (1, 4, 16)  # of batches; the next larger one is filled up with padding


class OverloadedError(RuntimeError):
    """More requests are waiting than can be answered soon."""


class _Question(NamedTuple):
    ids: np.ndarray  # (time,)
    mask: np.ndarray  # (time,)
    slot: int
    answer: Future


class _Change(NamedTuple):
    fn: Callable[[], None]
    done: Future


class Engine:
    """Answers with the slots' adapters; `ask` and `change` may be called from any thread."""

    def __init__(
        self,
        apply_fn: Callable[..., Any],
        variables: Any,
        slots: Slots,
        *,
        length: int,
        patience: float = 0.002,
        backlog: int = 512,
    ) -> None:
        """`length`: tokens of a text; `patience`: seconds that a batch waits to grow."""
        self._apply = jax.jit(lora.wrap_batched(apply_fn, dense="error"))
        self._variables, self._slots, self._patience = variables, slots, patience
        self._backlog, self._queue = backlog, queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.batches = 0
        for size in SIZES:
            empty = np.zeros((size, length), np.int32)
            self._answer(empty, empty + 1, np.full(size, BASE, np.int32))
        slots.write(0, slots.blank())

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Answers what waits, then ends the thread."""
        self._queue.put(None)
        self._thread.join()

    def ask(self, ids: np.ndarray, mask: np.ndarray, slot: int) -> Future:
        """Will hold the logits of one text.

        Raises:
            OverloadedError: if too many wait already.
        """
        if self._queue.qsize() >= self._backlog:
            raise OverloadedError("too many requests are waiting; try again")
        question = _Question(ids, mask, slot, Future())
        self._queue.put(question)
        return question.answer

    def change(self, fn: Callable[[], None]) -> Future:
        """Will be done when `fn` was called, after all that was asked before."""
        change = _Change(fn, Future())
        self._queue.put(change)
        return change.done

    def _run(self) -> None:
        item = self._queue.get()
        while item is not None:
            if isinstance(item, _Change):
                _settle(item.done, item.fn)
                item = self._queue.get()
                continue
            batch, item = self._gather(item)
            self._answer_all(batch)
            if item is _NOTHING:
                item = self._queue.get()

    def _gather(self, first: _Question) -> tuple[list[_Question], Any]:
        """A batch that starts with this question, and what comes after it."""
        batch, deadline = [first], time.monotonic() + self._patience
        while len(batch) < SIZES[-1]:
            try:
                item = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if not isinstance(item, _Question):
                return batch, item
            batch.append(item)
        return batch, _NOTHING

    def _answer_all(self, batch: list[_Question]) -> None:
        size = next(size for size in SIZES if size >= len(batch))
        filler = [batch[0]._replace(slot=BASE)] * (size - len(batch))
        ids, mask, slots = (
            np.stack(
                [np.asarray(getattr(question, field), np.int32) for question in batch + filler]
            )
            for field in ("ids", "mask", "slot")
        )
        self.batches += 1
        whole: Future = Future()
        _settle(whole, lambda: np.asarray(self._answer(ids, mask, slots)))
        for i, question in enumerate(batch):
            _settle(question.answer, lambda i=i: whole.result()[i])

    def _answer(self, ids: np.ndarray, mask: np.ndarray, slots: np.ndarray) -> jax.Array:
        return self._apply(self._variables, self._slots.stacked, slots, ids, mask)


_NOTHING = object()


def _settle(future: Future, fn: Callable[[], Any]) -> None:
    """Calls `fn` for the future's result, unless who asked has gone."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(fn())
    except Exception as e:  # noqa: BLE001 (whoever asked shall hear of it)
        future.set_exception(e)
