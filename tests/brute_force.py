"""The stage program for unequal devices against all choices of many small random instances.

    python -m tests.brute_force [--instances 300] [--first 0]

Of every instance: with all columns known and gap 0 the objective is the optimum and the bound is not above it; with
columns taken as incomplete the bound does not exceed it and nothing cheaper is claimed. Exit status 7 where one is
wrong.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from dataclasses import replace

from shardplan.planner.search.mixed_boxes import solve_mixed
from shardplan.planner.search.mixed_problem import fits
from shardplan.planner.search.stage_cells import Known
from tests.mixed_instances import optimum, random_problem

_SLACK = 1e-9


def difference(seed: int) -> str | None:
    """What is wrong with the instance of that seed; "infeasible" where nothing fits and the solver says so."""
    problem = random_problem(random.Random(seed))
    best = optimum(problem)
    found, bound = solve_mixed(problem, 0.0)
    if best == math.inf:
        return "infeasible" if found is None and bound == math.inf else f"nothing fits, found {found}"
    if found is None or not fits(problem, found.stages):
        return f"optimum {best}, found {found}"
    if abs(found.objective - best) > _SLACK * best or bound > best * (1 + _SLACK):
        return f"optimum {best}, found {found.objective}, bound {bound}"
    ends = tuple(sorted({problem.in_flight[0], problem.in_flight[-1]}))
    for known in (Known(), Known((1e-10, 1e-9), ends, True, 0.9 * problem.once)):
        partial = replace(problem, ways=tuple(replace(way, complete=False, known=known) for way in problem.ways))
        rough, bound = solve_mixed(partial, 0.0)
        if bound > best * (1 + _SLACK) or (rough is not None and rough.objective < best * (1 - _SLACK)):
            return f"incomplete columns: optimum {best}, found {rough}, bound {bound}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    given = parser.parse_args()
    wrong = infeasible = 0
    for seed in range(given.first, given.first + given.instances):
        said = difference(seed)
        infeasible += said == "infeasible"
        if said not in (None, "infeasible"):
            wrong += 1
            print(f"seed {seed}: {said}", flush=True)
    print(f"{given.instances} instances, {infeasible} of them infeasible, {wrong} wrong")
    return 7 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
