"""The op-level integer program: how the ops of a segment are split over one mesh axis.

Sets, data  as in `planner.search.problem`.
Variables   y[o,k] in {0,1}: op o runs by option k.
            f[j,v,s,t] in [0,1]: reader j reads value v, made in state s, in state t.
            e[v,s,t] in [0,1]: v is made in state s and converted to t for somebody.
Objective   sum_o,k w(cost[o,k]) y[o,k] + sum_v,s,t w(price[v,s,t]) e[v,s,t]          (`_objective`)
Constraints sum_k y[o,k] = 1                                                            (`_one_option`)
            sum_t f[j,v,s,t] = sum of y[o,k] that leave v in s, for every reader j      (`_conversions`)
            sum_s f[j,v,s,t] = sum of y[j,k] that read v in t
            e[v,s,t] >= f[j,v,s,t]

A conversion that several readers share is one variable e, so it counts once, as the rewriter performs it. The flows f
are marginals of both choices: on a graph without shared values the relaxation is integral, where a single product or
big-M per edge is not.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import pulp

from shardplan.planner.search.problem import SegmentProblem, Value, Weights
from shardplan.planner.search.solver import Budget, solve

_LIMIT_SECONDS = 4.0
_MILLI = 1e3
"""Seconds are scaled to milliseconds: solvers work best near 1."""


@dataclass(frozen=True, slots=True)
class SegmentChoice:
    """options: one per op. proven: a lower bound on the objective divided by what was found (1 where optimal)."""

    options: tuple[int, ...]
    proven: float = 1.0


def solve_segment(problem: SegmentProblem, weights: Weights, budget: Budget) -> SegmentChoice | None:
    """The cheapest choice of options, or None where there is none."""
    if all(len(options) == 1 for options in problem.ops):
        return SegmentChoice((0,) * len(problem.ops))
    return _Segment(problem, weights).solve(budget)


class _Segment:
    def __init__(self, problem: SegmentProblem, weights: Weights) -> None:
        self.problem = problem
        self.weights = weights
        self.model = pulp.LpProblem("segment", pulp.LpMinimize)
        self.y = {
            (o, k): self.model.add_variable(f"y_{o}_{k}", cat=pulp.LpBinary)
            for o, options in enumerate(problem.ops)
            for k in range(len(options))
        }
        self.terms: list[pulp.LpAffineExpression] = []
        # value -> reading op -> state -> its options that read the value in that state
        self.readers: dict[Value, dict[int, dict[int, list[pulp.LpVariable]]]] = {}
        for o, options in enumerate(problem.ops):
            for k, option in enumerate(options):
                for value, state in dict.fromkeys(option.needs):
                    reading = self.readers.setdefault(value, {}).setdefault(o, {})
                    reading.setdefault(state, []).append(self.y[o, k])

    def solve(self, budget: Budget) -> SegmentChoice | None:
        self._one_option()
        self._conversions()
        self._objective()
        solved = solve(self.model, budget, gap=budget.gap, limit_seconds=_LIMIT_SECONDS)
        if solved is None:
            return None
        values = solved.values
        options = tuple(
            max(range(len(options)), key=lambda k, o=o: values[f"y_{o}_{k}"])
            for o, options in enumerate(self.problem.ops)
        )
        return SegmentChoice(options, max(solved.bound, 0.0) / solved.objective if solved.objective > 0 else 1.0)

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
        for value, readers in sorted(self.readers.items()):
            made = self._made(value)
            shared: dict[tuple[int, int], pulp.LpVariable] = {}
            several = len(readers) > 1
            for j, reading in sorted(readers.items()):
                if len(made) == 1 and set(made) == set(reading):
                    continue  # always made as it is read
                outgoing: dict[int, list[pulp.LpVariable]] = {s: [] for s in made}
                incoming: dict[int, list[pulp.LpVariable]] = {t: [] for t in reading}
                for source in sorted(made):
                    for target in sorted(reading):
                        price = self.problem.convert(value, source, target)
                        if price is None:
                            continue
                        flow = self.model.add_variable(f"f_{j}_{value[0]}_{value[1]}_{source}_{target}", 0, 1)
                        outgoing[source].append(flow)
                        incoming[target].append(flow)
                        cost = self.weights.of(price) * _MILLI
                        if not cost:
                            continue
                        if not several:
                            self.terms.append(cost * flow)
                            continue
                        if (source, target) not in shared:
                            name = f"e_{value[0]}_{value[1]}_{source}_{target}"
                            shared[source, target] = self.model.add_variable(name, 0, 1)
                            self.terms.append(cost * shared[source, target])
                        self.model += shared[source, target] >= flow
                for source, makers in made.items():
                    self.model += pulp.lpSum(outgoing[source]) == pulp.lpSum(makers)
                for target, options in reading.items():
                    self.model += pulp.lpSum(incoming[target]) == pulp.lpSum(options)

    def _objective(self) -> None:
        own = [self.weights.of(self.problem.ops[o][k].price) * _MILLI * y for (o, k), y in self.y.items()]
        self.model.setObjective(pulp.lpSum([*own, *self.terms]))
