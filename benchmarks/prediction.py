"""How well plans predict themselves: step time and memory, on real ranks over emulated links.

    python -m benchmarks.prediction [--smoke] [--ranks 2 4] [--only TEXT] [-o FILE] [--loopback]

The cells (job, links, degrees, microbatches) are the table below, chosen before anything was measured. Costs are
profiled on the spot, links included; nothing is fitted to the cells. Results go to a JSON file, where cells that are
there already are not measured again. Ends with 7 where a target is missed. Needs root (`benchmarks/cluster`);
--loopback runs without links.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import records
from benchmarks.cluster import EmulatedCluster, Links, missing, nodes, uniform
from benchmarks.emulated import Conditions, Measured, Wanted, measure, shown
from benchmarks.records import Checked, Target

TARGETS = (
    Target("step time off by, median", 0.05),
    Target("step time off by, worst", 0.12),
    Target("peak memory off by, median", 0.03),
    Target("peak memory off by, worst", 0.08),
)
"""Relative errors."""
_SHARE = 0.45
"""Of a core, for each of four ranks on two cores."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One job under one kind of links: its plans are measured side by side."""

    job: str
    links: Links
    wanted: tuple[Wanted, ...]


def _wanted(*plans: tuple[int, int, int, int]) -> tuple[Wanted, ...]:
    """(dp, tp, pp, microbatches) each."""
    return tuple(Wanted(f"dp{dp} tp{tp} pp{pp} m{m}", {"dp": dp, "tp": tp, "pp": pp}, m) for dp, tp, pp, m in plans)


TWO = (
    Setting("usual", uniform(2, 1000), _wanted((1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 4), (1, 1, 2, 8))),
    Setting("usual", uniform(2, 200, 1), _wanted((2, 1, 1, 1), (1, 1, 2, 4))),
    Setting("wide", uniform(2), _wanted((1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 2))),
    Setting("wide", uniform(2, 1000), _wanted((2, 1, 1, 1), (1, 1, 2, 4))),
    Setting("deep", uniform(2, 50), _wanted((2, 1, 1, 2), (1, 1, 2, 8))),
    Setting("deep", uniform(2, 1000, 5), _wanted((2, 1, 1, 1), (1, 1, 2, 4))),
    Setting("images", uniform(2, 1000), _wanted((1, 1, 1, 1), (2, 1, 1, 1), (1, 1, 2, 4))),
    Setting("experts", uniform(2, 1000), _wanted((1, 1, 1, 1), (2, 1, 1, 1), (1, 1, 2, 2))),
    Setting("translation", uniform(2, 1000), _wanted((1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 4))),
)
FOUR = (
    Setting("usual", uniform(4, 1000), _wanted((4, 1, 1, 1), (2, 1, 2, 4), (1, 1, 4, 8), (2, 2, 1, 1))),
    Setting("deep", nodes(4, 2, 0, 200, 1), _wanted((4, 1, 1, 1), (2, 1, 2, 4), (1, 1, 4, 8))),
    Setting("translation", uniform(4, 1000), _wanted((4, 1, 1, 1), (2, 1, 2, 4))),
)
SMOKE = (Setting("images@4x16", uniform(2, 1000), _wanted((2, 1, 1, 1), (1, 1, 2, 4))),)


@dataclass(frozen=True, slots=True)
class Cell:
    """One plan of a setting, measured."""

    key: str
    measured: Measured

    @property
    def seconds_error(self) -> float:
        """(predicted - measured) / measured."""
        return self.measured.predicted_seconds / self.measured.seconds - 1.0

    @property
    def bytes_error(self) -> float | None:
        """Of the rank that is furthest off; None where memory could not be measured."""
        pairs = zip(self.measured.predicted_nbytes, self.measured.nbytes)
        return max((p / n - 1.0 for p, n in pairs if n), key=abs, default=None)


def run(settings: tuple[Setting, ...], ranks: int, known: dict[str, Cell], loopback: bool, save: Any) -> list[Cell]:
    """Measures what is not known yet; `save` is called after every setting."""
    todo = [s for s in settings if any(_key(s, ranks, w) not in known for w in s.wanted)]
    share = 1.0 if ranks <= len(os.sched_getaffinity(0)) else _SHARE
    if todo:
        with (
            tempfile.TemporaryDirectory(prefix="shardplan-prediction-") as folder,
            EmulatedCluster(todo[0].links, shares=share if share < 1 else None, loopback=loopback) as c,
        ):
            for setting in shown(todo, not sys.stderr.isatty()):
                wanted = [want for want in setting.wanted if _key(setting, ranks, want) not in known]
                found = measure(c, setting.links, setting.job, wanted, folder, Conditions((share,) * ranks))
                for want, result in zip(wanted, found, strict=True):
                    known[_key(setting, ranks, want)] = Cell(_key(setting, ranks, want), result)
                save()
    return [known[_key(s, ranks, w)] for s in settings for w in s.wanted]


def _key(setting: Setting, ranks: int, want: Wanted) -> str:
    return f"{setting.job} | {ranks} ranks | {setting.links.name} | {want.name}"


def show(cells: list[Cell], console: Console) -> None:
    """Prints every cell."""
    table = Table("cell", "predicted", "measured", "off by", "peak off by")
    for cell in cells:
        if cell.measured.error:
            table.add_row(cell.key, "-", "-", cell.measured.error, "")
            continue
        memory = cell.bytes_error
        table.add_row(
            cell.key,
            f"{cell.measured.predicted_seconds * 1e3:.1f} ms",
            f"{cell.measured.seconds * 1e3:.1f} ms",
            f"{cell.seconds_error:+.1%}",
            "" if memory is None else f"{memory:+.1%}",
        )
    console.print(table)


def checked(cells: Iterable[Cell]) -> list[Checked]:
    """The targets, for what was measured."""
    good = [cell for cell in cells if not cell.measured.error]
    seconds = [abs(cell.seconds_error) for cell in good]
    nbytes = [abs(e) for cell in good if (e := cell.bytes_error) is not None]
    values = [f(errors) if errors else math.nan for errors in (seconds, nbytes) for f in (statistics.median, max)]
    return [target.check(value) for target, value in zip(TARGETS, values, strict=True) if not math.isnan(value)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Predicted against measured, on emulated links.")
    parser.add_argument("--smoke", action="store_true", help="two cells")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], choices=[2, 4])
    parser.add_argument("--only", default="", help="settings whose job or links contain this text")
    parser.add_argument("-o", "--output", type=Path, help="results, and what need not be measured again")
    parser.add_argument("--loopback", action="store_true", help="no links: needs no root")
    given = parser.parse_args()
    if not given.loopback and (why := missing()):
        print(f"no emulated links here: {why} (or --loopback)", file=sys.stderr)
        return 2
    known: dict[str, Cell] = {}
    if given.output and given.output.exists():
        for entry in json.loads(given.output.read_text())["cells"]:
            fields = {n: tuple(v) if isinstance(v, list) else v for n, v in entry["measured"].items()}
            known[entry["key"]] = Cell(entry["key"], Measured(**fields))

    def save() -> None:
        if given.output:
            found = checked(known.values())
            records.write(given.output, "prediction", found, cells=[asdict(cell) for cell in known.values()])

    cells: list[Cell] = []
    by_ranks = {2: SMOKE} if given.smoke else {ranks: {2: TWO, 4: FOUR}[ranks] for ranks in given.ranks}
    for ranks, settings in by_ranks.items():
        chosen = tuple(s for s in settings if given.only in s.job or given.only in s.links.name)
        cells += run(chosen, ranks, known, given.loopback, save)
    show(cells, Console())
    missed = [target for target in checked(cells) if not target.met]
    for target in checked(cells):
        print(f"{'' if target.met else 'MISSED: '}{target}", file=sys.stdout if target.met else sys.stderr)
    return 7 if missed and not given.smoke else 0


if __name__ == "__main__":
    sys.exit(main())
