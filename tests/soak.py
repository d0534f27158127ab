"""``python -m tests.soak [--minutes 30]``: training that is killed, stopped, closed and resumed at random.

At the end every loss is compared, bit by bit, with a run of the same steps that nothing disturbed, and the memory of
this process and of the workers must not have grown. Exit status 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from shardplan import errors
from shardplan.planner.plan import Plan
from tests import jobs
from tests.faults import sabotage

_ALLOWED_GROWTH_NBYTES = 24 << 20
_WARM_CYCLES = 3


def resident_nbytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Soak:
    """One soak of a plan. losses: by step; memory: of this process after each cycle; workers: growth of each worker
    between its 20th and its last step, by cycle."""

    def __init__(self, plan: Plan, path: Path, rng: random.Random) -> None:
        self.plan, self.path, self.rng = plan, path, rng
        self.losses: dict[int, float] = {}
        self.differing: list[str] = []
        self.ends: dict[str, int] = {}
        self.memory: list[int] = []
        self.workers: list[int] = []
        self.saves = self.repeated = 0

    def cycle(self, seconds: float) -> None:
        """Start, resume, train for about so long with checkpoints in between, and come to some end."""
        end = self.rng.choice(["killed", "killed", "stopped", "closed", "raised"])
        deadline = time.monotonic() + seconds
        pm = jobs.start(self.plan, heartbeat_seconds=2.0)
        first: dict[int, int] = {}
        try:
            with pm:
                sampler = pm.sampler(jobs.Samples(), seed=5)
                step, every, done = pm.resume(self.path), self.rng.randint(5, 60), 0
                while time.monotonic() < deadline:
                    for batch in sampler:
                        self._told(step, pm.train_step(batch).item())
                        step, done = step + 1, done + 1
                        if done == 20:
                            first = {pid: resident_nbytes(pid) for pid in self._pids(pm)}
                        if step % every == 0:
                            pm.save(self.path, keep=3, wait=self.rng.random() < 0.3)
                            self.saves += 1
                        if time.monotonic() > deadline:
                            break
                if first:
                    self.workers.append(max(resident_nbytes(pid) - nbytes for pid, nbytes in first.items()))
                if end == "closed":
                    pm.save(self.path, keep=3)
                else:
                    self._disturb(pm, end, sampler)
        except (errors.WorkerFailed, errors.WorkerTimeout):
            assert end != "closed"
        self.ends[end] = self.ends.get(end, 0) + 1
        self.memory.append(resident_nbytes(os.getpid()))

    def _disturb(self, pm, end: str, sampler) -> None:
        rank = self.rng.randrange(len(self.plan.devices))
        workers = pm._ranks().workers
        if end == "raised":
            workers.call(sabotage.raise_at, rank, "optimizer")
        else:
            number = signal.SIGKILL if end == "killed" else signal.SIGSTOP
            workers.call(sabotage.signal_at, rank, self.rng.randrange(30), number)
        pm.save(self.path, keep=3, wait=False)  # may be cut short
        jobs.train(pm, 1, sampler)
        raise AssertionError(f"rank {rank} was {end}, and nothing came of it")

    @staticmethod
    def _pids(pm) -> tuple[int, ...]:
        return pm._ranks().workers.pids

    def _told(self, step: int, loss: float) -> None:
        if step in self.losses:
            self.repeated += 1
        if self.losses.setdefault(step, loss) != loss:
            self.differing.append(f"step {step}: {loss!r} after a restart, {self.losses[step]!r} before")

    def undisturbed(self) -> list[float]:
        with jobs.start(self.plan) as pm:
            return jobs.train(pm, max(self.losses) + 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="all in all; the comparison takes about a third")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cycle-seconds", type=float, default=10.0, help="the longest time between two faults")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    plan = rng.choice([jobs.plan(dp=2), jobs.plan(pp=2, microbatches=2), jobs.plan(tp=2, seed=1)])
    end = time.monotonic() + arguments.minutes * 60 * 2 / 3
    left = sabotage.Left()
    with tempfile.TemporaryDirectory() as directory:
        soak = Soak(plan, Path(directory) / "saved", rng)
        while time.monotonic() < end:
            soak.cycle(rng.uniform(0.2, 1.0) * arguments.cycle_seconds)
    left.check()
    expected = soak.undisturbed()
    wrong = list(soak.differing)
    wrong += [
        f"step {s}: {loss!r}, undisturbed {expected[s]!r}" for s, loss in soak.losses.items() if loss != expected[s]
    ]
    if sorted(soak.losses) != list(range(len(expected))):
        wrong.append("steps are missing")
    warm = soak.memory[min(_WARM_CYCLES, len(soak.memory) - 1)]
    growth = soak.memory[-1] - warm
    if growth > _ALLOWED_GROWTH_NBYTES:
        wrong.append(f"this process grew by {growth} bytes in {len(soak.memory)} cycles")
    if max(soak.workers, default=0) > _ALLOWED_GROWTH_NBYTES:
        wrong.append(f"a worker grew by {max(soak.workers)} bytes")
    ends = ", ".join(f"{count} {name}" for name, count in sorted(soak.ends.items()))
    print(f"{plan.degrees()}: {len(expected)} steps, {soak.repeated} again, {soak.saves} checkpoints; ends: {ends}")
    print(f"memory: driver {growth / 2**20:+.1f} MiB over {len(soak.memory)} cycles, workers at most ", end="")
    print(f"{max(soak.workers, default=0) / 2**20:+.1f} MiB a cycle")
    for line in wrong[:20]:
        print("WRONG", line)
    print("losses are those of an undisturbed run" if not wrong else f"{len(wrong)} things are wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
