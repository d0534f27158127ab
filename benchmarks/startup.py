"""How long ``--help`` of every sub-command takes in a fresh process, and what importing the package imports.

    python -m benchmarks.startup [--rounds 5] [-o FILE]

Medians of wall and CPU seconds. Ends with 7 where a median is above half a second.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import records

COMMANDS = (
    "", "plan", "profile", "report", "diff", "simulate", "run", "check", "bench", "doctor", "cluster",
    "cluster detect", "cluster show", "cluster list",
)  # fmt: skip
TARGET = records.Target("slowest --help, seconds", 0.5)
_ROOT = Path(__file__).resolve().parent.parent


def once(command: str) -> tuple[float, float]:
    """(wall, CPU) seconds of one fresh process."""
    words = [sys.executable, "-m", "shardplan", *command.split(), "--help"]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, cwd=_ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", type=Path)
    given = parser.parse_args()
    rows = []
    for command in COMMANDS:
        once(command)  # byte code and disk cache
        seen = [once(command) for _ in range(given.rounds)]
        wall, cpu = (statistics.median(values) for values in zip(*seen, strict=True))
        rows.append({"command": command or "shardplan", "seconds": wall, "cpu_seconds": cpu})
        print(f"{command or 'shardplan':16} {wall:.3f} s, {cpu:.3f} s of CPU", flush=True)
    checked = TARGET.check(max(row["seconds"] for row in rows))
    print(checked)
    records.write(given.o, "startup", [checked], commands=rows)
    return 0 if checked.met else 7


if __name__ == "__main__":
    sys.exit(main())
