"""The share of the processor that a rank gets: all of its core before other work, or at most a part of it.

A part is how devices are made slower, and how four ranks share two cores evenly. Groups are named after this process,
so that `sweep` finds those that a killed run left behind.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_PERIOD_US = 10_000
_PREFIX = "shardplan"


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
        """Puts a process into it, with all that it starts later."""
        (self._path / "cgroup.procs").write_text(str(pid))

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


def sweep() -> None:
    """Deletes groups of runs whose process is gone."""
    for path in _folder()[0].glob(f"{_PREFIX}*"):
        found = re.match(rf"{_PREFIX}(\d+)", path.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            try:
                path.rmdir()
            except OSError:
                continue  # its last processes are still ending
