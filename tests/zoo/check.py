"""What the zoo asks of one architecture: a trace, plans by the search under forced degrees and by its own choice, the
rewritten programs run on simulated ranks, and loss and every gradient against the unsplit model on the global batch.

The columns of forced degrees are planned with prices under which communication and copies cost next to nothing, so
that every op is split that a plan can split: that is the hardest test of the rewrite, and the share of operations
under "tp2" is what *can* be split, not what pays on models this small. The planner's own choice is planned with
realistic prices.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from shardplan.errors import ShardplanError
from shardplan.planner.cluster import Cluster
from shardplan.planner.constraints import degrees
from shardplan.planner.costs.base import OpCost
from shardplan.planner.export import trace_model
from shardplan.planner.placement import Mesh
from shardplan.planner.plan import Plan
from shardplan.planner.propagate import follow
from shardplan.planner.rules import LocalCall
from shardplan.planner.search import SolveOptions, solve
from shardplan.planner.trace import Trace, leaf_of
from shardplan.rewrite import compile
from shardplan.rewrite.reference import run_program
from tests import models
from tests.prices import SimplePrices
from tests.zoo.flops import split_share
from tests.zoo.registry import Entry

MIXES = ({"dp": 2, "tp": 2, "pp": 1}, {"dp": 1, "tp": 2, "pp": 2}, {"dp": 2, "tp": 1, "pp": 2})
COLUMNS = ("dp2", "tp2", "pp2", "mix", "own")
_FREE = 1e-5


class FreePrices(SimplePrices):
    """Nearly free communication and copies, and no fixed cost of an op: whatever can be split is."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster.slower_links(_FREE))

    def op(self, call: LocalCall, device: int) -> OpCost:
        found = super().op(call, device)
        return OpCost(found.forward_seconds - 5e-6, found.backward_seconds * (1 - 5e-6 / found.forward_seconds))

    def copy(self, nbytes: int, device: int) -> float:
        return super().copy(nbytes, device) * _FREE


@dataclass(slots=True)
class Outcome:
    """Result of one column. error: largest relative error of loss and gradients, or None where it did not get so far.
    what: the plan in words; problem: empty where it passed."""

    passed: bool = False
    error: float | None = None
    what: str = ""
    problem: str = ""
    seconds: float = 0.0


@dataclass(slots=True)
class Row:
    """One line of the table. Written as JSON by `tests.zoo.run`.

    traced: "export", "make_fx" or "no". problem: why not. leaves: opaque leaves with their reasons. share: of the
    operations, split under tp2; whole: the largest that are not. microbatches: "" or why one step has only one.
    """

    name: str
    family: str
    summary: str
    transformer: bool
    traced: str = "no"
    problem: str = ""
    leaves: list[str] = field(default_factory=list)
    trace_seconds: float = 0.0
    nodes: int = 0
    microbatches: str = ""
    share: float | None = None
    whole: list[tuple[str, float]] = field(default_factory=list)
    columns: dict[str, Outcome] = field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(slots=True)
class Subject:
    """An entry, traced and run on one device."""

    entry: Entry
    case: models.Case
    trace: Trace
    eager: models.Result
    state: dict[str, torch.Tensor]

    @property
    def batch(self) -> dict[str, torch.Tensor]:
        return {s.name: self.given(s.name) for s in self.trace.sources.values() if s.kind == "input"}

    def given(self, name: str) -> torch.Tensor:
        """The tensor of the batch that an input's name means ("target.boxes" is in the dict "target")."""
        found: Any = self.case.batch
        for key in name.split("."):
            found = found[key if isinstance(found, dict) else int(key)]
        return found


def check(
    entry: Entry,
    columns: tuple[str, ...] = COLUMNS,
    mix: int = 0,
    trouble: Callable[[str], object] = lambda text: None,
) -> Row:
    """Everything about one entry. columns: which of `COLUMNS`; mix: which of `MIXES`. Raises nothing: what fails is in
    the row. trouble: gets the tracebacks."""
    started = time.perf_counter()
    row = Row(entry.name, entry.family, entry.summary, entry.transformer)
    try:
        subject = prepare(entry)
    except Exception as error:
        trouble(traceback.format_exc())
        row.problem = _words(error)
        row.seconds = round(time.perf_counter() - started, 2)
        return row
    trace = subject.trace
    row.traced, row.nodes, row.trace_seconds = trace.method, len(trace.graph.nodes), round(trace.seconds, 2)
    notes = dict.fromkeys(note for node in trace.nodes() if (note := leaf_of(node)) is not None)
    row.leaves = [f"{note.leaf.name}: {note.reason}" for note in notes]
    row.microbatches = follow(trace, "mb", Mesh(("mb",), (2,))).reason or ""
    for column in columns:
        began = time.perf_counter()
        outcome = Outcome()
        try:
            plan = plan_for(subject, column, mix)
            outcome.what = describe(plan)
            if column == "tp2":
                row.share, row.whole = split_share(trace, plan)
                row.share, row.whole = None if math.isnan(row.share) else round(row.share, 4), row.whole[:6]
            outcome.error, where = compare(subject, plan)
            outcome.passed = outcome.error <= entry.allowed
            outcome.problem = "" if outcome.passed else f"relative error {outcome.error:.1e} in {where}"
        except Exception as error:
            trouble(traceback.format_exc())
            outcome.problem = _words(error)
        outcome.seconds = round(time.perf_counter() - began, 2)
        row.columns[column] = outcome
    row.seconds = round(time.perf_counter() - started, 2)
    return row


def prepare(entry: Entry) -> Subject:
    """Build, trace, and run on one device."""
    case = entry.case()
    state = {k: v.detach().clone() for k, v in case.model.state_dict(keep_vars=True).items()}
    state |= {k: v.detach().clone() for k, v in case.model.named_buffers()}
    trace = trace_model(case.model, (), case.kwargs, loss_fn=case.loss_fn, target=case.target)
    eager = models.run_eager(case)
    assert eager.loss is not None and bool(eager.loss.isfinite()), "the model itself gives no finite loss"
    return Subject(entry, case, trace, eager, state)


def plan_for(subject: Subject, column: str, mix: int = 0) -> Plan:
    """The search's plan for a column; in two microbatches where there is a pipeline and that is exact."""
    if column == "own":
        cluster = Cluster.cpu(4)
        return solve(subject.trace, cluster, SimplePrices(cluster), SolveOptions(rematerialize=False))
    fixed = {"dp2": (2, 1, 1), "tp2": (1, 2, 1), "pp2": (1, 1, 2)}.get(column) or tuple(MIXES[mix].values())
    dp, tp, pp = fixed
    cluster = Cluster.cpu(dp * tp * pp)
    several = pp > 1 and follow(subject.trace, "mb", Mesh(("dp", "mb"), (dp, 2))).reason is None
    options = SolveOptions(
        constraints=(degrees(dp=dp, tp=tp, pp=pp),), microbatches=2 if several else 1, rematerialize=False, gap=0.02
    )
    return solve(subject.trace, cluster, FreePrices(cluster), options)


def describe(plan: Plan) -> str:
    """Such as "pp2 x dp2, 2 microbatches"."""
    mesh = plan.stages[0].mesh
    parts = {"pp": len(plan.stages), "dp": mesh.size("dp"), "tp": mesh.size("tp")}
    text = " x ".join(f"{axis}{size}" for axis, size in parts.items() if size > 1) or "one device"
    return f"{text}, {plan.microbatches} microbatches" if plan.microbatches > 1 else text


def compare(subject: Subject, plan: Plan) -> tuple[float, str]:
    """The largest relative error of the rewritten program against one device, and where it is: loss, every gradient,
    and the buffers after the step. Relative to the tensor's norm, or to 1e-3 of the largest gradient's where that is
    larger (some true gradients are zero); buffers to 1e-6 of the largest."""
    result = run_program(compile(subject.trace, plan), subject.state, subject.batch)
    eager = subject.eager
    assert eager.loss is not None and result.loss is not None
    floor = 1e-3 * max((float(g.norm()) for g in eager.gradients.values()), default=1.0)
    worst = (_error(result.loss, eager.loss, 1e-12), "the loss")
    for name, gradient in eager.gradients.items():
        mine = result.gradients.get(name)
        if mine is None:
            return math.inf, f"the gradient of {name}, which is missing"
        worst = max(worst, (_error(mine, gradient, floor), f"the gradient of {name}"))
    buffers = {n: b for n, b in eager.buffers.items() if n in result.buffers and b.is_floating_point()}
    floor = max(1e-6 * max((float(b.norm()) for b in buffers.values()), default=1.0), 1e-12)
    for name, value in buffers.items():
        worst = max(worst, (_error(result.buffers[name], value, floor), f"buffer {name}"))
    return worst


def _error(mine: torch.Tensor, theirs: torch.Tensor, floor: float) -> float:
    error = float((mine - theirs).norm()) / max(float(theirs.norm()), floor)
    return math.inf if math.isnan(error) else error


def _words(error: Exception) -> str:
    """A ShardplanError in one line; of others the kind, message and the last place in our code."""
    if isinstance(error, ShardplanError):
        return " | ".join([f"{error.code} {type(error).__name__}: {error.title}", *error.details[:2]])[:400]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    place = frames and f" at {'/'.join(frames[-1].filename.rsplit('/', 2)[-2:])}:{frames[-1].lineno}"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}{place or ''}"[:400]
