"""Random legal plans: meshes, stage cuts, schedules, recomputed segments and a strategy for every op."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise

from shardplan.errors import BatchNotDivisible, ConflictingConstraints, NoFeasiblePlan
from shardplan.planner import schedules
from shardplan.planner.cluster import Cluster
from shardplan.planner.constraints import degrees
from shardplan.planner.cuts import possible_cuts
from shardplan.planner.placement import Mesh
from shardplan.planner.plan import Plan
from shardplan.planner.propagate import follow_batch
from shardplan.planner.search import SolveOptions, solve
from shardplan.planner.stages import split_stages
from shardplan.planner.trace import Segment, Trace
from tests.fuzz.builder import Draws
from tests.plans import random_plan
from tests.prices import SimplePrices

MESHES = (
    (1, 2, 1), (2, 1, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2), (2, 1, 2), (1, 4, 1), (1, 3, 1), (4, 1, 1), (2, 2, 2),
    (1, 2, 3), (1, 1, 4), (3, 1, 1), (2, 4, 1), (1, 1, 3),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Choice:
    """Degrees of a plan and the seed of everything else that is drawn."""

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

    def __str__(self) -> str:
        return (
            f"dp{self.dp} tp{self.tp} pp{self.pp} mb{self.microbatches} {self.schedule} split {self.split} "
            f"recompute {self.recompute} seed {self.seed}{' searched' if self.searched else ''}"
        )


def draw_choice(data: bytes) -> Choice:
    draws = Draws(data)
    dp, tp, pp = draws.one(MESHES)
    return Choice(
        dp, tp, pp, draws.one((1, 2, 1, 4, 3)), draws.one(("1f1b", "gpipe")), draws.one((0.9, 0.5, 1.0, 0.2)),
        draws.one((0, 0, 1, 2)), draws.chance(3), draws.below(256),
        draws.chance(24),
    )  # fmt: skip


def recut(trace: Trace, choice: Choice) -> Trace:
    """The trace with its segments cut at random, at more places than the planner would, where it has too few stages."""
    if choice.pp <= len(trace.segments) or choice.searched:
        return trace
    rng = random.Random(choice.seed)
    compute = [name for segment in trace.segments for name in segment.nodes]
    places = possible_cuts([trace.node(name) for name in compute])
    bounds = [0, *sorted(rng.sample(places, min(len(places), choice.pp + 1))), len(compute)]
    segments = tuple(Segment(f"part{i}", i, tuple(compute[a:b])) for i, (a, b) in enumerate(pairwise(bounds)) if a < b)
    return replace(trace, segments=segments, fingerprint=f"{trace.fingerprint}-{choice.seed}")


def draw_plan(trace: Trace, choice: Choice) -> Plan | None:
    """The plan of a choice, with degrees lowered where the graph does not allow them; None where nothing is left."""
    if choice.searched:
        return _search(trace, choice)
    rng = random.Random(choice.seed)
    pp = min(choice.pp, len(trace.segments))
    if pp < 1:
        return None
    dp, microbatches = choice.dp, choice.microbatches
    if trace.batch_size % dp:
        dp = 1
    if trace.batch_size % (dp * microbatches) or not _exact(trace, dp, microbatches):
        microbatches = 1
    starts = sorted(rng.sample(range(1, len(trace.segments)), pp - 1))
    names = [s.name for s in trace.segments]
    recomputed = [[], names, [n for n in names if rng.random() < 0.5]][choice.recompute]
    plan = random_plan(
        trace, dp=dp, tp=choice.tp, pp=pp, microbatches=microbatches, seed=choice.seed, split_bias=choice.split,
        bounds=(0, *starts), rematerialize=recomputed,
    )  # fmt: skip
    if choice.schedule == plan.schedule:
        return plan
    split = split_stages(trace, (0, *starts))
    instructions = schedules.build(choice.schedule, pp, microbatches, split.edges(), grad_edges=split.grad_edges())
    return replace(plan, schedule=choice.schedule, instructions=instructions)


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
