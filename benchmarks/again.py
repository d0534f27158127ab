"""A job that was measured predicts itself: it is planned and run, `measure(calibrate=True)` keeps what the prediction
was off by, and the same job is planned and run again.

    python -m benchmarks.again [--loopback] [-o FILE]

Two ranks over emulated links; every cell begins without corrections. Ends with 7 where the second prediction is off by
more than the target. Needs root (`benchmarks/cluster`); --loopback runs without links.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks import emulated, records
from benchmarks.cluster import EmulatedCluster, Links, missing, uniform
from benchmarks.emulated import Conditions, Wanted
from benchmarks.protocol import interleaved
from benchmarks.records import Target
from shardplan.planner.costs import calibration, profile
from shardplan.planner.costs.store import Store
from shardplan.planner.plan import Plan

TARGET = Target("step time off by after calibration, worst", 0.03)
_STEPS = 11


@dataclass(frozen=True, slots=True)
class Cell:
    job: str
    links: Links
    wanted: Wanted


CELLS = (
    Cell("usual", uniform(2, 1000), Wanted("dp2", {"dp": 2, "tp": 1, "pp": 1}, 1)),
    Cell("usual", uniform(2, 1000), Wanted("pp2 m4", {"dp": 1, "tp": 1, "pp": 2}, 4)),
    Cell("images", uniform(2, 1000), Wanted("single", {"dp": 1, "tp": 1, "pp": 1}, 1)),
)


@dataclass(frozen=True, slots=True)
class Twice:
    """predicted, measured: seconds of a step, before and after calibration."""

    cell: str
    predicted: tuple[float, float]
    measured: tuple[float, float]

    @property
    def errors(self) -> tuple[float, float]:
        first, second = (p / m - 1.0 for p, m in zip(self.predicted, self.measured, strict=True))
        return first, second


def _twice(rank: int, cell: Cell, folder: str) -> Twice:
    """On a rank: plan, measure with calibrate=True, plan again, measure again."""
    size = dist.get_world_size()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0", "SHARDPLAN_CACHE": folder}
    job = emulated._made(cell.job)
    tables = emulated.measure_links(emulated.plan_groups(size), budget_seconds=Conditions((1.0,)).link_seconds)
    if rank == 0:
        calibration.reset(Store.open(), profile.device_key(torch.device("cpu")))
    predicted, measured = [], []
    args, target, kwargs = job.batch.args, job.batch.target, job.batch.kwargs
    for turn in range(2):
        (text, error, _) = emulated._plans(rank, job, tables, [cell.wanted], Conditions((1.0,) * size))[0]
        if error:
            raise RuntimeError(error)
        plan = Plan.from_json(text)
        pm = emulated._loaded(job, plan)
        samples = interleaved({"step": lambda pm=pm: pm.train_step(*args, target=target, **kwargs)}, _STEPS)["step"]
        if turn == 0:
            pm.measure(*args, target=target, steps=_STEPS, calibrate=True, **kwargs)
        predicted.append(plan.step_seconds)
        measured.append(statistics.median(samples))
        pm.close()
        del pm
        gc.collect()
        dist.barrier()
    return Twice(
        f"{cell.job} | {cell.links.name} | {cell.wanted.name}",
        (predicted[0], predicted[1]),
        (measured[0], measured[1]),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Planned, measured, planned again.")
    parser.add_argument("--loopback", action="store_true", help="no links: needs no root")
    parser.add_argument("--only", default="", help="cells whose job or plan contains this text")
    parser.add_argument("-o", "--output", type=Path, help="results")
    given = parser.parse_args()
    if not given.loopback and (why := missing()):
        print(f"no emulated links here: {why} (or --loopback)", file=sys.stderr)
        return 2
    found: list[Twice] = []
    chosen = [cell for cell in CELLS if given.only in f"{cell.job} {cell.wanted.name}"]
    with (
        tempfile.TemporaryDirectory(prefix="shardplan-again-") as folder,
        EmulatedCluster(chosen[0].links, loopback=given.loopback) as cluster,
    ):
        for cell in chosen:
            twice = cluster.run(_twice, cell, folder)[0]
            first, second = twice.errors
            print(f"{twice.cell}: off by {first:+.1%}, after calibration {second:+.1%}")
            found.append(twice)
    checked = TARGET.check(max(abs(twice.errors[1]) for twice in found))
    records.write(given.output, "again", [checked], cells=[asdict(twice) for twice in found])
    print(f"{'' if checked.met else 'MISSED: '}{checked}", file=sys.stdout if checked.met else sys.stderr)
    return 0 if checked.met else 7


if __name__ == "__main__":
    sys.exit(main())
