"""Random legal plans: meshes, stage cuts, schedules, recomputed segments and a strategy for every op."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise
from math import lcm

from shardplan.errors import BatchNotDivisible, ConflictingConstraints, NoFeasiblePlan
from shardplan.planner.cluster import Cluster
from shardplan.planner.constraints import degrees
from shardplan.planner.cuts import possible_cuts
from shardplan.planner.placement import Mesh
from shardplan.planner.plan import Plan
from shardplan.planner.propagate import follow_batch
from shardplan.planner.search import SolveOptions, solve
from shardplan.planner.trace import Segment, Trace
from tests.fuzz.builder import Draws
from tests.plans import random_plan
from tests.prices import SimplePrices

MESHES = (
    (1, 2, 1), (2, 1, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2), (2, 1, 2), (1, 4, 1), (1, 3, 1), (4, 1, 1), (2, 2, 2),
    (1, 2, 3), (1, 1, 4), (3, 1, 1), (2, 4, 1), (1, 1, 3),
)  # fmt: skip
UNEQUAL = (
    (), (), ((1, 1), (2, 1)), ((2, 1), (1, 1)), ((1, 2), (1, 1)), ((1, 1), (1, 2)), ((2, 1), (1, 2)), ((1, 2), (2, 1)),
    ((2, 2), (1, 2)), ((1, 2), (4, 1)), ((1, 1), (3, 1)), ((2, 1), (1, 1), (1, 2)), ((1, 1), (2, 2), (1, 1)),
    ((1, 3), (2, 1)), ((1, 2), (1, 4)), ((4, 1), (2, 1)),
)  # fmt: skip
SCHEDULES = ("1f1b", "gpipe", "zb", "interleaved", "zbv")


@dataclass(frozen=True, slots=True)
class Choice:
    """Degrees of a plan and the seed of everything else that is drawn. meshes: (dp, tp) of every stage, where they
    differ."""

    dp: int
    tp: int
    pp: int
    microbatches: int
    schedule: str
    split: float
    recompute: int
    outputs: bool
    seed: int
    searched: bool = False
    meshes: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        degrees = "|".join(f"{dp}x{tp}" for dp, tp in self.meshes) or f"dp{self.dp} tp{self.tp} pp{self.pp}"
        return (
            f"{degrees} mb{self.microbatches} {self.schedule} split {self.split} "
            f"recompute {self.recompute} seed {self.seed}{' searched' if self.searched else ''}"
        )


def draw_choice(data: bytes) -> Choice:
    draws = Draws(data)
    dp, tp, pp = draws.one(MESHES)
    return Choice(
        dp, tp, pp, draws.one((1, 2, 1, 4, 3)), draws.one(SCHEDULES), draws.one((0.9, 0.5, 1.0, 0.2)),
        draws.one((0, 0, 1, 2)), draws.chance(3), draws.below(256),
        draws.chance(24), draws.one(UNEQUAL),
    )  # fmt: skip


def recut(trace: Trace, choice: Choice) -> Trace:
    """The trace with its segments cut at random, at more places than the planner would, where it has too few stages."""
    if choice.searched or max(choice.pp, len(choice.meshes)) <= len(trace.segments):
        return trace
    rng = random.Random(choice.seed)
    compute = [name for segment in trace.segments for name in segment.nodes]
    places = possible_cuts([trace.node(name) for name in compute])
    bounds = [0, *sorted(rng.sample(places, min(len(places), max(choice.pp, len(choice.meshes)) + 1))), len(compute)]
    segments = tuple(Segment(f"part{i}", i, tuple(compute[a:b])) for i, (a, b) in enumerate(pairwise(bounds)) if a < b)
    return replace(trace, segments=segments, fingerprint=f"{trace.fingerprint}-{choice.seed}")


def draw_plan(trace: Trace, choice: Choice) -> Plan | None:
    """The plan of a choice, with degrees lowered where the graph does not allow them; None where nothing is left."""
    if choice.searched:
        return _search(trace, choice)
    rng = random.Random(choice.seed)
    meshes = list(choice.meshes or ((choice.dp, choice.tp),) * choice.pp)[: len(trace.segments)]
    if not meshes:
        return None
    microbatches = choice.microbatches
    if trace.batch_size % lcm(*(dp for dp, _ in meshes)):
        meshes = [(1, tp) for _, tp in meshes]
    dp = lcm(*(dp for dp, _ in meshes))
    if trace.batch_size % (dp * microbatches) or not _exact(trace, dp, microbatches):
        microbatches = 1
    # Two stages a rank where the stages are equal and enough.
    even = len(set(meshes)) == 1 and len(meshes) % 2 == 0
    chunks = 2 if even and (choice.schedule == "zbv" or (choice.schedule == "interleaved" and len(meshes) > 2)) else 1
    schedule = "zb" if choice.schedule == "zbv" and chunks == 1 else choice.schedule
    names = [s.name for s in trace.segments]
    starts = sorted(rng.sample(range(1, len(trace.segments)), len(meshes) - 1))
    recomputed = [[], names, [n for n in names if rng.random() < 0.5]][choice.recompute]
    return random_plan(
        trace, microbatches=microbatches, seed=choice.seed, split_bias=choice.split, bounds=(0, *starts),
        rematerialize=recomputed, meshes=meshes, schedule=schedule, chunks=chunks,
    )  # fmt: skip


def _exact(trace: Trace, dp: int, microbatches: int) -> bool:
    """Whether the batch can be split exactly."""
    return all(f.reason is None for f in follow_batch(trace, Mesh(("mb", "dp"), (microbatches, dp))).values())


def _search(trace: Trace, choice: Choice) -> Plan | None:
    """The plan that the search finds at random prices, for given degrees or with a free choice."""
    rng = random.Random(choice.seed)
    cluster = Cluster.cpu(choice.dp * choice.tp * choice.pp).slower_links(10.0 ** rng.uniform(-4, 0))
    prices = SimplePrices(cluster, 10.0 ** rng.uniform(7, 11), 10.0 ** rng.uniform(6, 10))
    fixed = (degrees(dp=choice.dp, tp=choice.tp, pp=choice.pp),) if rng.random() < 0.7 else ()
    options = SolveOptions(constraints=fixed, microbatches="auto", rematerialize=choice.recompute > 0)
    try:
        return solve(trace, cluster, prices, options)
    except (BatchNotDivisible, ConflictingConstraints, NoFeasiblePlan):
        return None
