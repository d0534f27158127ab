"""All benchmarks that need no GPU, one after another, under one protocol; then docs/benchmarks.md.

    python -m benchmarks [NAME ...] [--smoke] [--long] [--fresh] [--compare [FILE]] [--keep-baseline] [--page]

Results go to benchmarks/results, one JSON file a suite; without --fresh a suite that can resume (prediction, regret)
measures only what its file lacks. --compare sets the figures beside a stored baseline (results/baseline.json) and ends
with 7 where one is worse by more than a tie; --keep-baseline stores them. --page only writes the page. --smoke runs a
tiny version of each that has one and keeps nothing. Ends with 7 where a target is missed, with 1 where a suite failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import page, records
from benchmarks.cluster import missing
from benchmarks.protocol import machine

BASELINE = records.FOLDER / "baseline.json"
RUNS = records.FOLDER / "runs.json"
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Suite:
    """name: of the module in `benchmarks`; output: its flag for a file. smoke: arguments of the tiny version, None for
    none. links: whether it uses emulated links, and runs on loopback where there are none. minutes: about, on two
    cores. long: only run where it is named, or with --long."""

    name: str
    output: str
    arguments: tuple[str, ...] = ()
    smoke: tuple[str, ...] | None = None
    links: bool = False
    resumes: bool = False
    minutes: float = 1.0
    long: bool = False

    @property
    def file(self) -> Path:
        return records.FOLDER / f"{self.name}.json"

    def command(self, smoke: bool, loopback: bool) -> list[str]:
        words = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{self.name}"]
        words += self.smoke or () if smoke else (*self.arguments, self.output, str(self.file))
        return words + (["--loopback"] if self.links and loopback else [])


_SEARCHED = ("8b@8", "8b@64", "70b@64", "405b@16384")
SUITES = (
    Suite("regret", "-o", smoke=("--smoke",), links=True, resumes=True, minutes=22),
    Suite("prediction", "-o", smoke=("--smoke", "--ranks", "2"), links=True, resumes=True, minutes=6),
    Suite("overhead", "--json", minutes=2),
    Suite("overlap", "--json", minutes=1),
    Suite("peers", "-o", ("--published",), links=True, minutes=2),
    Suite("search", "-o", ("8b@8", "8b@64", "70b@64", "405b@16384"), smoke=("8b@8", "--time-limit", "20"), minutes=3),
    Suite("scaling", "-o", smoke=("--model", "llama-8b"), minutes=2),
    Suite("startup", "-o", smoke=("--rounds", "1"), minutes=0.7),
    Suite("mixed", "-o", minutes=10, long=True),
    Suite("expert_plans", "--json", minutes=30, long=True),
)


def run(suites: tuple[Suite, ...], smoke: bool, fresh: bool) -> dict[str, int]:
    """Exit status by name. Their seconds are kept in `RUNS`."""
    loopback = missing() is not None
    if loopback:
        print(f"no emulated links here: {missing()}; links are the loopback's", file=sys.stderr)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, _paths()))}
    statuses: dict[str, int] = {}
    kept = records.read(RUNS).get("runs", {})
    for suite in suites:
        if fresh and not smoke:
            suite.file.unlink(missing_ok=True)
        print(f"== {suite.name} (about {suite.minutes:g} min)" if not smoke else f"== {suite.name}", flush=True)
        started = time.monotonic()
        done = subprocess.run(suite.command(smoke, loopback), env=environment, cwd=_ROOT)
        statuses[suite.name] = done.returncode
        if not smoke:
            kept[suite.name] = {"seconds": time.monotonic() - started, "status": done.returncode}
            records.write(RUNS, "runs", runs=kept)
    return statuses


def _paths() -> list[str]:
    return [str(_ROOT), str(_ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]


def compare(before: Path, console: Console) -> bool:
    """Prints what changed since the baseline; whether nothing is worse."""
    old = json.loads(before.read_text())
    where = old["machine"]
    console.print(
        f"baseline of {where['date']}, commit {where['commit']}, {where['processor']}, torch {where['torch']}"
    )
    table = Table("suite", "figure", "baseline", "now", "")
    good = True
    for suite in SUITES:
        data = records.read(suite.file)
        for name, was, now, verdict in records.compare(data, old["suites"].get(suite.name, {})):
            good &= verdict != "worse"
            table.add_row(suite.name, name, f"{was:.4g}", f"{now:.4g}", verdict)
    console.print(table)
    return good


def keep_baseline() -> None:
    """Stores what `records.figures` has of every suite."""
    found = {suite.name: records.figures(records.read(suite.file)) for suite in SUITES if suite.file.exists()}
    text = {"schema": records.SCHEMA, "machine": machine(), "suites": {n: {"comparable": f} for n, f in found.items()}}
    BASELINE.write_text(json.dumps(text, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=", ".join(suite.name for suite in SUITES))
    parser.add_argument("--smoke", action="store_true", help="tiny, in two minutes; keeps nothing")
    parser.add_argument("--long", action="store_true", help="the long ones too: searches of many minutes")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--compare", nargs="?", type=Path, const=BASELINE, metavar="FILE", help="with a baseline")
    parser.add_argument("--keep-baseline", action="store_true", help="store the figures that are there")
    parser.add_argument("--page", action="store_true", help="run nothing, write docs/benchmarks.md")
    given = parser.parse_args()
    if unknown := set(given.names) - {suite.name for suite in SUITES}:
        parser.error(f"no suite {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in SUITES)}")
    chosen = tuple(s for s in SUITES if s.name in given.names or (not given.names and (given.long or not s.long)))
    if given.smoke:
        chosen = tuple(suite for suite in chosen if suite.smoke is not None)
    statuses = {} if given.page or given.keep_baseline else run(chosen, given.smoke, given.fresh)
    if given.keep_baseline:
        keep_baseline()
    if not given.smoke:
        page.write()
    good = compare(given.compare, Console(width=140)) if given.compare is not None else True
    for name, status in statuses.items():
        if status:
            print(f"{name}: {'a target is missed' if status == 7 else f'failed with status {status}'}", file=sys.stderr)
    failed = any(status not in (0, 7) for status in statuses.values())
    return 1 if failed else 7 if not good or any(statuses.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
