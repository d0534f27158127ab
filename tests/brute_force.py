"""The stage program for unequal devices against all choices of many small random instances.

    python -m tests.brute_force [--instances 300] [--first 0] [--schedules 20]

Of every instance: with all columns known and gap 0 the objective is the optimum and the bound is not above it; with
columns taken as incomplete the bound does not exceed it and nothing cheaper is claimed. Exit status 7 where one is
wrong. --schedules: so many random pipelines too (`tests.brute_force_schedules`): there the plan is compared with every
schedule, cut and order of ranks as the simulator has them, which the search models in closed form; how much its plans
lose and by how much its bounds are too high at most is printed.
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
from tests.brute_force_schedules import compare
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
    parser.add_argument("--schedules", type=int, default=20, help="random pipelines, all schedules simulated")
    given = parser.parse_args()
    wrong = infeasible = 0
    for seed in range(given.first, given.first + given.instances):
        said = difference(seed)
        infeasible += said == "infeasible"
        if said not in (None, "infeasible"):
            wrong += 1
            print(f"seed {seed}: {said}", flush=True)
    print(f"{given.instances} instances, {infeasible} of them infeasible, {wrong} wrong")
    found = [compare(seed) for seed in range(given.first, given.first + given.schedules)]
    lost = sorted((c.seconds / c.best - 1 for c in found), reverse=True)
    above = sorted((c.bound / c.best - 1 for c in found), reverse=True)
    if found:
        same = sum(c.kind.startswith(c.chosen) for c in found)
        print(f"{len(found)} pipelines, all schedules, cuts and orders simulated: the best schedule chosen in {same}")
        print(f"plans above the best: {lost[0]:.2%} at most, {lost[len(lost) // 2]:.2%} in the middle")
        print(f"bounds above the best: {sum(a > _SLACK for a in above)}, by {max(above[0], 0.0):.2%} at most")
    return 7 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
