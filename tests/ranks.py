"""A persistent pool of gloo rank processes for tests: start once, run many functions.

``pool(2).run(fn, a, b)`` calls ``fn(rank, a, b)`` in each of two processes that share a torch.distributed process
group, and returns the list of results by rank. Importing torch costs seconds, so the processes live until the test
session ends. Whenever a rank fails or does not answer in time the whole pool is killed (its process group is in an
unknown state) and the next `run` starts a new one.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cloudpickle

_PR_SET_PDEATHSIG = 1
_GRACE_SECONDS = 2.0


class RankError(Exception):
    """A function failed on some ranks. failures: rank -> traceback text (or why there is none)."""

    def __init__(self, failures: dict[int, str]) -> None:
        self.failures = failures
        super().__init__("\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(failures.items())))


class RankPool:
    """`size` rank processes; see the module docstring."""

    def __init__(self, size: int, group_timeout_seconds: float = 60.0) -> None:
        self.size = size
        self._group_timeout_seconds = group_timeout_seconds
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> None:
        """Start the processes if they are not running; returns before they are ready."""
        if self._processes:
            return
        self._directory = tempfile.TemporaryDirectory(prefix="shardplan-ranks-")
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "RANK": "",
            "WORLD_SIZE": str(self.size),
        }
        for rank in range(self.size):
            ours, theirs = socket.socketpair()
            command = [
                sys.executable,
                str(Path(__file__).resolve()),
                str(theirs.fileno()),
                str(os.getpid()),
                str(rank),
                str(self.size),
                self._directory.name,
                str(self._group_timeout_seconds),
            ]
            with theirs:
                process = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    env={**environment, "RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                )
            self._processes.append(process)
            self._connections.append(Connection(ours.detach()))

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 60.0) -> list[Any]:
        """``function(rank, *arguments)`` on every rank; the results by rank.

        timeout: seconds; start-up of the processes is not counted. Raises RankError.
        """
        self.start()
        message = cloudpickle.dumps((function, arguments))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting: dict[Connection, int] = {}
        try:
            for rank, connection in enumerate(self._connections):
                waiting[connection] = rank
                connection.send_bytes(message)
            deadline = time.monotonic() + 120.0
            started: set[int] = set()
            while waiting:
                ready = wait(list(waiting), max(deadline - time.monotonic(), 0.0))
                if not ready:
                    reason = "no answer" if failures else f"no answer within {timeout:g} s"
                    failures |= {rank: reason for rank in waiting.values() if rank not in failures}
                    break
                for connection in ready:
                    assert isinstance(connection, Connection)
                    rank = waiting[connection]
                    try:
                        kind, value = cloudpickle.loads(connection.recv_bytes())
                    except (EOFError, ConnectionError):
                        kind, value = "error", f"process ended, exit status {self._processes[rank].wait(5)}"
                    if kind == "started":
                        started.add(rank)
                        if len(started) == self.size and not failures:
                            deadline = time.monotonic() + timeout
                        continue
                    del waiting[connection]
                    if kind == "error":
                        failures[rank] = value
                        deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
                    else:
                        results[rank] = value
        except BaseException:
            self.close()
            raise
        if failures:
            self.close()
            raise RankError(failures)
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        """Kill the processes and wait for them."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for connection in self._connections:
            connection.close()
        if self._directory is not None:
            self._directory.cleanup()
        self._processes, self._connections, self._directory = [], [], None


_pools: dict[int, RankPool] = {}


def pool(size: int) -> RankPool:
    """The session's pool of that many ranks."""
    if size not in _pools:
        _pools[size] = RankPool(size)
        atexit.register(_pools[size].close)
    return _pools[size]


def _serve(fd: int, parent: int, rank: int, size: int, directory: str, timeout_seconds: float) -> None:
    """Body of a rank process: join the group, then run what arrives until the pipe closes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    connection = Connection(fd)
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, ConnectionError):
            return
        connection.send_bytes(cloudpickle.dumps(("started", None)))
        try:
            function, arguments = cloudpickle.loads(message)
            answer = cloudpickle.dumps(("result", function(rank, *arguments)))
        except Exception:
            answer = cloudpickle.dumps(("error", traceback.format_exc()))
        connection.send_bytes(answer)


if __name__ == "__main__":
    _serve(*(int(part) for part in sys.argv[1:5]), sys.argv[5], float(sys.argv[6]))  # type: ignore[misc]
