"""``python -m tests.fuzz --examples 2000 --processes 2 --seed 0``: random models until that many agree.

Prints models, plans, minutes and failures. The smallest model of every failure is written to ``out/fuzz`` as source;
failures are kept in ``.hypothesis/fuzz`` and tried first the next time.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from hypothesis.database import DirectoryBasedExampleDatabase

from tests.fuzz.examples import Tally, run

OUT = Path("out/fuzz")
MOST_FAILURES = 20


def work(examples: int, seed: int) -> Tally:
    """One process: goes on with other seeds after a failure."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    database = DirectoryBasedExampleDatabase(".hypothesis/fuzz")
    tally = Tally()
    while tally.graphs < examples and len(tally.errors) < MOST_FAILURES:
        number = len(tally.errors)
        try:
            run(examples - tally.graphs, seed + 1000 * number, database, replay=number == 0, tally=tally)
        except Exception as error:
            tally.errors.append(f"{type(error).__name__}: {error}".splitlines()[0])
            OUT.mkdir(parents=True, exist_ok=True)
            path = OUT / f"failure-{seed}-{number}.txt"
            path.write_text(tally.failure)
            print(f"{path}: {tally.errors[-1]}", flush=True)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    started = time.monotonic()
    each = -(-given.examples // given.processes)
    with ProcessPoolExecutor(given.processes) as pool:
        tallies = list(pool.map(work, [each] * given.processes, range(given.seed, given.seed + given.processes)))
    minutes = (time.monotonic() - started) / 60
    failures = [error for tally in tallies for error in tally.errors]
    graphs, plans, dull = (sum(getattr(t, name) for t in tallies) for name in ("graphs", "plans", "dull"))
    print(
        f"{graphs} models under {plans} plans in {minutes:.1f} minutes: {len(failures)} failures ({dull} passed over)"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
