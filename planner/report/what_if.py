"""What would change: other plans of the same job, each searched anew with one setting changed."""

from __future__ import annotations

import re
from dataclasses import dataclass

from shardplan.errors import ShardplanError
from shardplan.planner.plan import Plan
from shardplan.planner.units import parse_nbytes

_NUMBER = re.compile(r"^(\d+(?:\.\d+)?)(?:x.*)?$")


@dataclass(frozen=True, slots=True)
class WhatIf:
    """setting: what was changed ("devices", "batch", "memory", "links"); value: to what. degrees: of the plan found.
    seconds None: there is none, and reason says why. samples_per_second: of the whole job; peak_nbytes: of its fullest
    device. devices: how many it has."""

    setting: str
    value: str
    degrees: str = ""
    seconds: float | None = None
    samples_per_second: float = 0.0
    peak_nbytes: int = 0
    reason: str = ""
    devices: int = 0

    @property
    def number(self) -> float | None:
        """The value as a number to be drawn: devices, samples, GiB of memory, times the links' speed; None where it is
        none, as of a cluster file."""
        if self.setting == "devices":
            return float(self.devices) if self.devices else None
        if self.setting == "memory":
            try:
                return parse_nbytes(self.value) / (1 << 30)
            except ValueError:
                return None
        found = _NUMBER.match(self.value)
        return float(found[1]) if found else None

    @staticmethod
    def of(setting: str, value: str, plan: Plan) -> WhatIf:
        """From the plan that was found."""
        peak = max((stage.memory.peak_nbytes for stage in plan.stages), default=0)
        rate = plan.batch_size / plan.step_seconds if plan.step_seconds > 0 else 0.0
        return WhatIf(setting, value, plan.degrees(), plan.step_seconds, rate, peak, devices=len(plan.devices))

    @staticmethod
    def without(setting: str, value: str, error: ShardplanError) -> WhatIf:
        """Where no plan was found."""
        return WhatIf(setting, value, reason=error.title)
