"""What the search may decide and for how long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shardplan.errors import UsageError
from shardplan.planner import schedules
from shardplan.planner.constraints import Constraint
from shardplan.planner.search.solver import SOLVERS
from shardplan.planner.wire import Wire


@dataclass(frozen=True, slots=True)
class SolveOptions:
    """constraints: see `planner.constraints`. microbatches: a number, or "auto". schedule: one of `schedules.KINDS`, or
    "auto".

    rematerialize: True (every segment), False (none) or "auto". zero: level at which replicated parameters are stored
    in parts (see `planner.storage`), 0 for none, or "auto". optimizer_factor: bytes of optimizer state per byte of
    trainable parameters. time_limit: seconds of the whole search; gap: relative. progress: gets lines of text.
    hints: where nothing fits, solve variants of the job for hints. reduction: what sums of gradients over replicas are
    sent as (`planner.wire`); average_every: in every so many steps.
    """

    constraints: tuple[Constraint, ...] = ()
    microbatches: int | str = "auto"
    schedule: str = "auto"
    rematerialize: bool | str = "auto"
    zero: int | str = "auto"
    solver: str = "highs"
    time_limit: float = 60.0
    gap: float = 0.01
    objective: str = "train"
    optimizer_factor: float = 2.0
    progress: Callable[[str], None] | None = None
    hints: bool = True
    reduction: str = "exact"
    average_every: int = 1

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise UsageError(f"solver={self.solver!r}", [], [f"one of {', '.join(SOLVERS)}"])
        if self.time_limit <= 0 or not 0 <= self.gap < 1:
            raise UsageError(f"time_limit={self.time_limit}, gap={self.gap}: seconds > 0 and a gap in [0, 1)")
        if self.rematerialize not in (True, False, "auto"):
            raise UsageError(f"rematerialize={self.rematerialize!r}", [], ['True, False or "auto"'])

        if self.zero != "auto" and (isinstance(self.zero, bool) or self.zero not in (0, 1, 2, 3)):
            raise UsageError(f"zero={self.zero!r}", [], ['"auto", 0, 1, 2 or 3'])
        count = self.microbatches
        if count != "auto" and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise UsageError(f"microbatches={count!r}", [], ['"auto" or a number of at least 1'])
        Wire.parse(self.reduction)
        if self.objective not in ("train", "infer"):
            raise UsageError(f"objective={self.objective!r}", [], ['"train" or "infer"'])
        if self.schedule not in ("auto", *schedules.KINDS):
            raise UsageError(f"schedule={self.schedule!r}", [], [f"auto, {', '.join(schedules.KINDS)}"])

    @property
    def training(self) -> bool:
        return self.objective == "train"
