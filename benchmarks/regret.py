"""Regret: the planner's plan against every plan that a person would try, all measured on real ranks and emulated links.

    python -m benchmarks.regret [--smoke] [--jobs wide deep ...] [--repeats 7] [-o FILE] [--loopback]

A cell is a job under one kind of links. The planner plans with costs profiled on the spot; its plan, the hand-made ones
(single device, data parallel, ZeRO-3, tensor parallel, pipelines of 2 to 8 microbatches) are loaded at once and take
their steps in turn. Regret is the measured step of the chosen plan over that of the fastest; differences under 5 % are
ties and count as none. Spearman's rank correlation says whether predictions order the plans as measurement does.
Results go to a JSON file; cells that are in it are not measured again. Ends with 7 where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.cluster import EmulatedCluster, Links, missing, uniform
from benchmarks.emulated import Measured, Wanted, measure, shown
from benchmarks.jobs import JOBS
from benchmarks.prediction import machine

LINKS = (
    uniform(2), uniform(2, 10_000), uniform(2, 1000), uniform(2, 200), uniform(2, 50), uniform(2, 1000, 1),
    uniform(2, 200, 1), uniform(2, 1000, 5),
)  # fmt: skip
CHOSEN = "planner"
PLANS = (
    Wanted(CHOSEN, zero="auto"),
    Wanted("single", {"dp": 1, "tp": 1, "pp": 1}, 1),
    Wanted("data parallel", {"dp": 2, "tp": 1, "pp": 1}, 1),
    Wanted("ZeRO-3", {"dp": 2, "tp": 1, "pp": 1}, 1, zero=3),
    Wanted("tensor parallel", {"dp": 1, "tp": 2, "pp": 1}, 1),
    Wanted("pipeline m2", {"dp": 1, "tp": 1, "pp": 2}, 2),
    Wanted("pipeline m4", {"dp": 1, "tp": 1, "pp": 2}, 4),
    Wanted("pipeline m8", {"dp": 1, "tp": 1, "pp": 2}, 8),
)
TIE = 0.05
TARGETS = {"geometric mean": 1.03, "worst": 1.10, "Spearman": 0.97}


def regret(found: Sequence[Measured]) -> float:
    """Chosen over fastest, 1 for a tie. Raises ValueError without a plan of the planner's."""
    runs = {m.name: m.seconds for m in found if not m.error}
    if CHOSEN not in runs:
        raise ValueError(next(m.error for m in found if m.name == CHOSEN))
    ratio = runs[CHOSEN] / min(runs.values())
    return 1.0 if ratio <= 1 + TIE else ratio


def spearman(found: Sequence[Measured]) -> float | None:
    """Rank correlation of predicted and measured over the plans of a cell that differ, None for fewer than three."""
    runs = [m for m in found if not m.error]
    if len(runs) < 3:
        return None
    a, b = _ranks([m.predicted_seconds for m in runs]), _ranks([m.seconds for m in runs])
    try:
        return statistics.correlation(a, b)
    except statistics.StatisticsError:
        return None


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks in order of value; values within a tie of the first of their group share its mean rank."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] <= values[order[start]] * (1 + TIE):
            stop += 1
        for place in range(start, stop):
            ranks[order[place]] = (start + stop - 1) / 2
        start = stop
    return ranks


def show(cells: dict[str, list[Measured]], console: Console) -> dict[str, float]:
    """Prints every cell; -> geometric mean and worst regret, mean rank correlation."""
    table = Table("cell", "chosen", "predicted", "measured", "fastest by hand", "regret", "Spearman")
    regrets, correlations = [], []
    for key, found in cells.items():
        runs = {m.name: m for m in found if not m.error}
        if CHOSEN not in runs:
            table.add_row(key, next(m.error for m in found if m.name == CHOSEN), "", "", "", "", "")
            continue
        mine = runs.pop(CHOSEN)
        best = min(runs.values(), key=lambda m: m.seconds)
        regrets.append(regret(found))
        order = spearman(found)
        correlations += [order] if order is not None else []
        table.add_row(
            key,
            mine.degrees,
            f"{mine.predicted_seconds * 1e3:.0f} ms",
            f"{mine.seconds * 1e3:.0f} ms",
            f"{best.name}, {best.seconds * 1e3:.0f} ms",
            f"{regrets[-1]:.2f}",
            "" if order is None else f"{order:.2f}",
        )
    console.print(table)
    if not regrets:
        return {}
    summary = {
        "geometric mean": math.exp(statistics.fmean(map(math.log, regrets))),
        "worst": max(regrets),
        "Spearman": statistics.fmean(correlations) if correlations else math.nan,
    }
    console.print(f"{len(regrets)} cells: " + ", ".join(f"{name} {value:.3f}" for name, value in summary.items()))
    return summary


def missed(summary: dict[str, float]) -> list[str]:
    """Targets that the figures do not reach."""
    found = []
    for name, target in TARGETS.items():
        value = summary.get(name, math.nan)
        if (value < target) if name == "Spearman" else (value > target):
            found.append(f"{name} is {value:.3f}, wanted {target:g}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="The planner's plan against plans by hand, measured.")
    parser.add_argument("--smoke", action="store_true", help="one cell")
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--links", nargs="+", type=int, default=list(range(len(LINKS))), help="which, by number")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path, help="results, and what need not be measured again")
    parser.add_argument("--loopback", action="store_true", help="no links: needs no root")
    given = parser.parse_args()
    if not given.loopback and (why := missing()):
        print(f"no emulated links here: {why} (or --loopback)", file=sys.stderr)
        return 2
    wanted = [(job, LINKS[at]) for job in given.jobs for at in given.links]
    if given.smoke:
        wanted = [("usual", LINKS[2])]
    cells = _read(given.output)
    todo = [(job, links) for job, links in wanted if _key(job, links) not in cells]
    if todo:
        with (
            tempfile.TemporaryDirectory(prefix="shardplan-regret-") as folder,
            EmulatedCluster(todo[0][1], loopback=given.loopback) as cluster,
        ):
            for job, links in shown(todo, not sys.stderr.isatty()):
                cells[_key(job, links)] = measure(cluster, links, job, PLANS, folder, given.repeats, memory=False)
                _write(given.output, cells)
    summary = show({_key(job, links): cells[_key(job, links)] for job, links in wanted}, Console())
    failures = missed(summary)
    for failure in failures:
        print(f"MISSED: {failure}", file=sys.stderr)
    return 7 if failures and not given.smoke else 0


def _key(job: str, links: Links) -> str:
    return f"{job} | {links.name}"


def _read(path: Path | None) -> dict[str, list[Measured]]:
    if path is None or not path.exists():
        return {}
    data = json.loads(path.read_text())
    return {
        key: [Measured(**{n: tuple(v) if isinstance(v, list) else v for n, v in m.items()}) for m in found]
        for key, found in data["cells"].items()
    }


def _write(path: Path | None, cells: dict[str, list[Measured]]) -> None:
    if path is not None:
        data = {"schema": 1, "machine": machine(), "cells": {k: [asdict(m) for m in v] for k, v in cells.items()}}
        path.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
