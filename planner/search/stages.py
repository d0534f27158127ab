"""The stage program, solved: by dynamic programming, and where that leaves a gap on a small one, by integer program."""

from __future__ import annotations

import math
from dataclasses import replace

from shardplan.errors import SolverTimeout
from shardplan.planner.search.solver import Budget
from shardplan.planner.search.stage_dp import solve_quickly
from shardplan.planner.search.stage_ilp import StageChoice, StageProblem, solve_program

_SMALL = 200
"""Binary variables of an integer program that is worth its time."""
_LIMIT_SECONDS = 10.0


def solve_stages(problem: StageProblem, budget: Budget, best: float = math.inf) -> StageChoice | None:
    """The cheapest choice found that fits, with a bound on all choices of these columns; None where none was found, or
    none that costs less than `best`.

    (`stage_dp.certified` says whether that is proven.)
    """
    quick = solve_quickly(problem, budget.gap, best)
    size = sum(map(len, problem.columns)) * problem.stages
    if size > _SMALL or (quick is not None and quick.optimal):
        return quick
    try:
        exact = solve_program(problem, budget, _LIMIT_SECONDS)
    except SolverTimeout:
        return quick
    if quick is None or exact is None:
        return exact
    cheaper = min(quick, exact, key=lambda choice: choice.objective)
    bound = min(max(quick.bound, exact.bound), cheaper.objective)
    optimal = cheaper.objective - bound <= budget.gap * cheaper.objective
    return replace(cheaper, bound=bound, optimal=optimal or exact.optimal)
