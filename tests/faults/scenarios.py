"""Faults of a running job, each with random choices: what every one of them must leave behind is checked."""

from __future__ import annotations

import contextlib
import math
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shardplan as sp
from shardplan import errors
from shardplan.planner.plan import Plan
from tests import jobs
from tests.faults import sabotage

HEARTBEAT_SECONDS = 3.0
STATED_SECONDS = HEARTBEAT_SECONDS + 5.0  # until an error is there, on a machine with much else to do


def plans() -> list[Plan]:
    return [jobs.plan(dp=2), jobs.plan(pp=2, microbatches=2), jobs.plan(tp=2, seed=1), jobs.plan(pp=2, microbatches=4)]


@contextlib.contextmanager
def ended(pm: sp.ParallelModel, kind: type[errors.ShardplanError], *words: str) -> Iterator[None]:
    """The block raises that error with these words within the stated time, and all workers are gone."""
    pids = pm._ranks().workers.pids  # type: ignore[attr-defined]
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        yield
    seconds = time.monotonic() - started
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert seconds < STATED_SECONDS, f"{seconds:.1f} s until {caught.value}"
    assert not [pid for pid in pids if sabotage.alive(pid)]


def killed(rng: random.Random, path: Path) -> str:
    """A rank is killed at an instruction: the error names it, and the job goes on from its checkpoint exactly."""
    plan, rank = rng.choice(plans()), rng.randrange(2)
    steps = rng.randint(1, 4)
    with jobs.start(plan) as pm:
        expected = jobs.train(pm, steps)
        pm.save(path, keep=2, wait=rng.random() < 0.5).wait()
        place = max(pm._ranks().workers.call(sabotage.signal_at, rank, rng.randrange(30), signal.SIGKILL))
        sampler = pm._samplers[0]
        with ended(pm, errors.WorkerFailed, f"rank {rank} was killed", "SIGKILL", f"instruction {place} (", str(path)):
            jobs.train(pm, 1, sampler)
    with jobs.start(plan) as pm:
        assert pm.resume(path) == steps
        found = jobs.train(pm, 3)
    with jobs.start(plan) as pm:
        undisturbed = jobs.train(pm, steps + 3)
    assert expected + found == undisturbed
    return f"rank {rank} at {place} after {steps} steps"


def stopped(rng: random.Random, path: Path) -> str:
    """A rank is stopped (SIGSTOP): every word of it within the stated time."""
    plan, rank = rng.choice(plans()), rng.randrange(2)
    with jobs.start(plan, heartbeat_seconds=HEARTBEAT_SECONDS) as pm:
        jobs.train(pm, 1)
        place = max(pm._ranks().workers.call(sabotage.signal_at, rank, rng.randrange(30), signal.SIGSTOP))
        words = f"rank {rank} gave no sign of life", f"instruction {place} (", f"rank {1 - rank} was at"
        with ended(pm, errors.WorkerTimeout, *words):
            jobs.train(pm, 1, pm._samplers[0])
    return f"rank {rank} at {place}"


def raised(rng: random.Random, path: Path) -> str:
    """User code raises on one rank: its traceback arrives."""
    plan, rank, where = rng.choice(plans()), rng.randrange(2), rng.choice(["optimizer", "scheduler", "dataset"])
    with jobs.start(plan) as pm:
        jobs.train(pm, 1)
        pm._ranks().workers.call(sabotage.raise_at, rank, where)
        with ended(pm, errors.WorkerFailed, f"rank {rank} raised ArithmeticError: the {where} of rank {rank} failed"):
            jobs.train(pm, 3, pm._samplers[0])
    return f"{where} of rank {rank}"


def full_disk(rng: random.Random, path: Path) -> str:
    """A disk that is full: the older checkpoint is whole, the job goes on and saves when there is room again."""
    plan, rank, wait = rng.choice(plans()), rng.randrange(2), rng.random() < 0.5
    with jobs.start(plan) as pm:
        losses = jobs.train(pm, 1)
        sampler = pm._samplers[0]
        pm.save(path, keep=3)
        losses += jobs.train(pm, 1, sampler)
        pm._ranks().workers.call(sabotage.fill_disk, rank, rng.randint(1, 500))
        with pytest.raises(errors.CheckpointError, match=rf"cannot write(?s:.)*rank {rank}: OSError"):
            pm.save(path, keep=3, wait=wait).wait()
        assert [entry.name for entry in path.iterdir()] == ["step-00000001"]
        losses += jobs.train(pm, 1, sampler)
        pm._ranks().workers.call(sabotage.fill_disk, rank, 0)
        pm.save(path, keep=3, wait=wait).wait()
        assert pm.resume(path) == 3
    return f"rank {rank}, {'waiting' if wait else 'in the background'}"


def killed_in_save(rng: random.Random, path: Path) -> str:
    """A rank is killed while a checkpoint replaces another: one of the two is whole."""
    plan, wait = rng.choice(plans()), rng.random() < 0.5
    rank, where = rng.choice([(0, "begin"), (1, "begin"), (0, "written"), (1, "written"), (0, "renamed")])
    target = path / "one"
    with jobs.start(plan) as pm:
        jobs.train(pm, 1)
        pm.save(target)
        jobs.train(pm, 1, pm._samplers[0])
        pm._ranks().workers.call(sabotage.die_in_save, rank, where)
        with ended(pm, errors.WorkerFailed, f"rank {rank} was killed"):
            pm.save(target, wait=wait).wait()
    with jobs.start(plan) as pm:
        assert pm.resume(target) == 1
        jobs.train(pm, 1)
        pm.save(target)
        assert pm.resume(target) == 2
    assert [entry.name for entry in path.iterdir()] == ["one"]
    return f"rank {rank}, {where}, {'waiting' if wait else 'in the background'}"


def torn(rng: random.Random, path: Path) -> str:
    """A file of the last checkpoint is cut or changed: that is found out, and the one before is taken."""
    plan = rng.choice(plans())
    with jobs.start(plan) as pm:
        jobs.train(pm, 1)
        pm.save(path, keep=2)
        jobs.train(pm, 1, pm._samplers[0])
        pm.save(path, keep=2)
        last = path / "step-00000002"
        file = rng.choice(sorted(last.iterdir()))
        data = bytearray(file.read_bytes())
        how = rng.choice(["cut", "bit", "gone", "longer"])
        if how == "cut":
            file.write_bytes(data[: rng.randrange(len(data))])
        elif how == "bit":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(data)
        elif how == "longer":
            file.write_bytes(data + b" x")
        else:
            file.unlink()
        with pytest.raises(errors.CheckpointError):
            pm.load(last)
        assert pm.resume(path) == 1
        assert all(math.isfinite(loss) for loss in jobs.train(pm, 1, pm._samplers[0]))
        shutil.rmtree(last)
        assert pm.resume(path) == 1
    return f"{file.name}: {how}"


def across_plans(rng: random.Random, path: Path) -> str:
    """20 steps under one plan, 10 under another: the losses of one device."""

    def any_plan() -> Plan:
        dp, tp, pp = rng.choice(
            [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 3), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
        )
        return jobs.plan(dp, tp, pp, rng.choice([1, 2, 4]), rng.randrange(3))

    one, other = any_plan(), any_plan()
    with jobs.start(one) as pm:
        losses = jobs.train(pm, 20)
        pm.save(path, wait=False)
    with jobs.start(other) as pm:
        assert pm.resume(path) == 20
        losses += jobs.train(pm, 10)
    assert losses == pytest.approx(undisturbed(30), rel=2e-4)
    return f"{one.degrees()} -> {other.degrees()}"


_one_device: dict[int, list[float]] = {}


def undisturbed(steps: int) -> list[float]:
    """Losses on one device."""
    if steps not in _one_device:
        with jobs.start(jobs.plan()) as pm:
            _one_device[steps] = jobs.train(pm, steps)
    return _one_device[steps]


def many_starts(rng: random.Random, path: Path) -> str:
    """Starts and stops in one process: nothing is left of any of them."""
    plan = rng.choice(plans())
    with jobs.start(plan) as pm:
        jobs.train(pm, 1)
    left = sabotage.Left()
    for _ in range(many_starts.count):
        with jobs.start(plan) as pm:
            jobs.train(pm, 1)
    left.check()
    return f"{many_starts.count} times"


many_starts.count = 50

SCENARIOS: dict[str, Callable[[random.Random, Path], str]] = {
    scenario.__name__: scenario
    for scenario in (killed, stopped, raised, full_disk, killed_in_save, torn, across_plans, many_starts)
}
