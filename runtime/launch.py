"""Workers for a plain script or notebook: one supervised process per device, driven by calls from this one.

``Workers(["cpu", "cpu"]).call(function, x)`` runs ``function(session, x)`` in every worker and returns the results by
rank. The processes are started anew (never forked, and the caller's ``__main__`` is not imported there, so a script
needs no ``if __name__ == "__main__"``); they talk over inherited sockets and meet in a process group whose store
listens on a loopback port that the system chose.

Supervision: while a call runs the driver waits for answers, deaths and missing signs of life at once. Whatever goes
wrong - a worker that raises, dies, is stopped or late, an interrupt in the driver - ends all workers, because a process
group that lost a call is in no known state. Workers end with their driver, however it ends.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

from shardplan.errors import UsageError
from shardplan.runtime.blame import blame, lateness, silence
from shardplan.runtime.messages import Channel, Closed, Late, encode
from shardplan.runtime.pulse import BEAT_SECONDS, SLOT_NBYTES, Slot
from shardplan.runtime.worker import Setup

START_SECONDS = 300.0
TIMEOUT_SECONDS = 1800.0
HEARTBEAT_SECONDS = 30.0
_GRACE_SECONDS = 2.0
_COLLECT_SECONDS = 1.0


@dataclass(slots=True)
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    channel: Channel
    lifeline: int
    sentinel: int  # becomes readable when the process has ended; -1 where the system has no such thing
    slot: Slot


class Workers:
    """See the module docstring. devices: a torch device per rank. timeout_seconds: the longest a call may take.
    heartbeat_seconds: the longest that a worker in a call may give no sign of life.

    pin_cores: keep every CPU worker on a core of its own. Starting returns at once; the first call waits for it.
    """

    def __init__(
        self,
        devices: Sequence[str],
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        pin_cores: bool = False,
    ) -> None:
        if not devices:
            raise UsageError("no devices to start workers on")
        self.devices = tuple(devices)
        self.timeout_seconds = timeout_seconds
        self.heartbeat_seconds = heartbeat_seconds
        self._workers: list[_Worker] = []
        self._ready = False
        self._finalizer = weakref.finalize(self, _end_at_exit, self._workers, os.getpid())
        try:
            self._start(pin_cores)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.devices)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers that were started and not closed."""
        return tuple(worker.process.pid for worker in self._workers)

    @property
    def closed(self) -> bool:
        return not self._workers

    def call(self, function: Callable[..., Any], *arguments: Any, timeout_seconds: float | None = None) -> list[Any]:
        """``function(session, *arguments)`` in every worker; results by rank.

        function is sent by name, or by value if it is of ``__main__`` or a lambda. Raises WorkerFailed (attribute
        `rank`) with the worker's traceback or how it ended, WorkerTimeout, or, if every worker refused with an error
        of shardplan's own, that error; only in the last case the workers go on.
        """
        return self.call_each(function, [arguments] * len(self.devices), timeout_seconds=timeout_seconds)

    def call_each(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], timeout_seconds: float | None = None
    ) -> list[Any]:
        """As `call`, with arguments of its own for every rank (sent as one where they are the same object)."""
        self._check_open()
        frames: dict[int, list[memoryview]] = {}
        for values in arguments:
            if id(values) not in frames:
                frames[id(values)] = encode((function, values))
        try:
            self._wait_ready()
            seconds = self.timeout_seconds if timeout_seconds is None else timeout_seconds
            answers = self._exchange([frames[id(values)] for values in arguments], seconds)
        except BaseException:
            self.close(grace_seconds=0.0)
            raise
        errors = [value.error for kind, value in answers if kind == "error"]
        if errors:
            raise errors[0]
        return [value for _, value in answers]

    def wait_ready(self) -> None:
        """Wait until all workers have started and met. Raises as `call`."""
        self._check_open()
        try:
            self._wait_ready()
        except BaseException:
            self.close(grace_seconds=0.0)
            raise

    def _wait_ready(self) -> None:
        if not self._ready:
            self._exchange([[]] * len(self.devices), START_SECONDS)
            self._ready = True

    def close(self, grace_seconds: float = _GRACE_SECONDS) -> None:
        """End all workers: politely, after `grace_seconds` by force. Does nothing the second time."""
        workers, self._workers[:] = list(self._workers), []
        _end(workers, grace_seconds)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- starting ------------------------------------------------------------------------------------------------------

    def _start(self, pin_cores: bool) -> None:
        cuda = any(name.startswith("cuda") for name in self.devices)
        if cuda and any(not name.startswith("cuda") for name in self.devices):
            raise UsageError("CPU and GPU workers in one job", hints=["name devices of one kind"])
        cores = _cores(len(self.devices)) if pin_cores and not cuda else [-1] * len(self.devices)
        with socket.socket() as listener, _board(len(self.devices)) as (board, slots):
            listener.bind(("127.0.0.1", 0))
            listener.listen(max(128, len(self.devices)))
            port = listener.getsockname()[1]
            for rank in range(len(self.devices)):
                self._workers.append(_spawn(rank, not cuda, listener.fileno() if rank == 0 else -1, board, slots[rank]))
            path = tuple(os.path.abspath(entry) for entry in sys.path)
            for rank, device in enumerate(self.devices):
                setup = Setup(
                    rank=rank,
                    world_size=len(self.devices),
                    device=device,
                    backend="nccl" if cuda else "gloo",
                    port=port,
                    listen_fd=listener.fileno() if rank == 0 else -1,
                    timeout_seconds=self.timeout_seconds,
                    core=cores[rank],
                    path=path,
                )
                with contextlib.suppress(Closed):  # the first call says how it ended
                    self._workers[rank].channel.send(setup, START_SECONDS)

    def _check_open(self) -> None:
        if not self._workers:
            raise UsageError("the workers of this model were closed", hints=["call auto_parallel again"])

    # -- one call ------------------------------------------------------------------------------------------------------

    def _exchange(self, frames: Sequence[list[memoryview]], seconds: float) -> list[tuple[str, Any]]:
        """Send a frame to every worker (none where it is empty) and wait for all answers.

        An answer is ("result", value), or ("error", Failure) if all workers gave a ShardplanError.
        """
        deadline = time.monotonic() + seconds
        answers: dict[int, tuple[str, Any]] = {}
        ended: dict[int, str] = {}
        late: list[int] = []
        silent: list[int] = []
        for worker, frame in zip(self._workers, frames, strict=True):
            try:
                worker.channel.send_frame(frame, max(deadline - time.monotonic(), 0.0))
            except Closed:
                ended[worker.rank] = _how_it_ended(worker)
            except Late:
                late.append(worker.rank)
        while len(answers) + len(ended) < len(self._workers) and not late and not silent:
            left = deadline - time.monotonic()
            if left <= 0:
                late = [w.rank for w in self._workers if w.rank not in answers and w.rank not in ended]
                break
            waiting = [w for w in self._workers if w.rank not in answers and w.rank not in ended]
            ready = self._ready_of(waiting, min(left, BEAT_SECONDS))
            silent = [] if ready else [w.rank for w in waiting if self._is_silent(w)]
            for worker in ready:
                try:
                    answers[worker.rank] = worker.channel.receive(max(deadline - time.monotonic(), 0.1))
                except Closed:
                    ended[worker.rank] = _how_it_ended(worker)
                except Late:
                    late.append(worker.rank)
            if ended or any(kind == "error" for kind, _ in answers.values()):
                # The others may follow for the same reason; what they say helps to tell cause from consequence.
                deadline = min(deadline, time.monotonic() + _COLLECT_SECONDS)
        failures = {rank: value for rank, (kind, value) in answers.items() if kind == "error"}
        if ended or failures:
            if len(failures) == len(self._workers) and all(f.error is not None for f in failures.values()):
                return [answers[w.rank] for w in self._workers]
            raise blame(failures, ended, self._places())
        if silent:
            raise silence(silent, self.heartbeat_seconds, self._places())
        if late:
            raise lateness(late, answers, seconds, self._places())
        return [answers[worker.rank] for worker in self._workers]

    def _is_silent(self, worker: _Worker) -> bool:
        beaten = worker.slot.beaten
        return bool(beaten) and time.monotonic() - beaten > self.heartbeat_seconds

    def _places(self) -> dict[int, str]:
        """Where every worker is, or was when it ended."""
        return {worker.rank: worker.slot.where() for worker in self._workers}

    def _ready_of(self, workers: Sequence[_Worker], seconds: float) -> list[_Worker]:
        """Workers of which an answer, or the end, can be read; waits for at most `seconds`."""
        sources: dict[int, _Worker] = {}
        for worker in workers:
            sources[worker.channel.fileno()] = worker
            if worker.sentinel >= 0:
                sources[worker.sentinel] = worker
        found = connection.wait(list(sources), seconds)
        return list({id(worker): worker for worker in (sources[fd] for fd in found)}.values())  # type: ignore[index]


# -- processes ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _board(workers: int) -> Iterator[tuple[int, list[Slot]]]:
    """A file without a name, with a slot for every worker, and the slots."""
    with tempfile.TemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as file:
        file.truncate(workers * SLOT_NBYTES)
        memory = memoryview(mmap.mmap(file.fileno(), 0))
        places = [rank * SLOT_NBYTES for rank in range(workers)]
        yield file.fileno(), [Slot(memory[place : place + SLOT_NBYTES]) for place in places]


def _spawn(rank: int, cpu: bool, listen_fd: int, board: int, slot: Slot) -> _Worker:
    environment = dict(os.environ)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    if cpu:
        environment.setdefault("OMP_NUM_THREADS", "1")
        environment["GLOO_SOCKET_IFNAME"] = _loopback()
    # The worker must find this very package however the driver found it.
    root = os.path.dirname(os.path.dirname(os.path.abspath(sys.modules["shardplan"].__file__ or "")))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), root]))
    ours, theirs = socket.socketpair()
    read_end, write_end = os.pipe()
    try:
        inherited = [theirs.fileno(), read_end, board, *([listen_fd] if listen_fd >= 0 else [])]
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "shardplan.runtime.worker",
                str(theirs.fileno()),
                str(read_end),
                str(os.getpid()),
                # The kernel's signal comes when the starting *thread* ends, which only for the main one is the end.
                "1" if threading.current_thread() is threading.main_thread() else "0",
                str(board),
                str(rank),
            ],
            pass_fds=inherited,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except BaseException:
        ours.close()
        os.close(write_end)
        raise
    finally:
        theirs.close()
        os.close(read_end)
    sentinel = -1
    if hasattr(os, "pidfd_open"):
        with contextlib.suppress(OSError):
            sentinel = os.pidfd_open(process.pid)
    return _Worker(rank, process, Channel(ours), write_end, sentinel, slot)


def _end(workers: list[_Worker], grace_seconds: float) -> None:
    """Close the channels (a worker that waits for a call then exits by itself), then terminate, then kill."""
    taken, workers[:] = list(workers), []
    for worker in taken:
        worker.channel.close()
    deadline = time.monotonic() + grace_seconds
    for worker in taken:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(max(deadline - time.monotonic(), 0.0))
    for worker in taken:
        if worker.process.poll() is None:
            worker.process.kill()
    for worker in taken:
        worker.process.wait()
        os.close(worker.lifeline)
        if worker.sentinel >= 0:
            os.close(worker.sentinel)


def _end_at_exit(workers: list[_Worker], owner: int) -> None:
    if os.getpid() == owner:  # not in a fork of the driver
        _end(workers, 0.0)


def _cores(count: int) -> list[int]:
    """A core per worker where there are enough, else none (-1)."""
    own = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return own[:count] if len(own) >= count else [-1] * count


def _loopback() -> str:
    return "lo" if sys.platform.startswith("linux") else "lo0"


def _how_it_ended(worker: _Worker) -> str:
    try:
        status = worker.process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        return "closed its connection"
    if status < 0:
        try:
            return f"was killed by signal {-status} ({signal.Signals(-status).name})"
        except ValueError:
            return f"was killed by signal {-status}"
    return f"exited with status {status}"
