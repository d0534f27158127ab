"""A share of a core's time for a rank: how devices are made slower, and how four ranks share two cores evenly."""

from __future__ import annotations

import os
import time
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_PERIOD_US = 10_000


class Quota:
    """A control group that allows `share` of one core. Root only; version 1 and 2 of control groups."""

    def __init__(self, name: str, share: float) -> None:
        second = (_ROOT / "cgroup.controllers").exists()
        self._folder = (_ROOT if second else _ROOT / "cpu") / f"shardplan{os.getpid()}{name}"
        self._folder.mkdir()
        limit = str(int(share * _PERIOD_US))
        if second:
            (self._folder / "cpu.max").write_text(f"{limit} {_PERIOD_US}")
        else:
            (self._folder / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (self._folder / "cpu.cfs_quota_us").write_text(limit)

    def add(self, pid: int) -> None:
        """Puts a process into it, with all that it starts later."""
        (self._folder / "cgroup.procs").write_text(str(pid))

    def close(self) -> None:
        """The processes have to be gone."""
        for _ in range(50):
            try:
                self._folder.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.1)
