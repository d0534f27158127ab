"""Hand-made arrangements of unequal devices: the fastest single device, all devices as replicas or as one tensor group,
and a pipeline of all in their order with as many segments each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from shardplan.planner.search.mixed_problem import MixedProblem, MixedStage, fits, objective
from shardplan.planner.search.mixed_runs import RunCells

if TYPE_CHECKING:
    from shardplan.planner.search.mixed import MixedSearch
    from shardplan.planner.search.mixed_candidate import MixedCandidate
    from shardplan.planner.search.mixed_groups import Group


def hand_made(search: MixedSearch, found: list[MixedCandidate]) -> dict[str, MixedCandidate]:
    """By name, with the ways of the candidates; what the constraints exclude or memory forbids is absent."""
    total = len(search.cluster)
    best: dict[str, MixedCandidate] = {}
    for candidate in found:
        for name, ways in _wanted(candidate.every, total):
            for way in ways:
                made = _alone(candidate.problem, way)
                if made is None:
                    continue
                value = objective(candidate.problem, [made])
                if name not in best or value < best[name].objective:
                    group = candidate.every[way]
                    best[name] = replace(
                        candidate,
                        stages=(made,),
                        ranks=tuple(search.ranks([group])),
                        groups=[group],
                        columns=[candidate.makers[way]],
                        segments=[candidate.made[way]],
                        objective=value,
                        label=name,
                    )
    return best


def _wanted(groups: list[Group], total: int) -> Iterator[tuple[str, list[int]]]:
    def ways(dp: int, tp: int) -> list[int]:
        return [i for i, group in enumerate(groups) if (group.dp, group.tp) == (dp, tp)]

    yield "single device", ways(1, 1)
    if total > 1:
        yield "data parallel", ways(total, 1)
        yield "tensor parallel", ways(1, total)


def _alone(problem: MixedProblem, way: int) -> MixedStage | None:
    """The whole model on one way, by its fastest columns that fit."""
    cells = RunCells(problem, problem.ways[way])
    key = cells.flights.index(problem.flight(1)), 0, 0, 0, problem.count
    cells.settle(key)
    if not math.isfinite(cells.real[key[0]][key[1:]]):
        return None
    made = MixedStage(way, 0, problem.count, cells.columns(key))
    return made if fits(problem, [made]) else None
