"""Whether the same job gives the same plan, byte for byte.

    python benchmarks/same_plan.py [--runs 20] [--model bytegpt] [--devices 4]

Every run is a process of its own with its own seed of string hashes, the inputs in another order and the other runs'
caches unknown; compared is the plan as JSON without the seconds that the search took. Exit status 1 where two differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def planned(model: str, devices: int, seed: int) -> str:
    """The plan's JSON. seed: of the order of the inputs."""
    sys.path.insert(0, str(ROOT))
    from shardplan.planner.cluster import Cluster
    from shardplan.planner.export import trace_model
    from shardplan.planner.search import SolveOptions, solve
    from tests import models
    from tests.prices import SimplePrices

    case = models.make(model)
    inputs = list(case.kwargs.items())
    random.Random(seed).shuffle(inputs)
    trace = trace_model(case.model, (), dict(inputs), loss_fn=case.loss_fn, target=case.target)
    cluster = Cluster.cpu(devices, memory="4GiB")
    plan = json.loads(solve(trace, cluster, SimplePrices(cluster), SolveOptions()).to_json())
    plan["status"].pop("seconds", None)
    return json.dumps(plan)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--model", default="bytegpt", help="a name of tests/models.py")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--seed", type=int, default=-1, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.seed >= 0:
        print(planned(given.model, given.devices, given.seed))
        return 0
    found: dict[str, list[int]] = {}
    for seed in range(given.runs):
        command = [sys.executable, __file__, "--seed", str(seed), "--model", given.model]
        command += ["--devices", str(given.devices)]
        env = {**os.environ, "PYTHONHASHSEED": str(seed)}
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=env)
        found.setdefault(hashlib.sha256(done.stdout).hexdigest()[:16], []).append(seed)
    for digest, seeds in found.items():
        print(f"{digest}  {len(seeds)} of {given.runs} runs")
    return len(found) > 1


if __name__ == "__main__":
    sys.exit(main())
