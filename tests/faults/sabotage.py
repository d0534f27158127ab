"""What is done to a rank, from within: functions of a session, and what is looked at from outside."""

from __future__ import annotations

import gc
import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

from shardplan.runtime import rank_calls, saving


def signal_at(session: Any, rank: int, index: int, number: int) -> str:
    """Rank `rank` gets a signal at its instruction `index` of the next step. -> that instruction ("" elsewhere)."""
    if session.rank != rank:
        return ""
    executor = rank_calls.engine_of(session).executor("train")
    index %= len(executor.instructions)
    plain = executor._handlers[index]

    def handler(at: int, instruction: Any) -> None:
        executor._handlers[index] = plain
        os.kill(os.getpid(), number)
        plain(at, instruction)

    executor._handlers[index] = handler
    return str(executor.instructions[index])


def raise_at(session: Any, rank: int, where: str) -> None:
    """User code of rank `rank` raises at its next call: the "optimizer", the "scheduler" or the "dataset"."""
    if session.rank != rank:
        return

    def fail(*arguments: Any, **keywords: Any) -> None:
        raise ArithmeticError(f"the {where} of rank {rank} failed")

    engine = rank_calls.engine_of(session)
    if where == "dataset":
        session.values["loaders"][0]._source.dataset.__class__.__getitem__ = fail
    else:
        getattr(engine, where).step = fail


def fill_disk(session: Any, rank: int, nbytes: int) -> None:
    """Rank `rank` cannot write files of more bytes (0: it can)."""
    if session.rank == rank:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes or most, most))


def die_in_save(session: Any, rank: int, where: str) -> None:
    """Rank `rank` is killed in the next save: before its file ("begin"), after it ("written"), or between the two
    renames that replace an older checkpoint ("renamed", rank 0 only)."""
    if session.rank != rank:
        return
    write, replace = saving.write_parts, os.replace

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write_and_die(*arguments: Any) -> Any:
        if where == "written":
            write(*arguments)
        die()

    def rename_and_die(source: Any, target: Any) -> None:
        replace(source, target)
        if Path(target).name.startswith(".") or not Path(source).name.startswith("."):
            die()

    if where == "renamed":
        saving.os.replace = rename_and_die  # type: ignore[assignment]
    else:
        saving.write_parts = write_and_die


class Left:
    """What this process has open: file descriptors, threads, children, and files in shared memory."""

    def __init__(self) -> None:
        self.fds = len(os.listdir("/proc/self/fd"))
        self.threads = threading.active_count()
        self.children = children(os.getpid())
        self.shared = set(os.listdir("/dev/shm"))

    def check(self, seconds: float = 10.0) -> None:
        """Nothing more than that is there now, or soon."""
        deadline = time.monotonic() + seconds
        while wrong := self._more():
            assert time.monotonic() < deadline, "; ".join(wrong)
            time.sleep(0.05)

    def _more(self) -> list[str]:
        gc.collect()  # errors hold frames, which hold what was open in them
        now = Left()
        found = []
        if now.fds > self.fds:
            names = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _exists(fd)]
            found.append(f"{now.fds} file descriptors, before {self.fds}: {sorted(names)}")
        if now.threads > self.threads:
            found.append(f"{now.threads} threads, before {self.threads}: {threading.enumerate()}")
        if set(now.children) - set(self.children):
            found.append(f"children {now.children}, before {self.children}")
        if now.shared - self.shared:
            found.append(f"shared memory {sorted(now.shared - self.shared)}")
        return found


def _exists(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def children(pid: int) -> list[int]:
    """Processes that `pid` started and that are still there (dead ones that nobody waited for included)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(entry.parent.name))
    return found


def alive(pid: int) -> bool:
    """Whether a process is there, a zombie excepted."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
