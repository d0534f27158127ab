"""Tests leave no worker process and no measurement behind; warnings of third parties do not fail them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

# A warning of a library about its own use of another library; everything else is an error.
_FOREIGN = ("ignore:.*is deprecated and will be removed.*:DeprecationWarning:torch",)


def pytest_configure(config: pytest.Config) -> None:
    for line in _FOREIGN:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session", autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measurements of the tests go into a store of their own, never into the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDPLAN_CACHE", str(tmp_path_factory.mktemp("store")))
        yield


def live_workers() -> set[int]:
    """Process ids of shardplan workers on this machine whose driver is this process or is gone."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            status = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        state, parent = status[0], int(status[1])
        if b"shardplan.runtime.worker" in command and state != "Z" and parent in (1, os.getpid()):
            found.add(int(entry.name))
    return found


@pytest.fixture(autouse=True)
def no_worker_left() -> Iterator[None]:
    """Fails a test after which a worker that was not there before still runs."""
    before = live_workers()
    yield
    deadline = time.monotonic() + 10.0
    while left := live_workers() - before:
        if time.monotonic() > deadline:
            pytest.fail(f"worker processes left behind: {sorted(left)}")
        time.sleep(0.05)
