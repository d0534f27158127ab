"""What would change: other plans of the same job, each searched anew with one setting changed."""

from __future__ import annotations

from dataclasses import dataclass

from shardplan.errors import ShardplanError
from shardplan.planner.plan import Plan


@dataclass(frozen=True, slots=True)
class WhatIf:
    """setting: what was changed ("devices", "batch", "memory", "links"); value: to what. degrees: of the plan found.
    seconds None: there is none, and reason says why. samples_per_second: of the whole job; peak_nbytes: of its fullest
    device."""

    setting: str
    value: str
    degrees: str = ""
    seconds: float | None = None
    samples_per_second: float = 0.0
    peak_nbytes: int = 0
    reason: str = ""

    @staticmethod
    def of(setting: str, value: str, plan: Plan) -> WhatIf:
        """From the plan that was found."""
        peak = max((stage.memory.peak_nbytes for stage in plan.stages), default=0)
        rate = plan.batch_size / plan.step_seconds if plan.step_seconds > 0 else 0.0
        return WhatIf(setting, value, plan.degrees(), plan.step_seconds, rate, peak)

    @staticmethod
    def without(setting: str, value: str, error: ShardplanError) -> WhatIf:
        """Where no plan was found."""
        return WhatIf(setting, value, reason=error.title)
