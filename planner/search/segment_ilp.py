"""The op-level integer program: how the ops of a segment are split over one mesh axis.

Sets, data  as in `planner.search.problem`.
Variables   y[o,k] in {0,1}: op o runs by option k.
            z[v,t] in [0,1]: somebody reads value v in state t.
            e[v,s,t] in [0,1]: v is made in state s and converted to t.
Objective   sum_o,k w(cost[o,k]) y[o,k] + sum_v,s,t w(price[v,s,t]) e[v,s,t]          (`_objective`)
Constraints sum_k y[o,k] = 1                                                            (`_one_option`)
            z[v,t] >= sum of y[j,k] over the options of j that read v in t, for every j (`_needs`)
            sum_s e[v,s,t] = z[v,t];  e[v,s,t] <= sum of y[o,k] that leave v in s       (`_conversions`)

A conversion that several readers share is one variable, so it counts once, as the rewriter performs it. e is bounded by
the made state instead of being tied to products of binaries, which keeps the linear relaxation tight (it is the
facility-location form); with costs that are not negative, z and e take integral values of themselves.
"""

from __future__ import annotations

from collections import defaultdict

import pulp

from shardplan.planner.search.problem import SegmentProblem, Value, Weights
from shardplan.planner.search.solver import Budget, solve

_MILLI = 1e3
"""Seconds are scaled to milliseconds: solvers work best near 1."""


def solve_segment(problem: SegmentProblem, weights: Weights, budget: Budget) -> tuple[int, ...] | None:
    """The cheapest choice of options, or None where there is none."""
    if all(len(options) == 1 for options in problem.ops):
        return (0,) * len(problem.ops)
    return _Segment(problem, weights).solve(budget)


class _Segment:
    def __init__(self, problem: SegmentProblem, weights: Weights) -> None:
        self.problem = problem
        self.weights = weights
        self.model = pulp.LpProblem("segment", pulp.LpMinimize)
        self.y = {
            (o, k): pulp.LpVariable(f"y_{o}_{k}", cat=pulp.LpBinary)
            for o, options in enumerate(problem.ops)
            for k in range(len(options))
        }
        self.terms: list[pulp.LpAffineExpression] = []
        self.readers: dict[tuple[Value, int], dict[int, list[pulp.LpVariable]]] = defaultdict(lambda: defaultdict(list))
        for o, options in enumerate(problem.ops):
            for k, option in enumerate(options):
                for value, state in dict.fromkeys(option.needs):
                    self.readers[value, state][o].append(self.y[o, k])

    def solve(self, budget: Budget) -> tuple[int, ...] | None:
        self._one_option()
        self._conversions()
        self._objective()
        solved = solve(self.model, budget, gap=0.0)
        if solved is None:
            return None
        return tuple(
            max(range(len(options)), key=lambda k, o=o: solved.values[f"y_{o}_{k}"])
            for o, options in enumerate(self.problem.ops)
        )

    def _one_option(self) -> None:
        for o, options in enumerate(self.problem.ops):
            self.model += pulp.lpSum(self.y[o, k] for k in range(len(options))) == 1

    def _made(self, value: Value) -> dict[int, list[pulp.LpVariable]]:
        found: dict[int, list[pulp.LpVariable]] = defaultdict(list)
        o, r = value
        for k, option in enumerate(self.problem.ops[o]):
            found[option.states[r]].append(self.y[o, k])
        return found

    def _conversions(self) -> None:
        for (value, target), readers in sorted(self.readers.items()):
            made = self._made(value)
            if set(made) == {target}:
                continue  # always made as it is read
            label = f"{value[0]}_{value[1]}_{target}"
            z = pulp.LpVariable(f"z_{label}", 0, 1)
            self._needs(z, readers)
            incoming = []
            for source, makers in sorted(made.items()):
                price = self.problem.convert(value, source, target)
                if price is None:
                    continue
                e = pulp.LpVariable(f"e_{label}_{source}", 0, 1)
                self.model += e <= pulp.lpSum(makers)
                incoming.append(e)
                cost = self.weights.of(price) * _MILLI
                if cost:
                    self.terms.append(cost * e)
            self.model += pulp.lpSum(incoming) == z

    def _needs(self, z: pulp.LpVariable, readers: dict[int, list[pulp.LpVariable]]) -> None:
        for options in readers.values():
            self.model += z >= pulp.lpSum(options)

    def _objective(self) -> None:
        own = [self.weights.of(self.problem.ops[o][k].price) * _MILLI * y for (o, k), y in self.y.items()]
        self.model.setObjective(pulp.lpSum([*own, *self.terms]))
