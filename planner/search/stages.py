"""The stage program, solved: by dynamic programming, and where that leaves a gap on a small one, by integer program."""

from __future__ import annotations

from dataclasses import replace

from shardplan.errors import SolverTimeout
from shardplan.planner.search.solver import Budget
from shardplan.planner.search.stage_dp import solve_quickly
from shardplan.planner.search.stage_ilp import StageChoice, StageProblem, solve_program

_SMALL = 200
"""Binary variables of an integer program that is worth its time."""
_LIMIT_SECONDS = 10.0


def solve_stages(problem: StageProblem, budget: Budget) -> StageChoice | None:
    """The cheapest choice found that fits, with a bound on all choices of these columns; None where none fits.

    Raises SolverTimeout where it is not known whether one does.
    """
    quick = solve_quickly(problem, budget.gap)
    if quick is not None and quick.optimal:
        return quick
    size = sum(map(len, problem.columns)) * problem.stages
    if quick is not None and size > _SMALL:
        return quick
    try:
        exact = solve_program(problem, budget, _LIMIT_SECONDS if quick is not None else None)
    except SolverTimeout:
        if quick is None:
            raise
        return quick
    if quick is None or exact is None:
        return exact
    best = min(quick, exact, key=lambda choice: choice.objective)
    bound = min(max(quick.bound, exact.bound), best.objective)
    optimal = best.objective - bound <= budget.gap * best.objective
    return replace(best, bound=bound, optimal=optimal or exact.optimal, prices=quick.prices)
