"""Regret: the planner's plan against every plan that a person would try, all measured on real ranks and emulated links.

    python -m benchmarks.regret [--smoke] [--cells 1..48] [--only TEXT] [--seconds S] [-o FILE] [--loopback]

A cell is a job under links, device speeds and memory limits (`regret_cells`). The planner plans with costs profiled on
the spot; its plan, its best plans of other arrangements and the plans by hand (single device, data parallel, ZeRO-3,
tensor parallel, pipelines by cut and microbatches, mixtures and placements) are loaded at once and timed by
`benchmarks.protocol`. Not measured, and said so: plans predicted to take more than 3 times as long as the best
predicted one. Regret is the measured step of the chosen plan over that of the fastest; differences under 5 % are ties
and count as none. Under a memory limit plans count whose measured peak keeps it.

Spearman's rank correlation says whether predictions order the plans of a cell as measurement does. As two measured
figures within 5 % are a tie, each may move by half of that towards what its plan predicts before it is ranked; "plain"
is without.

Results go to a JSON file cell by cell; cells that are in it are not measured again. Ends with 7 where a target is
missed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import records
from benchmarks.cluster import EmulatedCluster, missing
from benchmarks.emulated import Conditions, Measured, measure, shown
from benchmarks.protocol import GIVE_UP, TIE, geometric_mean, spearman
from benchmarks.records import Checked, Target
from benchmarks.regret_cells import CELLS, CHOSEN, SMOKE, Cell

_PRICES = (
    "at steps of 100-300 ms a microbatch was measured to cost 2-4 ms more than the prices of its ops add up to (why is "
    "not known), so 4 and 8 microbatches look better than they are; a collective in a step costs about 1 ms more "
    "than between ranks that wait for it, so tensor parallelism does, too; an op of a mixture is priced by a model"
)
TARGETS = (
    Target("regret, geometric mean", 1.03, why=_PRICES),
    Target("regret, worst", 1.10, why=_PRICES),
    Target("chosen over best by hand, worst", 1 + TIE, why=_PRICES),
    Target(
        "Spearman, mean", 0.97, most=False, why=_PRICES + "; plans that differ by little more than a tie count in full"
    ),
)
_MOST = 3.0
"""Plans that are predicted to take this many times as long as the best are not measured."""


def timed(found: Sequence[Measured], limit_nbytes: int | None = None) -> dict[str, Measured]:
    """What was measured and may be chosen, by name. limit_nbytes: what a measured peak may be."""
    return {
        m.name: m for m in found if m.samples and (limit_nbytes is None or max(m.nbytes, default=0) <= limit_nbytes)
    }


def regret(runs: Mapping[str, Measured]) -> float:
    """Chosen over fastest, 1 for a tie. Infinite where the planner's plan is missing or over the limit."""
    if CHOSEN not in runs:
        return math.inf
    ratio = runs[CHOSEN].seconds / min(m.seconds for m in runs.values())
    return 1.0 if ratio <= 1 + TIE else ratio


def by_hand(runs: Mapping[str, Measured]) -> Measured | None:
    """The fastest of the plans by hand."""
    hand = [m for name, m in runs.items() if not name.startswith(CHOSEN)]
    return min(hand, key=lambda m: m.seconds, default=None)


def rank_correlation(found: Sequence[Measured], ties: bool = True) -> float | None:
    """See the module docstring. None for fewer than three different plans."""
    runs = list({(m.predicted_seconds, m.seconds): m for m in found if m.samples}.values())
    if len(runs) < 3:
        return None
    scale = statistics.median(m.seconds / m.predicted_seconds for m in runs)
    half = (1 + TIE) ** 0.5
    moved = [
        min(max(scale * m.predicted_seconds, m.seconds / half), m.seconds * half) if ties else m.seconds for m in runs
    ]
    return spearman([m.predicted_seconds for m in runs], moved)


def summary(cells: Mapping[str, list[Measured]], by_key: Mapping[str, Cell]) -> dict[str, float]:
    """Figures over all cells, by the names of the targets and some more."""
    runs = {key: timed(found, by_key[key].limit_nbytes) for key, found in cells.items()}
    regrets = [regret(found) for found in runs.values()]
    hand = [
        found[CHOSEN].seconds / best.seconds
        for found in runs.values()
        if CHOSEN in found and (best := by_hand(found)) is not None
    ]
    ordered = [o for found in cells.values() if (o := rank_correlation(found)) is not None]
    plain = [o for found in cells.values() if (o := rank_correlation(found, ties=False)) is not None]
    return {
        "cells": len(cells),
        "plans measured": sum(len(found) for found in runs.values()),
        "regret, geometric mean": geometric_mean(regrets),
        "regret, worst": max(regrets),
        "chosen over best by hand, worst": max(hand, default=math.nan),
        "Spearman, mean": statistics.fmean(ordered) if ordered else math.nan,
        "Spearman, worst": min(ordered, default=math.nan),
        "Spearman, mean, plain": statistics.fmean(plain) if plain else math.nan,
    }


def checked(figures: Mapping[str, float]) -> list[Checked]:
    return [target.check(figures[target.name]) for target in TARGETS]


def show(cells: Mapping[str, list[Measured]], by_key: Mapping[str, Cell], console: Console) -> None:
    """Prints every cell."""
    table = Table("cell", "chosen", "predicted", "measured", "fastest", "regret", "Spearman", "plain")
    for key, found in cells.items():
        runs = timed(found, by_key[key].limit_nbytes)
        best = min(runs.values(), key=lambda m: m.seconds, default=None)
        mine = next((m for m in found if m.name == CHOSEN), None)
        if mine is None or best is None or not mine.samples:
            table.add_row(key, mine.error if mine else "-", "", "", "", "", "", "")
            continue
        order, plain = rank_correlation(found), rank_correlation(found, ties=False)
        table.add_row(
            key,
            f"{mine.degrees}; {mine.stages}",
            f"{mine.predicted_seconds * 1e3:.0f} ms",
            f"{mine.seconds * 1e3:.0f} ms",
            f"{best.name}, {best.seconds * 1e3:.0f} ms",
            f"{regret(runs):.2f}",
            "" if order is None else f"{order:.2f}",
            "" if plain is None else f"{plain:.2f}",
        )
    console.print(table)


def crossovers(cells: Mapping[str, list[Measured]], by_key: Mapping[str, Cell]) -> list[dict[str, Any]]:
    """For every job on two equal ranks without limits: what is fastest under which links, and what was chosen."""
    rows = []
    for key, found in cells.items():
        cell, runs = by_key[key], timed(found)
        if len(set(cell.shares)) == 1 and len(cell.shares) == 2 and cell.limit_nbytes is None and CHOSEN in runs:
            best = min(runs.values(), key=lambda m: m.seconds)
            chosen, single = runs[CHOSEN], runs.get("single", runs[CHOSEN])
            rows.append(
                {"job": cell.job, "links": cell.links.name, "fastest": kind_of(best), "chosen": kind_of(chosen),
                 "faster_than_single": single.seconds / chosen.seconds}
            )  # fmt: skip
    return rows


def kind_of(found: Measured) -> str:
    """Degrees without microbatches: "pp2 x dp1 x tp1"."""
    return found.degrees.partition(",")[0]


def run(todo: Sequence[Cell], loopback: bool, seconds: float, keep: Any) -> None:
    """keep(cell, found, wall seconds) is called after every cell; no cell is begun after `seconds`."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="shardplan-regret-") as folder:
        for shares, group in groupby(todo, key=lambda cell: cell.shares):
            members = list(group)
            held = shares if min(shares) < 1 else None
            with EmulatedCluster(members[0].links, shares=held, loopback=loopback) as cluster:
                for cell in shown(members, not sys.stderr.isatty()):
                    if time.monotonic() - began > seconds:
                        return
                    started = time.monotonic()
                    limit = cell.limit_nbytes
                    conditions = Conditions(shares, limit, 7, GIVE_UP, limit is not None, _MOST)
                    found = measure(cluster, cell.links, cell.job, cell.wanted(), folder, conditions)
                    keep(cell, found, time.monotonic() - started)


def _numbers(text: str) -> slice:
    """ "3..10" (from 1, both ends counted), "3.." or "7" as a slice."""
    first, dots, last = text.partition("..")
    start = int(first or 1) - 1
    return slice(start, int(last) if last else None if dots else start + 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one small cell")
    parser.add_argument("--cells", type=_numbers, default=slice(None), metavar="N..M", help="which, by number")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no cell after so long")
    parser.add_argument("--list", action="store_true", help="only list the cells")
    parser.add_argument("-o", "--output", type=Path, help="results, and what need not be measured again")
    parser.add_argument("--loopback", action="store_true", help="no links: needs no root")
    given = parser.parse_args()
    chosen = [cell for cell in (SMOKE if given.smoke else CELLS[given.cells]) if given.only in cell.key]
    if given.list:
        for number, cell in enumerate(CELLS, 1):
            print(f"{number:3} {cell.key}")
        return 0
    if not given.loopback and (why := missing()):
        print(f"no emulated links here: {why} (or --loopback)", file=sys.stderr)
        return 2
    by_key = {cell.key: cell for cell in (*CELLS, *SMOKE)}
    before = records.read(given.output)
    cells = {key: [_measured(m) for m in found] for key, found in before.get("cells", {}).items() if key in by_key}
    wall = dict(before.get("wall_seconds", {}))

    def keep(cell: Cell, found: list[Measured], seconds: float) -> None:
        cells[cell.key], wall[cell.key] = found, seconds
        write(given.output, cells, wall, by_key)

    todo = [cell for cell in chosen if cell.key not in cells]
    if todo:
        run(todo, given.loopback, given.seconds, keep)
    mine = {cell.key: cells[cell.key] for cell in chosen if cell.key in cells}
    show(mine, by_key, Console(width=200))
    if not mine:
        return 0
    found = summary(mine, by_key)
    print(", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    print(f"{sum(wall.get(key, 0.0) for key in mine):.0f} s in all")
    missed = [target for target in checked(found) if not target.met]
    for target in missed:
        print(f"MISSED: {target}", file=sys.stderr)
    return 7 if missed and not given.smoke else 0


def write(
    path: Path | None, cells: Mapping[str, list[Measured]], wall: Mapping[str, float], by_key: Mapping[str, Cell]
) -> None:
    figures = summary(cells, by_key)
    records.write(
        path,
        "regret",
        checked(figures),
        comparable=figures,
        crossovers=crossovers(cells, by_key),
        wall_seconds=dict(wall),
        cells={key: [asdict(m) for m in found] for key, found in cells.items()},
    )


def _measured(fields: Mapping[str, Any]) -> Measured:
    return Measured(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


if __name__ == "__main__":
    sys.exit(main())
