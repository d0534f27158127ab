"""How ranks that another program started (torchrun, a scheduler) meet: in a part of the job's store that no earlier
attempt has written to.

torchrun starts a job anew after a fault, and its agents may keep the store of the attempt before, with the addresses at
which processes that are gone were listening. Who reads one of those connects to nobody. The count of restarts cannot
tell attempts apart either, because every agent counts its own. So rank 0 names the attempt and the others prove that
they are of it:

- rank 0 writes a fresh name A under "attempt" and waits for a number drawn by every other rank under "A/rank";
- the others read A, write their number, and go on once rank 0 has repeated it under "A/go/rank". Where an earlier
  attempt has left something there, it is another number, so a rank that read an old A sees that and reads again.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from shardplan.errors import WorkerTimeout

_ROOT = "shardplan/rendezvous"
_LONGEST_PAUSE_SECONDS = 0.1
_HINTS = ("every process of the job calls auto_parallel", "timeout_seconds= sets the limit")


def attempt_store(rank: int, world_size: int, store: Any, timeout_seconds: float) -> tuple[Any, str]:
    """-> the part of `store` that is this attempt's, and the attempt's name. Collective.

    Raises WorkerTimeout, with the ranks that did not come where this rank knows them.
    """
    store = PrefixStore(_ROOT, store)
    deadline = time.monotonic() + timeout_seconds
    name = _gather(store, world_size, deadline) if rank == 0 else _join(store, rank, deadline)
    return PrefixStore(name, store), name


def from_environment(timeout_seconds: float) -> tuple[Any, int, int]:
    """-> store, rank and world size as RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say."""
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    return store, rank, world_size


def _gather(store: Any, world_size: int, deadline: float) -> str:
    name = uuid.uuid4().hex
    store.set("attempt", name)
    numbers: dict[int, bytes] = {}
    pause = 0.001
    for other in range(1, world_size):
        while not store.check([f"{name}/{other}"]):
            if time.monotonic() > deadline:
                raise _missing(store, name, range(other, world_size))
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        numbers[other] = store.get(f"{name}/{other}")
    for other, number in numbers.items():
        store.set(f"{name}/go/{other}", number)
    return name


def _missing(store: Any, name: str, ranks: Iterable[int]) -> WorkerTimeout:
    missing = [rank for rank in ranks if not store.check([f"{name}/{rank}"])]
    shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return WorkerTimeout(f"{len(missing)} ranks did not come: {shown}", hints=_HINTS)


def _join(store: Any, rank: int, deadline: float) -> str:
    number, name, pause = uuid.uuid4().hex, "", 0.001
    while time.monotonic() < deadline:
        if store.check(["attempt"]):
            named = store.get("attempt").decode()
            if named != name:
                name = named
                store.set(f"{name}/{rank}", number)
            if store.check([f"{name}/go/{rank}"]) and store.get(f"{name}/go/{rank}").decode() == number:
                return name
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
    raise WorkerTimeout(
        f"rank {rank} came, and rank 0 " + ("has not counted all ranks" if name else "did not"),
        hints=_HINTS,
    )
