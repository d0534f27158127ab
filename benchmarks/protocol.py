"""How steps are timed here, for every benchmark that runs: one protocol.

- Contestants are loaded side by side, in one process group, and take their steps in turn, in an order that is drawn
  anew every round (the same on every rank), so that a drift of the machine meets all alike.
- A step starts from a barrier and takes as long as on its slowest rank.
- `WARM_UPS` rounds don't count. A contestant that is `GIVE_UP` times as slow as the best one in all rounds so far is
  given up after `TRIAL` rounds: it keeps the samples that it has.
- The figure is the median. Ratios are of medians within one run, never between runs.
- Differences under `TIE` are ties: launches of one plan differ by 2-3 % at the 95th percentile.
- Ranks have a core, or a share of one, of their own (`benchmarks.cluster`); a table of machine facts goes with every
  result (`machine`).
"""

from __future__ import annotations

import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

TIE = 0.05
WARM_UPS = 2
TRIAL = 3
GIVE_UP = 1.3


def interleaved(
    steps: Mapping[str, Callable[[], object]],
    repeats: int,
    each: int = 1,
    give_up: float = math.inf,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Seconds of a step by contestant: every sample is the mean of `each` steps on the slowest rank. Called by every
    rank of the default process group with the same names. give_up: see the module docstring; infinite: never."""
    import torch
    import torch.distributed as dist

    draw = random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    running = list(steps)
    for repeat in range(-WARM_UPS, repeats):
        order = list(running)
        draw.shuffle(order)
        for name in order:
            dist.barrier()
            started = time.perf_counter()
            for _ in range(each):
                steps[name]()
            slowest = torch.tensor((time.perf_counter() - started) / each, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if repeat >= 0:
                samples[name].append(float(slowest))
        if repeat + 1 == TRIAL and give_up < math.inf:
            best = min(statistics.median(samples[name]) for name in running)
            running = [name for name in running if statistics.median(samples[name]) <= give_up * best]
    return samples


def tied(seconds: float, other: float) -> bool:
    """Whether two medians differ by less than the protocol can tell."""
    return max(seconds, other) <= min(seconds, other) * (1 + TIE)


def spearman(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Rank correlation; equal values share a rank. None for fewer than three, or where one side is all equal."""
    if len(predicted) < 3:
        return None
    try:
        return statistics.correlation(_ranks(predicted), _ranks(measured))
    except statistics.StatisticsError:
        return None


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks in order of value; equal values have their mean rank."""
    order = sorted(values)
    return [order.index(value) + (order.count(value) - 1) / 2 for value in values]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def machine() -> dict[str, Any]:
    """What the figures depend on. commit: with "+" where the checkout has other changes. load: of the machine when the
    result was written, all work included."""
    import torch

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_nbytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "load": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _commit() -> str:
    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
