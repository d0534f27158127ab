"""The plan that people write down: tensor parallelism inside a node, as few equal stages as fit, replicas of the rest.

Narayanan et al. 2021 ("Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", section 5.2,
takeaways 1 to 3): tensor parallelism up to the devices of a node, pipeline stages across nodes until the model fits,
data parallelism for the rest, microbatches of one sample, stages with the same number of blocks. Every segment is then
split as well as this model knows, which is at least what the hand-written library does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from shardplan.errors import SolverTimeout
from shardplan.planner.search.candidate import Candidate
from shardplan.planner.search.case import Case
from shardplan.planner.search.stages import solve_stages

if TYPE_CHECKING:
    from shardplan.planner.search.search import Search

NAME = "even 3-D"
_TRIED = 8


def even_stages(search: Search) -> Candidate | None:
    """The first such arrangement that fits, or None."""
    for case in _cases(search):
        if search.budget.left() < 1:
            return None
        weights = [search.work.once(case), *search.work.memory_weights(case)]
        for prepared in search.work.prepare(case, weights):
            problem = search.work.problem(prepared, search.schedule)
            count = len(prepared.segments)
            home = [max(s for s in range(case.stages) if count * s // case.stages <= i) for i in range(count)]
            if any(home[i] != stage for i, stage in problem.pinned):
                continue
            try:
                choice = solve_stages(replace(problem, pinned=tuple(enumerate(home))), search.budget)
            except SolverTimeout:
                return None
            if choice is not None:
                columns, segments, forced = prepared.columns, prepared.segments, prepared.forced
                return Candidate(case, columns, segments, problem, choice, search.schedule, forced, NAME)
    return None


def _cases(search: Search) -> list[Case]:
    """Most tensor parallelism inside a node, then as few stages as can be, then as many microbatches."""
    total = len(search.cluster)
    nodes: dict[int, int] = {}
    for device in search.cluster.devices:
        nodes[device.node] = nodes.get(device.node, 0) + 1
    inside = [case for case in search.cases() if case.devices == total and case.tp <= min(nodes.values())]
    most = max((case.tp for case in inside), default=0)
    mine = [case for case in inside if case.tp == most and search.exact(case) is None]
    fewest: dict[int, Case] = {}
    for case in mine:
        kept = fewest.get(case.stages)
        if kept is None or case.microbatches > kept.microbatches:
            fewest[case.stages] = case
    return [fewest[stages] for stages in sorted(fewest) if search.can_hold(fewest[stages])][:_TRIED]
