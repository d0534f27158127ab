"""Inference requests in batches: `ParallelModel.engine`.

Requests wait in a bounded queue. One thread takes those that fit together (same shapes), as many as a batch holds or as
came within the longest wait, pads the batch to a size that has a program, runs it, and gives every request its row.
Under torchrun rank 0 takes requests; the other ranks run `Server.serve`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from shardplan.errors import Overloaded, ShardplanError, UsageError
from shardplan.ranks import InPlace, Ranks
from shardplan.runtime import rank_calls

_KEPT_LATENCIES = 2048
_IDLE_SECONDS = 30.0

log = logging.getLogger("shardplan")
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Followers:
    """The ranks that run batches. Under torchrun rank 0 hands every batch to the others, which `follow`.

    run: (arguments, keywords) of a whole batch -> output; a call that all ranks make at once.
    """

    def __init__(self, ranks: Ranks, run: Callable[[Call], Any]) -> None:
        self._ranks, self._run = ranks, run
        self._device = ranks.session.device if isinstance(ranks, InPlace) else "cpu"
        self.leads = not isinstance(ranks, InPlace) or ranks.session.rank == 0

    def run(self, call: Call) -> Any:
        if self._device.startswith("cuda"):
            torch.cuda.set_device(self._device)  # of this thread
        self._tell("run", call)
        return self._run(call)

    def keep(self) -> None:
        """Nothing is asked for; waiting ranks are told so before they wait too long."""
        self._tell("wait", None)

    def end(self) -> None:
        self._tell("end", None)

    def _tell(self, kind: str, call: Call | None) -> None:
        if self._ranks.in_place:
            self._ranks.call(rank_calls.share, (kind, call))

    def follow(self) -> None:
        """Run what rank 0 hands out until it ends."""
        while (told := self._ranks.call(rank_calls.share, None))[0] != "end":
            if told[0] == "run":
                with suppress(UsageError):  # of these inputs, on every rank alike
                    self._run(told[1])


@dataclass(frozen=True, slots=True)
class Stats:
    """What a server did so far. seconds: from submission to answer, of the last requests, by percentile (50, 95, 99);
    mean_batch: requests per batch; padding: share of computed rows that no request asked for."""

    answered: int
    failed: int
    refused: int
    batches: int
    queued: int
    mean_batch: float
    padding: float
    seconds: dict[int, float]


@dataclass(slots=True, eq=False)
class _Request:
    leaves: list[Any]
    spec: Any
    shapes: tuple[Any, ...]
    future: Future[Any]
    since: float = field(default_factory=time.monotonic)


class Server:
    """See the module docstring. sizes: batch sizes that are run; the last is the largest. ended: called at the end."""

    def __init__(
        self,
        ranks: Followers,
        sizes: Sequence[int],
        max_wait_seconds: float,
        max_queue: int,
        ended: Callable[[], None],
    ) -> None:
        self.sizes = tuple(sorted(sizes))
        self._ranks, self._ended = ranks, ended
        self._max_wait_seconds = max_wait_seconds
        self._max_queue = max_queue
        self._queue: deque[_Request] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._failure: BaseException | None = None
        self._latencies: deque[float] = deque(maxlen=_KEPT_LATENCIES)
        self._answered = self._failed = self._refused = self._batches = self._rows = self._padded = 0
        self.thread = threading.current_thread()
        if ranks.leads:
            self.thread = threading.Thread(target=self._work, name="engine", daemon=True)
            self.thread.start()

    # -- asking --------------------------------------------------------------------------------------------------------

    def submit(
        self,
        *inputs: Any,
        callback: Callable[[Future[Any]], Any] | None = None,
        timeout_seconds: float | None = None,
        **kwargs: Any,
    ) -> Future[Any]:
        """Ask for one sample: the model's inputs without their batch dim. -> a future of its output, without it.

        Where the queue is full this waits, at most `timeout_seconds` (None: for ever; 0: not at all), and raises
        Overloaded. callback: called with the future when it is done, in the engine's thread. Raises UsageError once the
        engine is closed. An error of the request, or of the batch it was in, is the future's.
        """
        if not self._ranks.leads:
            raise UsageError("requests go to rank 0", hints=["the other ranks call engine.serve()"])
        leaves, spec = pytree.tree_flatten((inputs, kwargs))
        request = _Request(leaves, spec, (spec, *map(_shape, leaves)), Future())
        if callback is not None:
            request.future.add_done_callback(callback)
        with self._changed:
            self._check_open()
            if not self._changed.wait_for(lambda: self._closing or len(self._queue) < self._max_queue, timeout_seconds):
                self._refused += 1
                raise Overloaded(
                    f"{len(self._queue)} requests wait, which is the most",
                    hints=["submit(timeout_seconds=...) waits for room", "engine(max_queue=...)"],
                )
            self._check_open()
            self._queue.append(request)
            self._changed.notify_all()
        return request.future

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """The output for one sample."""
        return self.submit(*inputs, **kwargs).result()

    def serve(self) -> None:
        """Take part until rank 0 closes its engine; every rank but rank 0 calls it (under torchrun)."""
        if self._ranks.leads or self._closing:
            raise UsageError("rank 0 takes requests" if self._ranks.leads else "the engine was closed")
        try:
            self._ranks.follow()
        finally:
            self._closing = True
            self._ended()

    def stats(self) -> Stats:
        with self._changed:
            ordered = sorted(self._latencies)
            seconds = {p: ordered[min(len(ordered) * p // 100, len(ordered) - 1)] for p in (50, 95, 99) if ordered}
            return Stats(
                self._answered,
                self._failed,
                self._refused,
                self._batches,
                len(self._queue),
                self._rows / self._batches if self._batches else 0.0,
                self._padded / (self._rows + self._padded) if self._rows else 0.0,
                seconds,
            )

    def close(self, drain: bool = True) -> None:
        """Take no more requests; answer those that wait (drain), or cancel them. Does nothing the second time."""
        with self._changed:
            self._closing = True
            if not drain:
                for request in self._queue:
                    request.future.cancel()
                self._queue.clear()
            self._changed.notify_all()
        if self._ranks.leads and threading.current_thread() is not self.thread:
            self.thread.join()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self.close(drain=kind is None)

    def _check_open(self) -> None:
        if self._failure is not None:
            raise UsageError("the engine has failed", [str(self._failure)])
        if self._closing:
            raise UsageError("the engine was closed")

    # -- answering -----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while (batch := self._next_batch()) is not None:
                if batch:
                    self._answer(batch)
                else:
                    self._ranks.keep()
            self._ranks.end()
        except BaseException as error:
            self._fail(error)
        finally:
            self._ended()

    def _next_batch(self) -> list[_Request] | None:
        """Requests of the same shapes, in order; [] after a long idle time, None at the end."""
        largest = self.sizes[-1]
        with self._changed:
            if not self._changed.wait_for(lambda: self._queue or self._closing, _IDLE_SECONDS):
                return []
            if not self._queue:
                return None
            first = self._queue[0]
            due = first.since + self._max_wait_seconds

            def alike() -> list[_Request]:
                return [request for request in self._queue if request.shapes == first.shapes][:largest]

            while len(found := alike()) < largest and not self._closing and time.monotonic() < due:
                self._changed.wait(max(due - time.monotonic(), 0.0))
                if first not in self._queue:
                    return []  # cancelled by `close`
            taken = set(map(id, found))
            self._queue = deque(request for request in self._queue if id(request) not in taken)
            self._changed.notify_all()
        return [request for request in found if request.future.set_running_or_notify_cancel()]

    def _answer(self, batch: list[_Request]) -> None:
        size = next(size for size in self.sizes if size >= len(batch))
        try:
            outputs = self._ranks.run(_stacked(batch, size))
        except UsageError as error:  # of these inputs; the ranks go on
            self._refuse(batch, error)
            return
        except ShardplanError as error:
            self._refuse(batch, error)
            if error.code.startswith("SP5"):
                raise
            return
        except Exception as error:
            self._refuse(batch, error)
            raise
        now = time.monotonic()
        with self._changed:
            self._batches += 1
            self._rows += len(batch)
            self._padded += size - len(batch)
            self._answered += len(batch)
            self._latencies.extend(now - request.since for request in batch)
        for index, request in enumerate(batch):
            request.future.set_result(_row(outputs, index, size))

    def _refuse(self, batch: list[_Request], error: BaseException) -> None:
        with self._changed:
            self._failed += len(batch)
        for request in batch:
            request.future.set_exception(error)

    def _fail(self, error: BaseException) -> None:
        """The ranks are gone: nothing that waits can be answered."""
        log.error("the engine has failed: %s", error)
        with self._changed:
            self._failure, self._closing = error, True
            waiting, self._queue = list(self._queue), deque()
            self._changed.notify_all()
        self._refuse([request for request in waiting if request.future.set_running_or_notify_cancel()], error)


def _shape(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf


def _stacked(batch: list[_Request], size: int) -> Call:
    """The call for all of them; rows that are missing repeat the last one. Values that are no tensors are alike."""
    columns = []
    for leaves in zip(*(request.leaves for request in batch), strict=True):
        if isinstance(leaves[0], torch.Tensor):
            columns.append(torch.stack([*leaves, *[leaves[-1]] * (size - len(leaves))]))
        else:
            columns.append(leaves[0])
    return pytree.tree_unflatten(columns, batch[0].spec)


def _row(outputs: Any, index: int, size: int) -> Any:
    def take(value: torch.Tensor) -> torch.Tensor:
        return value[index].clone() if value.ndim and value.shape[0] == size else value

    return pytree.tree_map_only(torch.Tensor, take, outputs)


def check_settings(max_batch: int, max_wait_ms: float, max_queue: int, sizes: Sequence[int] | None) -> tuple[int, ...]:
    """-> batch sizes. Raises UsageError."""
    found = tuple(sorted({*(sizes or ()), max_batch}))
    if found[0] < 1 or found[-1] > max_batch or max_wait_ms < 0 or max_queue < 1:
        raise UsageError(
            f"engine(max_batch={max_batch}, max_wait_ms={max_wait_ms}, max_queue={max_queue}, sizes={sizes})",
            hints=["sizes are batch sizes from 1 to max_batch"],
        )
    return found
