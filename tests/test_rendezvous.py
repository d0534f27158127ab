"""Ranks meet in their own attempt, whatever an earlier one left in the store."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from shardplan.errors import WorkerTimeout
from shardplan.runtime.rendezvous import attempt_store


def meet(store: HashStore, world_size: int, order: list[int]) -> list[str]:
    """All ranks, coming in this order -> the name that each found."""
    turns = {rank: turn for turn, rank in enumerate(order)}

    def come(rank: int) -> str:
        time.sleep(0.005 * turns[rank])
        found, name = attempt_store(rank, world_size, store, 20.0)
        found.set(f"place/{rank}", name)
        return name

    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(come, range(world_size)))


@pytest.mark.parametrize("seed", range(8))
def test_attempts_do_not_meet(seed):
    rng, store, names = random.Random(seed), HashStore(), set()
    for attempt in range(4):
        world_size = rng.randint(1, 6)
        found = meet(store, world_size, rng.sample(range(world_size), world_size))
        assert len(set(found)) == 1, f"attempt {attempt}: {found}"
        names.add(found[0])
    assert len(names) == 4


def test_an_attempt_sees_nothing_of_the_one_before():
    store = HashStore()
    first, _ = attempt_store(0, 1, store, 5.0)
    first.set("address", "gone")
    second, _ = attempt_store(0, 1, store, 5.0)
    assert not second.check(["address"])


def test_ranks_that_do_not_come_are_named():
    store = HashStore()
    failed = threading.Event()

    def come() -> None:
        with pytest.raises(WorkerTimeout, match="rank 1 came, and rank 0 has not counted all ranks"):
            attempt_store(1, 4, store, 0.5)
        failed.set()

    other = threading.Thread(target=come)
    other.start()
    with pytest.raises(WorkerTimeout, match="2 ranks did not come: 2, 3"):
        attempt_store(0, 4, store, 0.3)
    other.join()
    assert failed.is_set()
    with pytest.raises(WorkerTimeout, match="rank 1 came, and rank 0 did not"):
        attempt_store(1, 2, HashStore(), 0.05)
