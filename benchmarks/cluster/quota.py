"""The share of the processor that a rank gets: all of its core before other work, or at most a part of it.

A part is how devices are made slower, and how four ranks share two cores evenly. Groups are named after this process,
so that `sweep` finds those that a killed run left behind.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import struct
import time
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_PERIOD_US = 10_000
_PREFIX = "shardplan"
_SLICE_NS = 100_000
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}


def _folder() -> tuple[Path, bool]:
    """Where groups are made, and whether they are of version 2."""
    second = (_ROOT / "cgroup.controllers").exists()
    return (_ROOT if second else _ROOT / "cpu"), second


class Quota:
    """A control group of its processes; versions 1 and 2. Root only."""

    def __init__(self, name: str, share: float | None = None) -> None:
        """share: of one core, which its processes may use together; None: as much as they can, before other work of
        the machine (which still gets what they leave)."""
        root, second = _folder()
        self._path = root / f"{_PREFIX}{os.getpid()}{name}"
        self._path.mkdir()
        weight = ("cpu.weight", "10000") if second else ("cpu.shares", "262144")
        (self._path / weight[0]).write_text(weight[1])
        if share is None:
            return
        limit = str(int(share * _PERIOD_US))
        if second:
            (self._path / "cpu.max").write_text(f"{limit} {_PERIOD_US}")
        else:
            (self._path / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (self._path / "cpu.cfs_quota_us").write_text(limit)

    def add(self, pid: int) -> None:
        """Puts a process into it, with all that it starts later, and lets it begin at once when it wakes."""
        (self._path / "cgroup.procs").write_text(str(pid))
        _wake_at_once(pid)

    def close(self) -> None:
        """The processes have to be gone."""
        for _ in range(50):
            try:
                self._path.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.1)


def _wake_at_once(pid: int) -> None:
    """A short slice of time: an ordinary process that wakes with one (a message came) goes before those with the usual
    slice of milliseconds, since Linux 6.12; earlier ones ignore it. Priority is not touched."""
    number = _SCHED_SETATTR.get(platform.machine())
    if number is not None:
        # size, policy (the ordinary one), flags, nice, priority, runtime (the slice), deadline, period
        attributes = struct.pack("=IIQiIQQQ", 48, 0, 0, os.getpriority(os.PRIO_PROCESS, pid), 0, _SLICE_NS, 0, 0)
        ctypes.CDLL(None).syscall(number, pid, ctypes.c_char_p(attributes), 0)


def sweep() -> None:
    """Deletes groups of runs whose process is gone."""
    for path in _folder()[0].glob(f"{_PREFIX}*"):
        found = re.match(rf"{_PREFIX}(\d+)", path.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            try:
                path.rmdir()
            except OSError:
                continue  # its last processes are still ending
