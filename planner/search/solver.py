"""PuLP and its solvers: one way to call them, and what their answers mean."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

# PuLP keeps the errors of importing solvers that are not installed, and with them every frame below: that of a caller
# who plans for the first time, with the model among its variables. In a thread of its own there is none.
_importing = threading.Thread(target=importlib.import_module, args=("pulp",))
_importing.start()
_importing.join()

import pulp  # noqa: E402

from shardplan.errors import SolverTimeout, SolverUnavailable  # noqa: E402

SOLVERS = ("highs", "cbc")


@dataclass(slots=True)
class Budget:
    """Which solver, how exact, and until when. gap: relative. seconds: of the whole search. solves: calls so far."""

    solver: str = "highs"
    gap: float = 0.0
    seconds: float = 60.0
    started: float = field(default_factory=time.monotonic)
    solves: int = 0
    solver_seconds: float = 0.0

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)


@dataclass(frozen=True, slots=True)
class Solved:
    """values: of the variables that were asked for; objective: of the incumbent; bound: proven lower bound."""

    values: Mapping[str, float]
    objective: float
    bound: float
    optimal: bool


def solve(
    problem: pulp.LpProblem, budget: Budget, gap: float | None = None, limit_seconds: float = math.inf
) -> Solved | None:
    """Minimise. None: infeasible. Raises SolverTimeout without an incumbent, SolverUnavailable for a missing solver."""
    limit = max(min(budget.left(), limit_seconds), 0.5)
    gap = budget.gap if gap is None else gap
    started = time.perf_counter()
    solver = _solver(budget.solver, limit, gap)
    try:
        answer = problem.solve(solver)
    except (pulp.PulpSolverError, RuntimeError, ValueError, OSError) as error:
        raise SolverUnavailable(f"the solver {budget.solver} failed", [str(error)], ["try another solver"]) from error
    budget.solves += 1
    budget.solver_seconds += time.perf_counter() - started
    outcome, bound = _outcome_4(answer) if hasattr(answer, "has_solution") else _outcome_3(problem, budget.solver)
    if outcome == "infeasible":
        return None
    if outcome == "nothing":
        raise SolverTimeout(f"{budget.solver} found no plan within {limit:.3g} s", [], ["raise time_limit"])
    objective = cast(float, pulp.value(problem.objective) or 0.0)
    optimal = outcome == "optimal"
    if bound is None or not math.isfinite(bound):
        bound = objective * (1 - gap) if optimal else -math.inf
    values = {variable.name: float(variable.varValue or 0.0) for variable in problem.variables()}
    return Solved(values, objective, min(bound, objective), optimal)


def _outcome_3(problem: pulp.LpProblem, name: str) -> tuple[str, float | None]:
    """PuLP 3. It says "Optimal" also after a time limit; only sol_status tells an incumbent from nothing."""
    if problem.sol_status == pulp.LpSolutionOptimal:
        outcome = "optimal"
    elif problem.sol_status == pulp.LpSolutionIntegerFeasible:
        outcome = "feasible"
    elif pulp.LpStatusInfeasible in (problem.status, problem.sol_status):
        outcome = "infeasible"
    else:
        outcome = "nothing" if problem.sol_status == pulp.LpSolutionNoSolutionFound else "infeasible"
    if name != "highs" or outcome not in ("optimal", "feasible"):
        return outcome, None
    bound = float(problem.solverModel.getInfo().mip_dual_bound)  # type: ignore[union-attr]
    constant = float(problem.objective.constant) if problem.objective is not None else 0.0
    return outcome, bound + constant  # HiGHS is not told the constant


def _outcome_4(answer: Any) -> tuple[str, float | None]:
    """PuLP 4: `solve` returns what there is to know. A model of ours is never unbounded, so "unbounded or infeasible",
    which is "Undefined", means infeasible."""
    reason = answer.status.name
    if answer.has_solution:
        return "optimal" if reason in ("Optimal", "GapLimit") else "feasible", answer.best_bound
    return "infeasible" if reason in ("Infeasible", "Unbounded", "Undefined") else "nothing", None


@cache
def _silence_banner() -> None:
    """HiGHS prints a banner to the process's standard output when the first solver is made, whatever its options say;
    standard output may carry JSON."""
    import highspy

    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        highspy.Highs()
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _solver(name: str, limit: float, gap: float) -> pulp.LpSolver:
    if name == "highs":
        if importlib.util.find_spec("highspy") is None:
            raise SolverUnavailable("the solver highs is not installed", [], ["pip install highspy"])
        _silence_banner()
        solver = pulp.HiGHS(msg=False, timeLimit=limit, gapRel=gap, threads=1, random_seed=0)
    elif name == "cbc":
        # PuLP 3 ships CBC but warns that PuLP 4 will not; there COIN_CMD finds an installed one.
        kind = getattr(pulp, "PULP_CBC_CMD", pulp.COIN_CMD)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            solver = kind(msg=False, timeLimit=limit, gapRel=gap, threads=1)
    else:
        raise SolverUnavailable(f"unknown solver {name!r}", [], [f"one of {', '.join(SOLVERS)}"])
    if not solver.available():
        raise SolverUnavailable(f"the solver {name} is not installed", [], ["pip install highspy", "solver='highs'"])
    return solver
