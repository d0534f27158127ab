"""Unequal devices: the stage program against all choices one by one, plans, constraints, exactness."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from shardplan.planner.search.mixed_dp import solve_mixed
from shardplan.planner.search.mixed_problem import fits
from tests.mixed_instances import optimum, random_problem


@pytest.mark.parametrize("seed", range(12))
def test_program_against_all_choices(seed):
    """gap 0: the optimum. Columns taken as incomplete: the bound never exceeds it, what is found never undercuts it."""
    problem = random_problem(random.Random(seed))
    best = optimum(problem)
    found, bound = solve_mixed(problem, 0.0)
    if best == math.inf:
        assert found is None and bound == math.inf
        return
    assert found is not None and fits(problem, found.stages)
    assert found.objective == pytest.approx(best, rel=1e-9)
    assert bound <= best * (1 + 1e-9)
    partial = replace(problem, ways=tuple(replace(way, complete=False, known=()) for way in problem.ways))
    found, bound = solve_mixed(partial, 0.0)
    assert bound <= best * (1 + 1e-9)
    assert found is None or found.objective >= best * (1 - 1e-9)
