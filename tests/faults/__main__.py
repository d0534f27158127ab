"""``python -m tests.faults [--rounds N] [--seed S] [NAME ...]``: each fault N times with other choices.

Prints a line a round; exit status 1 if anything was lost, hung, or left behind.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
import traceback
from pathlib import Path

from tests.faults import scenarios, torchrun
from tests.faults.sabotage import Left


def main() -> int:
    every = {**scenarios.SCENARIOS, **torchrun.SCENARIOS}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*every, []], help="which faults; default: all")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--starts", type=int, default=50, help="of many_starts, which has one round")
    arguments = parser.parse_args()
    scenarios.many_starts.count = arguments.starts
    failed = total = 0
    for name in arguments.names or every:
        for round_ in range(1 if name == "many_starts" else arguments.rounds):
            rng = random.Random(f"{arguments.seed} {name} {round_}")
            started, left = time.monotonic(), Left()
            total += 1
            try:
                with tempfile.TemporaryDirectory() as directory:
                    told = every[name](rng, Path(directory) / "checkpoints")
                left.check()
                print(f"ok    {name:15} {round_:3} {time.monotonic() - started:6.1f} s  {told}", flush=True)
            except (Exception, AssertionError):
                failed += 1
                print(f"WRONG {name:15} {round_:3} {time.monotonic() - started:6.1f} s", flush=True)
                traceback.print_exc()
    print(f"{total - failed} of {total} as they must be")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
