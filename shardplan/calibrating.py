"""From what the ranks measured to a `Measured`, and to corrections for the plans to come.

``pm.measure(calibrate=True)`` keeps, per kind of device, by how much every class of ops, the optimizer, reductions,
messages and memory were mispredicted (`planner.costs.evidence`). The next plan on such devices is priced with it and
says so among its assumptions; ``cache=False`` plans without it, ``shardplan profile --reset`` forgets it.
"""

from __future__ import annotations

from typing import Any

from shardplan.errors import UsageError
from shardplan.planner.costs import calibration
from shardplan.planner.costs.evidence import evidence_of
from shardplan.planner.costs.store import Store
from shardplan.planner.plan import Plan
from shardplan.planner.report.measured import Measured


def measured_of(plan: Plan, found: dict[str, Any], steps: int) -> Measured:
    """What `runtime.measuring.measure` returned, in the form of the report."""
    stages = found["stages"]
    per_microbatch, per_step = ("forward", "backward", "weight"), ("reduce", "optimizer")
    seconds = tuple(
        plan.microbatches * sum(s.phases.get(name, 0.0) for name in per_microbatch)
        + sum(s.phases.get(name, 0.0) for name in per_step)
        for s in stages
    )
    return Measured(
        step_seconds=found["step_seconds"],
        stage_seconds=seconds,
        peak_nbytes=tuple(found["peak_nbytes"]) if any(found["peak_nbytes"]) else (),
        steps=steps,
        timeline=found["timeline"],
        phases=tuple(s.phases for s in stages),
        computing=tuple(s.computing for s in stages),
        ops=tuple(s.ops for s in stages),
    )


def keep_evidence(plan: Plan, measured: Measured, places: list[str], store: Store | None = None) -> None:
    """Keep what a measured job says of its devices. places: `profile.device_key` by rank; store: the user's by default.

    Raises UsageError where the plan does not say what it predicts.
    """
    store = store or Store.open()
    by_place: dict[str, list[int]] = {}
    for index, stage in enumerate(plan.stages):
        by_place.setdefault(places[stage.ranks[0]], []).append(index)
    for place, stages in by_place.items():
        try:
            found = evidence_of(plan, measured, stages)
        except ValueError as error:
            raise UsageError(f"this plan cannot be calibrated: {error}", hints=["plan anew, without plan="]) from None
        calibration.add(store, place, found)
