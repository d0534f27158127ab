"""Rank processes on the hosts of an emulated cluster, and a driver that runs functions on all of them at once.

A rank is pinned to a core, or held to a share of one. They share a torch.distributed process group (gloo over the
emulated links). Commands reach a rank over a socket that it inherits, which no namespace stands in the way of.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle

from benchmarks.cluster.build import build
from benchmarks.cluster.links import Links
from benchmarks.cluster.network import Network, missing
from benchmarks.cluster.quota import Quota

ROOT = Path(__file__).resolve().parents[2]


class RankFailed(Exception):
    """A function failed on some rank; the text has its traceback."""


class EmulatedCluster:
    """A context manager: `links.hosts` ranks, one a host.

    cores: of every rank; default: in turn. shares: of a core's time that each rank may use; one for all of them; None:
    all of it, before other work of the machine. loopback: no namespaces, no shaping, no shares (needs no root).
    environment: of the ranks, added to this process's.
    """

    def __init__(
        self,
        links: Links,
        cores: list[int] | None = None,
        shares: float | Sequence[float] | None = None,
        loopback: bool = False,
        environment: dict[str, str] | None = None,
    ) -> None:
        if not loopback and (why := missing()):
            raise RuntimeError(f"no emulated links here: {why}; loopback=True runs without")
        self.links = links
        self.size = links.hosts
        usable = sorted(os.sched_getaffinity(0))
        self._cores = cores or [usable[rank % len(usable)] for rank in range(self.size)]
        self._network: Network | None = None
        self._quotas: list[Quota] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._folder = tempfile.TemporaryDirectory(prefix=f"shardplan-cluster-{os.getpid()}-")
        try:
            if not loopback:
                self._network = Network(links)
            for rank in range(self.size):
                if not loopback:
                    share = shares[rank] if isinstance(shares, Sequence) else shares
                    self._quotas.append(Quota(f"r{rank}", share))
                self._start(rank, environment or {})
        except BaseException:
            self.close()
            raise

    def _start(self, rank: int, more: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        enter = self._network.enter(rank) if self._network else []
        command = [*enter, "taskset", "-c", str(self._cores[rank]), sys.executable, "-m", "benchmarks.cluster.rank"]
        command += [str(theirs.fileno()), str(os.getpid()), str(rank), str(self.size), self._folder.name]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "eth0" if self._network else "lo",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            **more,
        }
        if self._network:
            environment["LD_PRELOAD"] = str(build("steady"))
        with theirs:
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)
        if self._quotas:
            self._quotas[rank].add(process.pid)
        self._processes.append(process)
        self._connections.append(Connection(ours.detach()))

    def change(self, links: Links) -> None:
        """Other links between the same ranks, from now on. Without a network nothing changes."""
        self.links = links
        if self._network:
            self._network.change(links)

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_seconds: float = 300.0) -> list[Any]:
        """``function(rank, *arguments)`` on every rank -> results by rank. Raises RankFailed; the cluster is then of no
        more use."""
        message = cloudpickle.dumps((function, arguments))
        for connection in self._connections:
            connection.send_bytes(message)
        deadline = time.monotonic() + timeout_seconds
        results = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(max(deadline - time.monotonic(), 0.0)):
                self.close()
                raise RankFailed(f"rank {rank} did not answer within {timeout_seconds:g} s")
            try:
                done, value = cloudpickle.loads(connection.recv_bytes())
            except EOFError:
                self.close()
                raise RankFailed(f"rank {rank} died") from None
            if not done:
                self.close()
                raise RankFailed(f"rank {rank}:\n{value}")
            results.append(value)
        return results

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        for quota in self._quotas:
            quota.close()
        self._quotas = []
        if self._network is not None:
            self._network.close()
            self._network = None
        self._folder.cleanup()

    def __enter__(self) -> EmulatedCluster:
        # A time limit ends a benchmark by SIGTERM: what was made is to go with it.
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
