"""Which mesh axis runs through neighbouring devices.

The usual order is tensor parallelism in the middle of a node, replicas around it, stages outermost: tensor parallelism
sends most and stages least. Where activations are large and parameters are few, it is the other way round with replicas
and stages: a pipeline inside a node, replicas across nodes. Of a solved case this order can save at most what its
messages between stages take, as sums over replicas only become slower; so that is simulated, with messages at the other
order's prices and all else unchanged, and where the result would be the fastest the other order becomes a case of its
own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from shardplan.planner.search.case import USUAL, Case
from shardplan.planner.search.finish import Finished, links_of, simulated

if TYPE_CHECKING:
    from shardplan.planner.search.search import Search

_WORTH = 1e-3
"""Share of a step below which another order is not looked at."""


def placed_otherwise(search: Search, done: Finished, best: float) -> list[Case]:
    """The case in other orders that may be faster than `best` seconds."""
    case = done.candidate.case
    if case.order != USUAL or case.stages == 1 or case.dp == 1:
        return []
    other = replace(case, order=("tp", "pp", "dp"))
    if not search.decided.allows(other, search.trace, search.cluster):
        return []
    links = links_of(search, replace(done.candidate, case=other), done.chosen, done.split)
    saved = sum(a.seconds + a.grad_seconds - b.seconds - b.grad_seconds for a, b in zip(done.links, links, strict=True))
    if saved <= 0:
        return []
    seconds = simulated(done.instructions, done.stages, links)[1]
    return [other] if seconds < best * (1 - _WORTH) else []
