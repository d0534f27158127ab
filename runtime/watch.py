"""Ranks that nobody supervises (under torchrun) watch each other: every rank publishes its signs of life in the store
of the job, and reads those of its neighbours.

A rank that is silent for too long, or whose calls differ from this one's, is a *verdict*: the first rank to find it
publishes it, and every rank raises it. A rank that is blocked in a collective of gloo cannot be interrupted: if it is
still in the same call a moment later, the verdict is printed and the process ends.

Calls are compared by number, the last 16 and every 64th, by what was called and by a sample of the batch.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from shardplan.errors import ShardplanError, WorkerFailed, WorkerTimeout
from shardplan.runtime.blame import is_of_a_peer
from shardplan.runtime.pulse import Slot

_NEIGHBOURS = 16
_RECENT = 16
_PERIOD = 64
_GRACE_SECONDS = 3.0
_SAMPLE = 512
_KINDS = {"failed": WorkerFailed, "silent": WorkerTimeout}


class Watch:
    """One rank's part in it. Make it on every rank, once the process group is there.

    heartbeat_seconds: the longest silence. job: a name that is the same on all ranks, and no earlier watch's, because a
    restarted job may find the store of the one before. A rank that closes its watch, or ends in order, is not missed.
    """

    def __init__(self, rank: int, world_size: int, slot: Slot, heartbeat_seconds: float, job: str) -> None:
        self.rank = rank
        self.slot = slot
        self.heartbeat_seconds = heartbeat_seconds
        self._job = job
        self._interval = min(heartbeat_seconds / 4, 2.0)
        distances = range(1, min(world_size, _NEIGHBOURS + 1))
        self._watched = [(rank + distance) % world_size for distance in distances]
        self._store = _own_connection()
        self._calls: dict[int, tuple[str, int]] = {}
        self._seen: dict[int, tuple[int, float]] = {}
        self._count = 0
        self._places: dict[int, str] = {}
        self._verdict: ShardplanError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        atexit.register(self.close)
        if self._watched:
            self._publish()
            self._thread.start()

    # -- in the calling thread -----------------------------------------------------------------------------------------

    def begin(self, call: str, batch: Mapping[str, Any] | None) -> None:
        """This rank begins a call. Raises the verdict, if there is one."""
        if self._verdict is not None:
            raise self._verdict
        self.slot.begin(call)
        sample = sample_of(batch) if batch else 0
        number = self.slot.calls
        self._calls.pop(number - _RECENT if (number - _RECENT) % _PERIOD else 0, None)
        self._calls.pop(number - _RECENT * _PERIOD, None)
        self._calls[number] = call, sample

    def end(self) -> None:
        self.slot.end()

    def explained(self, error: Exception) -> Exception:
        """The error that says which rank a call was ended for, and where this one was; `error` itself where that is
        not another rank's doing."""
        if isinstance(error, ShardplanError) or not is_of_a_peer(type(error).__name__, str(error)):
            return error
        others = [f"rank {rank} was last at: {place}" for rank, place in sorted(self._places.items())]
        if self._verdict is not None:
            return self._verdict
        late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        kind = WorkerTimeout if late else WorkerFailed
        what = "waited too long for a peer" if late else "lost a peer"
        found = kind(
            f"rank {self.rank} {what} at {self.slot.where()}",
            [*str(error).splitlines()[:2], *others],
            ["timeout_seconds= sets the limit"] if late else (),
        )
        found.rank = self.rank
        return found

    def close(self) -> None:
        """This rank leaves; it is not missed."""
        atexit.unregister(self.close)
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(2 * self._interval)
        try:
            self._store.set(self._key("ended", self.rank), "1")
        except Exception:
            return  # the store went first: nobody is left to tell

    def _key(self, *words: object) -> str:
        return "/".join(("shardplan", self._job, *map(str, words)))

    # -- in the background ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self._interval):
            now = time.monotonic()
            if now - last > self.heartbeat_seconds:
                self._seen.clear()  # it was this process that did not run: what others did meanwhile is not known
            last = now
            try:
                self._publish()
                self._look()
            except Exception as error:
                if self._stop.is_set():
                    return
                first = str(error).strip().splitlines()
                self._judge(
                    WorkerFailed(
                        f"rank {self.rank} cannot reach the store of the job, at {self.slot.where()}", first[:1]
                    )
                )
            if self._verdict is not None:
                self._enforce(self._verdict)
                return

    def _publish(self) -> None:
        self._count += 1
        pulse = {"count": self._count, "where": self.slot.where(), "calls": self._calls.copy()}
        self._store.set(self._key("pulse", self.rank), json.dumps(pulse))

    def _look(self) -> None:
        if self._store.check([self._key("verdict")]):
            kind, rank, title, details = json.loads(self._store.get(self._key("verdict")))
            self._judge(_error(kind, rank, title, details))
            return
        now = time.monotonic()
        for other in self._watched:
            if self._store.check([self._key("ended", other)]):
                self._seen.pop(other, None)
                continue
            if not self._store.check([self._key("pulse", other)]):
                continue  # it has not come to its first call
            pulse = json.loads(self._store.get(self._key("pulse", other)))
            self._places[other] = pulse["where"]
            self._compare(other, pulse["calls"])
            count, since = self._seen.get(other, (-1, now))
            if count != pulse["count"]:
                self._seen[other] = pulse["count"], now
            elif now - since > self.heartbeat_seconds:
                self._publish_verdict(
                    "silent",
                    other,
                    f"rank {other} gave no sign of life for {self.heartbeat_seconds:g} s, at {pulse['where']}",
                    [f"rank {self.rank} was at: {self.slot.where()}"],
                )
                return

    def _compare(self, other: int, calls: Mapping[str, Any]) -> None:
        for number, (call, sample) in self._calls.copy().items():
            name, other_sample = calls.get(str(number), (call, sample))
            if name != call:
                text = f"call {number} is {name} on rank {other} and {call} on rank {self.rank}"
            elif sample and other_sample and sample != other_sample:
                text = f"call {number} ({call}) has another batch on rank {other} than on rank {self.rank}"
            else:
                continue
            self._publish_verdict(
                "failed", other, text, ["every process makes the same calls, with the same global batch"]
            )
            return

    def _publish_verdict(self, kind: str, rank: int, title: str, details: list[str]) -> None:
        self._store.set(self._key("verdict"), json.dumps((kind, rank, title, details)))
        self._judge(_error(kind, rank, title, details))

    def _judge(self, verdict: ShardplanError) -> None:
        self._verdict = self._verdict or verdict

    def _enforce(self, verdict: ShardplanError) -> None:
        """End the process if the verdict does not come through: the call that runs now never returns by itself."""
        if not self.slot.call:
            return  # the next call raises it
        if self._stop.wait(_GRACE_SECONDS):
            return
        if self.slot.call:
            print(f"rank {self.rank}: {verdict}", file=sys.stderr, flush=True)
            os._exit(1)


def sample_of(batch: Mapping[str, Any]) -> int:
    """A number by which batches can be told apart: of names, shapes and the first and last bytes of every tensor on the
    CPU. Never 0."""
    found = 1
    for name, value in sorted(batch.items()):
        if not isinstance(value, torch.Tensor):
            continue
        found = zlib.crc32(f"{name}{tuple(value.shape)}".encode(), found)
        if value.device.type == "cpu" and value.layout is torch.strided and value.is_contiguous() and value.numel():
            flat = value.detach().reshape(-1)
            for part in (flat[:_SAMPLE], flat[-_SAMPLE:]):
                found = zlib.crc32(part.contiguous().view(torch.uint8).numpy().data, found)
    return found or 1


def _own_connection() -> Any:
    """The job's store over a connection of its own: a blocked one would hold the signs of life back."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        return store
    return TCPStore(store.host, store.port, None, False, wait_for_workers=False)


def _error(kind: str, rank: int, title: str, details: list[str]) -> ShardplanError:
    error = _KINDS[kind](title, details)
    error.rank = rank
    return error
