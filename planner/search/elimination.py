"""The op-level problem by min-plus elimination: exact, and a hundred times faster than an integer program.

The objective is a sum of factors: the price of every op, a function of its option; and for every value the price of
converting it to all states in which it is read, a function of the options of its maker and its readers. A variable
(an op's option) is eliminated by adding up the factors that it is in and keeping the minimum over it, a factor of the
others:

    min over x of  f1(x, y) + f2(x, z)  =  g(y, z)

in the order that keeps the tables smallest. What enters and what leaves is not eliminated, so one pass gives the whole
matrix over the layouts at both ends; all weights go through the tables side by side. Backwards, the minima say the
options. Options of an op that leave and read the same states are one to all the others: of such a class only the
cheapest counts, for every weighting another, so a class takes one place in the tables. Graphs of models are nearly
trees of small fan-out, so tables stay small; where one would not, `eliminate` gives None and `segment_ilp` has to do
it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardplan.planner.search.problem import Option, SegmentProblem, Value, Weights

_LARGEST = 1 << 22
"""Entries of a table, one weighting."""
_TOGETHER = 1 << 24
"""Entries of a table, all weightings that go through it side by side."""
_WIDE = 1 << 12
"""Entries of the table of a value and its readers, above which readers are joined two by two."""
Numbers = np.ndarray
Scope = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Of one weighting: objective[enters, leaves] (inf: impossible), and the options of every op."""

    objective: Numbers
    options: dict[tuple[int, int], tuple[int, ...]]


def eliminate(problem: SegmentProblem, weights: Sequence[Weights]) -> list[Matrix] | None:
    """The optimum between all layouts at the ends, for every weighting. None: the tables would be too large."""
    try:
        return _Elimination(problem, weights).run()
    except _TooMany:
        half = len(weights) // 2
        first = eliminate(problem, weights[:half])
        rest = eliminate(problem, weights[half:])
        return [*first, *rest] if first is not None and rest is not None else None
    except _TooLarge:
        return None


class _TooLarge(Exception):
    pass


class _TooMany(_TooLarge):
    """Weightings at once."""


class _Elimination:
    def __init__(self, problem: SegmentProblem, weights: Sequence[Weights]) -> None:
        self.problem = problem
        self.weights = np.array([w.vector() for w in weights])  # [weighting, field of a price]
        self.classes = [
            _classes(options) if op != problem.enter else [[k] for k in range(len(options))]
            for op, options in enumerate(problem.ops)
        ]
        self.ops = [
            [options[c[0]] for c in classes] for options, classes in zip(problem.ops, self.classes, strict=True)
        ]
        self.domains = [len(classes) for classes in self.classes]
        self.cheapest: list[list[Numbers]] = []  # per op and class, [weighting]: the option
        self.factors: list[tuple[Scope, Numbers]] = []
        self.leave = self._variable(problem.ends[1])
        for op in range(len(problem.ops)):
            self._add((op,), self._own(op))
        for value, readers in self._readers().items():
            self._value(value, readers)
        if problem.leave is not None:
            (op, result), states = problem.leave
            made = np.array([option.states[result] for option in self.ops[op]])
            table = np.where(made[:, None] == np.array(states)[None, :], 0.0, math.inf)
            self._add((op, self.leave), np.broadcast_to(table, (len(self.weights), *table.shape)))

    # -- factors -------------------------------------------------------------------------------------------------------

    def _variable(self, size: int) -> int:
        self.domains.append(size)
        return len(self.domains) - 1

    def _own(self, op: int) -> Numbers:
        """[weighting, class]: price of the cheapest option."""
        prices = self._weighed(np.array([option.price.vector() for option in self.problem.ops[op]]))
        held = [prices[:, members] for members in self.classes[op]]
        self.cheapest.append([np.array(m)[p.argmin(1)] for m, p in zip(self.classes[op], held, strict=True)])
        return np.stack([p.min(1) for p in held], 1)

    def _weighed(self, prices: Numbers) -> Numbers:
        """[..., field] -> [weighting, ...]."""
        return np.moveaxis(prices @ self.weights.T, -1, 0)

    def _add(self, scope: Scope, table: Numbers) -> None:
        """A factor; variables with one option are taken out of it."""
        index = tuple(slice(None) if self.domains[v] > 1 or self._kept(v) else 0 for v in scope)
        scope = tuple(v for v in scope if self.domains[v] > 1 or self._kept(v))
        self.factors.append((scope, table[(slice(None), *index)]))

    def _kept(self, variable: int) -> bool:
        return variable in (self.leave, self.problem.enter)

    def _readers(self) -> dict[Value, dict[int, list[tuple[int, ...]]]]:
        """Value -> reading op -> per class of options, the states in which it reads the value."""
        found: dict[Value, dict[int, list[tuple[int, ...]]]] = {}
        for op, options in enumerate(self.ops):
            for k, option in enumerate(options):
                for value, state in option.needs:
                    reads = found.setdefault(value, {}).setdefault(op, [()] * len(options))
                    if state not in reads[k]:
                        reads[k] = (*reads[k], state)
        return found

    def _value(self, value: Value, readers: dict[int, list[tuple[int, ...]]]) -> None:
        """Price of the conversions of one value: each state that somebody reads it in is made once."""
        op, result = value
        made = [option.states[result] for option in self.ops[op]]
        sources = sorted(set(made))
        targets = sorted({state for reads in readers.values() for states in reads for state in states})
        if len(sources) == len(targets) == 1 and sources == targets:
            return
        masks = {
            reader: np.array([sum(1 << targets.index(state) for state in states) for states in reads])
            for reader, reads in readers.items()
        }
        scope, mask = self._joined(op, masks, len(targets))
        table = self._conversion_table(value, sources, targets)  # [weighting, source, set of targets]
        source = np.array([sources.index(state) for state in made])
        index = source.reshape(-1, *[1] * mask.ndim)
        self._add((op, *scope), table[:, index, mask[None]])

    def _conversion_table(self, value: Value, sources: list[int], targets: list[int]) -> Numbers:
        single = np.full((len(self.weights), len(sources), len(targets)), math.inf)
        for i, s in enumerate(sources):
            for j, t in enumerate(targets):
                price = self.problem.convert(value, s, t)
                if price is not None:
                    single[:, i, j] = self.weights @ np.array(price.vector())
        table = np.zeros((len(self.weights), len(sources), 1 << len(targets)))
        for j in range(len(targets)):
            table[:, :, 1 << j : 2 << j] = table[:, :, : 1 << j] + single[:, :, j : j + 1]
        return table

    def _joined(self, op: int, masks: dict[int, Numbers], targets: int) -> tuple[Scope, Numbers]:
        """Variables and the set of states (a bit mask) that their options ask for together.

        Where a table over all readers would be large, two of them are replaced by a variable for what both ask for.
        """
        if targets > 10:
            raise _TooLarge
        parts = list(masks.items())
        while len(parts) > 1 and self.domains[op] * math.prod(len(mask) for _, mask in parts) > _WIDE:
            parts.sort(key=lambda part: len(part[1]))
            (a, first), (b, second), *rest = parts
            both = first[:, None] | second[None, :]
            unions = np.unique(both)
            joined = self._variable(len(unions))
            table = np.where(both[:, :, None] == unions[None, None, :], 0.0, math.inf)
            self._add((a, b, joined), np.broadcast_to(table, (len(self.weights), *table.shape)))
            parts = [*rest, (joined, unions)]
        mask = np.zeros((1,) * len(parts), dtype=np.int64)
        for axis, (_, part) in enumerate(parts):
            mask = mask | part.reshape([-1 if i == axis else 1 for i in range(len(parts))])
        return tuple(variable for variable, _ in parts), mask

    # -- elimination ---------------------------------------------------------------------------------------------------

    def run(self) -> list[Matrix]:
        done: list[tuple[int, Scope, Numbers]] = []
        of: dict[int, list[int]] = {}
        factors: dict[int, tuple[Scope, Numbers]] = dict(enumerate(self.factors))
        for number, (scope, _) in factors.items():
            for variable in scope:
                of.setdefault(variable, []).append(number)
        left = {v for v in of if not self._kept(v)}
        fresh = len(factors)
        neighbours = {v: {w for n in of[v] for w in factors[n][0]} - {v} for v in of}
        while left:
            variable = min(left, key=lambda v: (math.prod(self.domains[w] for w in neighbours[v]), v))
            scope = tuple(sorted(neighbours[variable]))
            entries = math.prod(self.domains[w] for w in scope) * self.domains[variable]
            if entries > _LARGEST:
                raise _TooLarge
            if entries * len(self.weights) > _TOGETHER and len(self.weights) > 1:
                raise _TooMany
            total = self._sum([factors.pop(n) for n in of.pop(variable)], (variable, *scope))
            # The first of equal minima: the same input gives the same choice.
            done.append((variable, scope, total.argmin(1)))
            factors[fresh] = scope, total.min(1)
            for other in scope:
                of[other] = [n for n in of[other] if n in factors] + [fresh]
                neighbours[other] = (neighbours[other] | set(scope)) - {variable, other}
            left.discard(variable)
            fresh += 1
        ends = tuple(v for v in (self.problem.enter, self.leave) if v >= 0)
        objective = self._sum(list(factors.values()), ends).reshape(len(self.weights), *self.problem.ends)
        return [Matrix(objective[w], self._options(w, objective[w], done)) for w in range(len(self.weights))]

    def _sum(self, parts: list[tuple[Scope, Numbers]], scope: Scope) -> Numbers:
        total = np.zeros((len(self.weights), *[self.domains[v] for v in scope]))
        for mine, table in parts:
            order = sorted(range(len(mine)), key=lambda axis: scope.index(mine[axis]))
            table = table.transpose(0, *[axis + 1 for axis in order])
            shape = [self.domains[v] if v in mine else 1 for v in scope]
            total += table.reshape(len(self.weights), *shape)
        return total

    def _options(
        self, weighting: int, objective: Numbers, done: list[tuple[int, Scope, Numbers]]
    ) -> dict[tuple[int, int], tuple[int, ...]]:
        found = {}
        for enters, leaves in np.argwhere(np.isfinite(objective)):
            chosen = dict.fromkeys(range(len(self.domains)), 0)
            chosen[self.leave] = int(leaves)
            if self.problem.enter >= 0:
                chosen[self.problem.enter] = int(enters)
            for variable, scope, best in reversed(done):
                chosen[variable] = int(best[(weighting, *[chosen[v] for v in scope])])
            found[int(enters), int(leaves)] = tuple(
                int(self.cheapest[op][chosen[op]][weighting]) for op in range(len(self.problem.ops))
            )
        return found


def _classes(options: Sequence[Option]) -> list[list[int]]:
    """Options that leave and read the same states, in the order of their first."""
    found: dict[tuple[object, ...], list[int]] = {}
    for k, option in enumerate(options):
        found.setdefault((option.states, option.needs), []).append(k)
    return list(found.values())
