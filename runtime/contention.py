"""How much compute loses on a CPU rank while bytes move beside it.

gloo moves bytes in a thread of the process, and the kernel has its share of the work on the same core. So a fixed
amount of compute is timed alone and beside messages (or all_reduces) that go on meanwhile, on all ranks in lockstep;
what it takes longer, over the seconds of the messages, is the share of its speed that it loses. It has to last for
several slices of the scheduler, or the thread that moves the bytes gets its turn only afterwards.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from shardplan.runtime.groups import Groups

_REPEATS = 5
_LONGEST_SECONDS = 0.03
_LARGEST_NBYTES = 1 << 21
_COVER = 1.4
_LEAST_SECONDS = 0.012
_MOST_MESSAGES = 32
_SIDE = 128

Group = tuple[int, ...]
Shares = dict[tuple[str, Group], tuple[float, float]]
"""(kind, group) -> shares lost at the first rank and at the others, 0 where this rank does not know."""


class Contention:
    """Lockstep of all ranks of the default group. sizes: of messages, rising; the largest that takes an eightieth of
    budget_seconds at most is looked at."""

    def __init__(self, sizes: Sequence[int], budget_seconds: float) -> None:
        self._sizes = sorted(min(size, _LARGEST_NBYTES) for size in sizes)
        self._longest = min(budget_seconds / 80, _LONGEST_SECONDS)
        self._operands = torch.ones(_SIDE, _SIDE), torch.ones(_SIDE, _SIDE)
        self._compute(10)
        begin = time.perf_counter()
        self._compute(50)
        self._unit = (time.perf_counter() - begin) / 50

    def pair(self, pair: Group | None) -> Shares:
        """Both directions of this rank's pair; None where it is in none this round."""
        rank, found = dist.get_rank(), {}
        for source, target in (pair, pair[::-1]) if pair else ((-1, -1), (-1, -1)):

            def begin(nbytes: int, source: int = source, target: int = target) -> Callable[[], Any]:
                buffer = torch.zeros(nbytes, dtype=torch.uint8)
                if rank == source:
                    return lambda: dist.isend(buffer, target)
                return lambda: dist.irecv(buffer, source)

            share = self._share(begin if pair else None)
            if pair:
                found["p2p", (source, target)] = (share, 0.0) if rank == source else (0.0, share)
        return found

    def group(self, group: Group | None, handles: Groups) -> Shares:
        """An all_reduce in this rank's group; None where it is in none this round."""

        def begin(nbytes: int) -> Callable[[], Any]:
            buffer, held = torch.zeros(max(nbytes // 4, 1)), handles.get(group or ())
            return lambda: held.allreduce([buffer])

        share = self._share(begin if group else None)
        return {("all_reduce", group): (share, share)} if group else {}

    def _share(self, prepare: Callable[[int], Callable[[], Any]] | None) -> float:
        nbytes, seconds = self._suitable(prepare)
        start = prepare(nbytes) if prepare else None
        messages = min(max(round(_LEAST_SECONDS / seconds), 1), _MOST_MESSAGES)
        seconds *= messages
        count = max(round(_COVER * seconds / self._unit), 1)
        alone, beside = [], []
        for _ in range(_REPEATS):
            _together(0.0)
            if start is not None:
                begin = time.perf_counter()
                self._compute(count)
                alone.append(time.perf_counter() - begin)
            _together(0.0)
            if start is not None:
                begin = time.perf_counter()
                works = [start() for _ in range(messages)]
                self._compute(count)
                beside.append(time.perf_counter() - begin)
                for work in works:
                    work.wait()
        if start is None:
            return 0.0
        return min(max((statistics.median(beside) - statistics.median(alone)) / seconds, 0.0), 1.0)

    def _suitable(self, prepare: Callable[[int], Callable[[], Any]] | None) -> tuple[int, float]:
        """(bytes, seconds of the slowest rank) of the largest message that is short enough."""
        found = self._sizes[0], 1e-6
        for index, nbytes in enumerate(self._sizes):
            action, seconds = prepare(nbytes) if prepare else None, []
            for _ in range(3):
                _together(0.0)
                begin = time.perf_counter()
                if action is not None:
                    action().wait()
                seconds.append(time.perf_counter() - begin)
            slowest = max(_together(statistics.median(seconds)), 1e-6)
            if index == 0 or slowest <= self._longest:
                found = nbytes, slowest
            following = self._sizes[min(index + 1, len(self._sizes) - 1)]
            if slowest * following / nbytes > 4 * self._longest or following == nbytes:
                break
        return found

    def _compute(self, count: int) -> None:
        for _ in range(count):
            torch.mm(*self._operands)


def _together(value: float) -> float:
    """The largest of all ranks' values; also a barrier."""
    agreed = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return agreed.item()


__all__ = ["Contention"]
