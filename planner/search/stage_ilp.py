"""The stage-level integer program: which segments form which stage, and by which column each runs.

Sets        segments i = 0..n-1 in order; stages s = 0..S-1; columns c in C(i), each with a layout of the tensor that
            enters and of the one that leaves.
Variables   a[i,s,c] in {0,1}: segment i lies on stage s and runs by column c.
            u[i,l] in [0,1]: the tensor between segments i and i+1 lies in layout l.
            x[i,l] in [0,1]: there is a cut between i and i+1, and the tensor lies in layout l.
            T >= 0: seconds of the slowest stage and microbatch; U >= 0: of the slowest once-a-step work.
Objective   sum_s t_s + (m - 1) T + U + sum_i,l send[i,l] x[i,l]                            (`_objective`)
            with t_s = sum_i,c seconds[c] a[i,s,c] + fixed seconds of a stage
Constraints sum_s,c a[i,s,c] = 1; stages ascend along i and none is empty                  (`_order`)
            layouts agree: what i leaves is what i+1 takes                                  (`_layouts`)
            T >= t_s, U >= u_s                                                              (`_slowest`)
            sum_i,c (P[c] + q_s A[c]) a[i,s,c] + W_s + in_s <= M_s                          (`_memory`)
            W_s >= W[c] a[i,s,c]; in_s = q_s * bytes of the tensor received; q_s = min(m, S - s)

Step time of 1F1B: fill and drain pass each stage once, the slowest stage sets the pace of the other m - 1 microbatches.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import pulp

from shardplan.planner.search.problem import Price
from shardplan.planner.search.solver import Budget, Solved, solve

_MILLI = 1e3
_GIGA = 1e-9


@dataclass(frozen=True, slots=True)
class Column:
    """One way to run a segment. enters, leaves: layout numbers of the boundary tensors. index: for the caller.
    recomputed: whether backward computes its activations again."""

    price: Price
    enters: int = 0
    leaves: int = 0
    index: int = 0
    recomputed: bool = False


@dataclass(frozen=True, slots=True)
class StageProblem:
    """columns: per segment. cut_seconds, cut_nbytes: per boundary (i, i+1) and layout: of one message, and of what the
    receiver keeps. fixed: of every stage. limits: bytes per stage. in_flight: microbatches held per stage. pinned:
    segment -> stage; together: groups of segments on one stage. least_transients: per segment, transient bytes that no
    column can do without, made or not (default: nothing is known); least_recomputing: that no recomputed column can."""

    columns: tuple[tuple[Column, ...], ...]
    stages: int
    microbatches: int
    cut_seconds: tuple[dict[int, float], ...]
    cut_nbytes: tuple[dict[int, float], ...]
    limits: tuple[float, ...]
    in_flight: tuple[int, ...]
    fixed: Price = field(default_factory=Price)
    pinned: tuple[tuple[int, int], ...] = ()
    together: tuple[tuple[int, ...], ...] = ()
    least_transients: tuple[float, ...] = ()
    least_recomputing: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class StageChoice:
    """bounds: first segment of every stage. columns: per segment, position in its list. bound: proven."""

    bounds: tuple[int, ...]
    columns: tuple[int, ...]
    objective: float
    bound: float
    optimal: bool


def objective(problem: StageProblem, bounds: Sequence[int], columns: Sequence[int]) -> float:
    """The objective of a choice, from the data alone."""
    ends = [*bounds[1:], len(problem.columns)]
    seconds, once = [], []
    for first, last in zip(bounds, ends, strict=True):
        chosen = [problem.columns[i][columns[i]].price for i in range(first, last)]
        seconds.append(sum(p.seconds for p in chosen) + problem.fixed.seconds)
        once.append(sum(p.once_seconds for p in chosen))
    send = sum(problem.cut_seconds[i - 1][problem.columns[i][columns[i]].enters] for i in bounds[1:])
    return sum(seconds) + (problem.microbatches - 1) * max(seconds) + max(once) + send


def memory(problem: StageProblem, bounds: Sequence[int], columns: Sequence[int]) -> list[float]:
    """Peak bytes of every stage of a choice, from the data alone."""
    ends = [*bounds[1:], len(problem.columns)]
    found = []
    for stage, (first, last) in enumerate(zip(bounds, ends, strict=True)):
        chosen = [problem.columns[i][columns[i]].price for i in range(first, last)]
        received = problem.cut_nbytes[first - 1][problem.columns[first][columns[first]].enters] if first else 0.0
        held = sum(p.activation_nbytes for p in chosen) + received
        parameters = sum(p.parameter_nbytes for p in chosen)
        transient = max(p.transient_nbytes for p in chosen)
        found.append(parameters + problem.in_flight[stage] * held + transient + problem.fixed.activation_nbytes)
    return found


def solve_program(problem: StageProblem, budget: Budget, limit_seconds: float = math.inf) -> StageChoice | None:
    """The cheapest choice that fits, or None where none does. Raises SolverTimeout without either."""
    return _Stages(problem).solve(budget, limit_seconds)


class _Stages:
    def __init__(self, problem: StageProblem) -> None:
        self.problem = problem
        self.model = pulp.LpProblem("stages", pulp.LpMinimize)
        self.count = len(problem.columns)
        self.a = {
            (i, s, c): self.model.add_variable(f"a_{i}_{s}_{c}", cat=pulp.LpBinary)
            for i, columns in enumerate(problem.columns)
            for s in range(problem.stages)
            if s <= i and problem.stages - 1 - s <= self.count - 1 - i
            for c in range(len(columns))
        }
        self.slowest = self.model.add_variable("T", 0)
        self.once = self.model.add_variable("U", 0)
        self.x: dict[tuple[int, int], pulp.LpVariable] = {}

    def on(self, i: int, s: int) -> pulp.LpAffineExpression:
        """1 where segment i lies on stage s."""
        return pulp.lpSum(self.a[i, s, c] for c in range(len(self.problem.columns[i])) if (i, s, c) in self.a)

    def solve(self, budget: Budget, limit_seconds: float) -> StageChoice | None:
        self._order()
        self._layouts()
        self._memory()
        self._objective(self._slowest())
        solved = solve(self.model, budget, limit_seconds=limit_seconds)
        return None if solved is None else self._choice(solved)

    def _order(self) -> None:
        stages = range(self.problem.stages)
        for i in range(self.count):
            self.model += pulp.lpSum(self.on(i, s) for s in stages) == 1
            if i:
                for s in stages:
                    earlier = range(s + 1)
                    self.model += pulp.lpSum(self.on(i - 1, r) for r in earlier) >= pulp.lpSum(
                        self.on(i, r) for r in earlier
                    )
        for s in stages:
            self.model += pulp.lpSum(self.on(i, s) for i in range(self.count)) >= 1
        for i, s in self.problem.pinned:
            self.model += self.on(i, s) == 1

        for group in self.problem.together:
            for i in group[1:]:
                for s in stages:
                    self.model += self.on(i, s) == self.on(group[0], s)

    def _layouts(self) -> None:
        for i in range(self.count - 1):
            leaves: dict[int, list[pulp.LpVariable]] = defaultdict(list)
            enters: dict[int, list[pulp.LpVariable]] = defaultdict(list)
            for (j, _, c), variable in self.a.items():
                if j == i:
                    leaves[self.problem.columns[i][c].leaves].append(variable)
                elif j == i + 1:
                    enters[self.problem.columns[i + 1][c].enters].append(variable)
            for layout in sorted({*leaves, *enters}):
                self.model += pulp.lpSum(leaves[layout]) == pulp.lpSum(enters[layout])
                if self.problem.stages > 1:
                    x = self.x[i, layout] = self.model.add_variable(f"x_{i}_{layout}", 0, 1)
                    for s in range(self.problem.stages - 1):
                        # The cut is where i lies on a stage up to s and i + 1 does not.
                        before = pulp.lpSum(self.on(i, r) for r in range(s + 1))
                        after = pulp.lpSum(self.on(i + 1, r) for r in range(s + 1))
                        self.model += x >= before - after + pulp.lpSum(enters[layout]) - 1

    def _slowest(self) -> list[pulp.LpAffineExpression]:
        seconds = []
        for s in range(self.problem.stages):
            mine = [(key, v) for key, v in self.a.items() if key[1] == s]
            total = pulp.lpSum(self.problem.columns[i][c].price.seconds * _MILLI * v for (i, _, c), v in mine)
            seconds.append(total + self.problem.fixed.seconds * _MILLI)
            self.model += self.slowest >= seconds[-1]
            self.model += self.once >= pulp.lpSum(
                self.problem.columns[i][c].price.once_seconds * _MILLI * v for (i, _, c), v in mine
            )
        return seconds

    def _memory(self) -> None:
        for s in range(self.problem.stages):
            mine = [(key, v) for key, v in self.a.items() if key[1] == s]
            flight = self.problem.in_flight[s]
            transient = self.model.add_variable(f"W_{s}", 0)
            terms = []
            for (i, _, c), v in mine:
                price = self.problem.columns[i][c].price
                terms.append((price.parameter_nbytes + flight * price.activation_nbytes) * _GIGA * v)
                if price.transient_nbytes:
                    self.model += transient >= price.transient_nbytes * _GIGA * v
            if s:
                received = self.model.add_variable(f"in_{s}", 0)
                for i in range(self.count - 1):
                    for layout, nbytes in self.problem.cut_nbytes[i].items():
                        if (i, layout) in self.x and nbytes:
                            # i on stage s - 1 and i + 1 on stage s
                            here = self.on(i, s - 1) + self.on(i + 1, s) + self.x[i, layout] - 2
                            self.model += received >= nbytes * _GIGA * here
                terms.append(flight * received)
            fixed = self.problem.fixed.activation_nbytes * _GIGA
            self.model += pulp.lpSum(terms) + transient + fixed <= self.problem.limits[s] * _GIGA

    def _objective(self, seconds: list[pulp.LpAffineExpression]) -> None:
        send = [self.problem.cut_seconds[i].get(layout, 0.0) * _MILLI * x for (i, layout), x in self.x.items()]
        self.model.setObjective(
            pulp.lpSum(seconds) + (self.problem.microbatches - 1) * self.slowest + self.once + pulp.lpSum(send)
        )

    def _choice(self, solved: Solved) -> StageChoice:
        stage_of, columns = [0] * self.count, [0] * self.count
        for (i, s, c), variable in self.a.items():
            if solved.values[variable.name] > 0.5:
                stage_of[i], columns[i] = s, c
        bounds = tuple(stage_of.index(s) for s in range(self.problem.stages))
        value = objective(self.problem, bounds, columns)
        # An incumbent within the gap may leave T or U a little slack; it may never promise less than it costs.
        assert value <= solved.objective / _MILLI * (1 + 1e-4), (value, solved.objective)
        return StageChoice(bounds, tuple(columns), value, min(solved.bound / _MILLI, value), solved.optimal)
