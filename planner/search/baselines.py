"""Hand-made arrangements, scored in the same model, so that a plan is never worse than what people would try first."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from shardplan.errors import SolverTimeout
from shardplan.planner.search.candidate import Candidate
from shardplan.planner.search.case import Case
from shardplan.planner.search.stage_ilp import StageChoice, memory, objective
from shardplan.planner.search.stages import solve_stages

if TYPE_CHECKING:
    from shardplan.planner.search.search import Search

NAMES = ("single device", "data parallel", "fully sharded", "tensor parallel", "even pipeline")
_STORED = {"data parallel": 0, "fully sharded": 3}
"""Level at which the parameters of a baseline are stored (`planner.storage`)."""


_LEAN = 1.0
"""Seconds that a byte is worth where the fewest are wanted."""


def hand_made(search: Search, found: list[Candidate]) -> dict[str, Candidate]:
    """Hand-made arrangements in the same model; what the constraints exclude or memory forbids is absent."""
    total = len(search.cluster)
    wanted = {
        "single device": lambda c: c.devices == 1,
        "data parallel": lambda c: total > 1 and c.dp == total,
        "fully sharded": lambda c: total > 1 and c.dp == total,
        "tensor parallel": lambda c: total > 1 and c.tp == total,
    }
    baselines = {}
    for name, fits_name in wanted.items():
        level = _STORED.get(name)
        if level is not None and not _may_store(search, level):
            continue
        mine = [c for c in found if fits_name(c.case)] if level is None else []
        if not mine:
            mine = _solved_late(search, [case for case in search.cases() if fits_name(case)], level)
        if mine:
            baselines[name] = replace(mine[0], label=name)
    pipelines = [c for c in found if c.case.stages == total > 1]
    if not pipelines and total > 1:
        pipelines = _solved_late(search, [case for case in search.cases() if case.stages == total])
    if pipelines:
        even = _even(search, pipelines[0])
        if even is not None:
            baselines["even pipeline"] = even
    return baselines


def _may_store(search: Search, level: int) -> bool:
    """Whether the user leaves it open to store all parameters at this level."""
    given = {one for levels in search.decided.levels.values() for one in levels}
    return search.options.zero in ("auto", level) and given <= {level}


def _solved_late(search: Search, cases: list[Case], level: int | None = None) -> list[Candidate]:
    """Candidates of cases that the search pruned, for comparison; the first that fits. level: of all parameters."""
    work = search.work
    if level is not None:
        work = copy(work)
        work.options, work.makers = replace(work.options, zero=level), {}
    ordered = sorted(cases, key=lambda c: abs(c.microbatches - 2 * c.stages if c.stages > 1 else c.microbatches))
    for case in ordered:
        if search.exact(case) is not None or search.budget.left() < 1:
            continue
        try:
            once = work.once(case)
            for prepared in work.prepare(case, [once, replace(once, nbytes=_LEAN)]):
                columns, segments, forced = prepared.columns, prepared.segments, prepared.forced
                problem = work.problem(prepared, search.schedule)
                choice = solve_stages(problem, search.budget)
                if choice is not None:
                    return [Candidate(case, columns, segments, problem, choice, search.schedule, forced)]
        except SolverTimeout:
            return []
    return []


def _even(search: Search, candidate: Candidate) -> Candidate | None:
    """The same pipeline with stages of as equal a number of segments as can be."""
    count, stages = len(candidate.segments), candidate.case.stages
    bounds = tuple(count * s // stages for s in range(stages))
    columns = candidate.choice.columns
    home = [sum(i >= first for first in bounds) - 1 for i in range(count)]
    moved = any(home[i] != stage for i, stage in search.decided.pinned.items())
    if moved or any(len({home[i] for i in group}) > 1 for group in search.decided.together):
        return None
    needed = memory(candidate.problem, bounds, columns)
    if any(n > limit for n, limit in zip(needed, candidate.problem.limits, strict=True)):
        return None
    value = objective(candidate.problem, bounds, columns)
    choice = StageChoice(bounds, columns, value, value, True)
    return replace(candidate, choice=choice, label="even pipeline")


def why_missing(search: Search, name: str) -> str:
    """Why a baseline is not among the alternatives."""
    total = len(search.cluster)
    if total == 1 and name != "single device":
        return "there is one device"
    shape = {
        "single device": Case(1, 1, 1, 1),
        "data parallel": Case(1, total, 1, 1),
        "fully sharded": Case(1, total, 1, 1),
        "tensor parallel": Case(1, 1, total, 1),
        "even pipeline": Case(total, 1, 1, 1),
    }[name]
    if not search.decided.allows(shape, search.trace, search.cluster):
        return "excluded by the constraints"
    if name in _STORED and not _may_store(search, _STORED[name]):
        return "excluded by the constraints"
    if name in _STORED and search.trace.batch_size % total:
        return f"a batch of {search.trace.batch_size} does not divide over {total} replicas"
    if name == "tensor parallel" and total > search.most_tensor:
        return f"tensor parallelism is searched up to {search.most_tensor} devices"
    if name == "even pipeline" and total > len(search.trace.segments):
        return f"{len(search.trace.segments)} segments are too few for {total} stages"
    reason = search.exact(shape)
    return f"not exact with {reason}" if reason else "does not fit into memory"
