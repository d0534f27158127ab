"""Why each thing was decided as it was: the best plan that decides it otherwise.

Of the outer search (stages, replicas, tensor parallelism, microbatches, devices) the answer is proven: for every case
that was not solved the search holds a lower bound (`Ledger`). Inside the plan's own case, where everything else stays
as it is, see `planner.search.otherwise`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardplan.planner.plan import Decision
from shardplan.planner.search.case import Case
from shardplan.planner.search.otherwise import Piece, otherwise

if TYPE_CHECKING:
    from shardplan.planner.search.finish import Finished
    from shardplan.planner.search.search import Search

TOPICS: tuple[tuple[str, Callable[[Case], int]], ...] = (
    ("pipeline stages", lambda case: case.stages),
    ("replicas", lambda case: case.dp),
    ("tensor parallelism", lambda case: case.tp),
    ("microbatches", lambda case: case.microbatches),
    ("devices in use", lambda case: case.devices),
)


class Ledger:
    """What is known of every case: lower bounds of its parts (before it is bounded well it is one part), none where it
    does not fit."""

    def __init__(self) -> None:
        self._bounds: dict[Case, dict[str, float]] = {}

    def saw(self, case: Case, part: str, bound: float) -> None:
        self._bounds.setdefault(case, {})[part] = bound

    def drop(self, case: Case, part: str) -> None:
        """The part is made of others, or does not fit."""
        self._bounds.setdefault(case, {}).pop(part, None)

    def bounds(self) -> dict[Case, float]:
        """Case -> seconds that no plan of it undercuts; inf: it does not fit."""
        return {case: min(parts.values(), default=math.inf) for case, parts in self._bounds.items()}


@dataclass(frozen=True, slots=True)
class Other:
    """Another plan, or what is known of one. values: topic -> what it decides; seconds inf: does not fit. proven: the
    seconds are a lower bound."""

    values: dict[str, str]
    seconds: float
    proven: bool
    name: str
    why: str = ""


def decisions(search: Search, best: Finished, found: Sequence[Finished], ledger: Ledger) -> tuple[Decision, ...]:
    """One for everything that the plan decides and that could have been otherwise."""
    solved: dict[Case, Finished] = {}
    for each in sorted(found, key=lambda f: f.seconds):
        solved.setdefault(each.candidate.case, each)
    around = search.costs.overheads(0).step_seconds
    scale = best.seconds / best.exposed_seconds if best.exposed_seconds else 1.0
    others = [
        Other(_values(case), made.seconds, False, str(case), made.compared(search, best))
        for case, made in solved.items()
        if case != best.candidate.case
    ]
    others += [
        Other(_values(case), (bound + around) * scale, True, str(case))
        for case, bound in ledger.bounds().items()
        if case not in solved and case != best.candidate.case
    ]
    piece = Piece(search, best.candidate, tuple(enumerate(best.bounds)))
    return (
        *nearest(_values(best.candidate.case), others),
        *otherwise([piece], best.detailed(search), best.links, best.instructions),
    )


def _values(case: Case) -> dict[str, str]:
    return {topic: str(value(case)) for topic, value in TOPICS}


def nearest(mine: dict[str, str], others: Sequence[Other]) -> Iterable[Decision]:
    """Per topic the fastest of the others that decides it otherwise."""
    for topic, chosen in mine.items():
        rivals = [other for other in others if other.values[topic] != chosen]
        if not rivals:
            continue
        best = min(rivals, key=lambda other: (other.seconds, other.name))
        if math.isinf(best.seconds):
            yield Decision(topic, chosen, "any other", None, False, why="does not fit into memory")
        else:
            value = best.values[topic]
            yield Decision(topic, chosen, value, best.seconds, best.proven, name=best.name, why=best.why)
