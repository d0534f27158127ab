"""Cuts between stages, moved by what the simulator says.

The stage program counts the slowest stage m - 1 times and the largest once-a-step seconds u of any stage in full:

    V = sum_s t_s + (m - 1) max_s t_s + max_s u_s + messages.

A later stage is done with its last backward sooner than an earlier one, and its u hides in that time; messages hide
behind compute. So among cuts that V holds for much alike the simulator may know a faster one. `moved` tries every cut
of a solved case one segment further either way, the columns as they are, and goes on from the best as long as the
simulated step gets shorter and everything fits. Bounds are untouched: they hold for every choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from shardplan.planner.search.finish import Finished, finish
from shardplan.planner.search.stage_ilp import StageProblem

if TYPE_CHECKING:
    from shardplan.planner.search.search import Search

_TRIED = 24
"""Times that one case is worked out again; each takes as long as finishing it did."""


def moved(search: Search, found: Finished) -> Finished:
    """The same case with the best cuts that were found, itself among them."""
    candidate, tried = found.candidate, 0
    if candidate.chunks > 1:
        return found
    best, seen = found, {candidate.choice.bounds}
    while True:
        start = best
        for bounds in _beside(candidate.problem, start.candidate.choice.bounds):
            if bounds in seen or tried >= _TRIED:
                continue
            seen.add(bounds)
            tried += 1
            choice = replace(candidate.choice, bounds=bounds, optimal=False)
            done = finish(search, replace(candidate, choice=choice))
            if done.fits and done.seconds < best.seconds:
                best = done
        if best is start:
            return best


def _beside(problem: StageProblem, bounds: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Cuts with one moved by one segment, that leave every segment where it has to be."""
    count = len(problem.columns)
    for stage in range(1, len(bounds)):
        for step in (-1, 1):
            cut = bounds[stage] + step
            if not bounds[stage - 1] < cut < (bounds[stage + 1] if stage + 1 < len(bounds) else count):
                continue
            other = (*bounds[:stage], cut, *bounds[stage + 1 :])
            home = [sum(first <= i for first in other) - 1 for i in range(count)]
            if any(home[i] != at for i, at in problem.pinned):
                continue
            if all(len({home[i] for i in group}) == 1 for group in problem.together):
                yield other
