"""The same input gives the same bytes: plans made by processes with other hash seeds, inputs in another order.

    python -m tests.determinism [--runs 20]

Every process plans small jobs on equal and on mixed devices, with the example's inputs and the
keyword arguments shuffled by its seed, and prints a digest of each plan's JSON. Exit status 7 where two differ.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import subprocess
import sys
from typing import Any

import shardplan as sp
from tests import models


def shuffled(rng: random.Random, items: dict[str, Any]) -> dict[str, Any]:
    names = list(items)
    rng.shuffle(names)
    return {name: items[name] for name in names}


def digests(seed: int) -> list[str]:
    """One per job."""
    rng = random.Random(seed)
    jobs = [
        ("bytegpt", {"h100": 4}, {"constraints": [sp.degrees(pp=2)], "microbatches": 4}),
        ("mlp", {"a10g": 1, "h100": 2}, {"constraints": [sp.degrees(pp=2)]}),
    ]
    rng.shuffle(jobs)
    found = {}
    for name, devices, settings in jobs:
        case = models.make(name)
        example = {**case.kwargs, "target": case.target} if case.loss_fn else dict(case.kwargs)
        settings = shuffled(rng, {"loss_fn": case.loss_fn, "cache": False, "time_limit": 300.0, **settings})
        plan = sp.plan(case.model, devices, shuffled(rng, example), **settings)
        found[name] = f"{name} {hashlib.sha256(plan.to_json().encode()).hexdigest()[:16]} {plan.degrees()}"
    return sorted(found.values())


def of_process(seed: int) -> str:
    """What a new process with this hash seed prints."""
    environment = os.environ | {"PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.determinism", "--seed", str(seed)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, help="plan in this process, and print digests")
    given = parser.parse_args()
    if given.seed is not None:
        print("\n".join(digests(given.seed)))
        return 0
    found: dict[str, list[int]] = {}
    for seed in range(1, given.runs + 1):
        found.setdefault(of_process(seed), []).append(seed)
    for text, seeds in found.items():
        print(f"{len(seeds)} of {given.runs} runs:\n{text}", end="")
    return 0 if len(found) == 1 else 7


if __name__ == "__main__":
    sys.exit(main())
