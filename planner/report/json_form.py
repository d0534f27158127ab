"""The report as one versioned JSON object."""

from __future__ import annotations

import json
from typing import Any

from shardplan.planner.plan import Plan
from shardplan.planner.report.document import parts_of
from shardplan.planner.report.facts import Facts, facts
from shardplan.planner.report.measured import Measured
from shardplan.planner.report.what_if import WhatIf
from shardplan.planner.report.why import schedule_decisions, sentence

SCHEMA = 1


def render_json(plan: Plan, measured: Measured | None = None, what_if: tuple[WhatIf, ...] = ()) -> str:
    """JSON text with the facts of the report. Bytes and seconds are plain numbers."""
    return json.dumps(report_object(facts(plan, measured, what_if)), indent=1) + "\n"


def report_object(found: Facts) -> dict[str, Any]:
    """The JSON object (keys as in the command line's ``plan --json``)."""
    plan, status = found.plan, found.status
    peaks: dict[str, int] = {}
    for device in found.devices:
        peaks[device.kind] = max(peaks.get(device.kind, 0), device.memory.peak_nbytes)
    return {
        "schema": SCHEMA,
        "model": plan.model,
        "fingerprint": plan.fingerprint,
        "verdict": found.verdict,
        "devices": len(plan.devices),
        "batch_size": plan.batch_size,
        "inputs": dict(sorted(plan.inputs.items())),
        "step_seconds": found.step_seconds,
        "samples_per_second": found.samples_per_second,
        "tokens_per_second": found.tokens_per_second,
        "mfu": plan.flops / (found.step_seconds * plan.peak_flops) if plan.flops and plan.peak_flops else None,
        "stages": [
            {
                "devices": list(s.plan.ranks),
                "mesh": {a: n for a, n in zip(s.plan.mesh.axes, s.plan.mesh.sizes, strict=True) if a != "mb"},
                "blocks": list(s.plan.blocks),
                "seconds": s.plan.forward_seconds + s.plan.backward_seconds,
                "forward_seconds": s.plan.forward_seconds,
                "backward_seconds": s.plan.backward_seconds,
                "once_seconds": s.plan.once_seconds,
                "busy_seconds": s.busy_seconds,
                "measured_seconds": s.measured_seconds,
                "memory_bytes": s.plan.memory.peak_nbytes,
                "memory_parts": dict(parts_of(s.plan.memory)),
                "rematerialized": list(s.plan.rematerialized),
            }
            for s in found.stages
        ],
        "microbatches": plan.microbatches,
        "schedule": plan.schedule,
        "bubble_share": found.simulation.bubble_share,
        "rematerialized": [name for stage in plan.stages for name in stage.rematerialized],
        "peak_memory_bytes": peaks,
        "memory": [
            {
                "devices": list(d.ranks),
                "kind": d.kind,
                "stage": d.stage,
                "limit_bytes": d.limit_nbytes,
                "predicted_bytes": d.memory.peak_nbytes,
                "measured_bytes": d.measured_nbytes,
            }
            for d in found.devices
        ],
        "splits": [
            {
                "pattern": s.pattern,
                "kind": s.kind,
                "names": list(s.names),
                "tensor": s.tensor,
                "axes": s.axes,
                "local_bytes": s.local_nbytes,
            }
            for s in found.splits
        ],
        "links": [
            {
                "source": k.source,
                "target": k.target,
                "bytes": k.nbytes,
                "seconds": k.seconds,
                "grad_bytes": k.grad_nbytes,
                "grad_seconds": k.grad_seconds,
            }
            for k in plan.links
        ],
        "binds": list(found.binds),
        "outcome": status.outcome,
        "lower_bound_seconds": status.lower_bound,
        "gap": status.gap,
        "solver": status.solver,
        "searched": dict(sorted(status.searched.items())),
        "trace_seconds": plan.trace_seconds,
        "profile_seconds": plan.profile_seconds,
        "solve_seconds": status.seconds,
        "baselines": _alternatives(found.baselines),
        "runners_up": _alternatives(found.runners_up),
        "decisions": [
            {
                "topic": d.topic,
                "chosen": d.chosen,
                "other": d.other,
                "step_seconds": d.seconds,
                "proven": d.proven,
                "peak_memory_bytes": d.nbytes or None,
                "why": sentence(plan, d),
            }
            for d in (*plan.decisions, *schedule_decisions(plan))
        ],
        "coverage": dict(sorted(plan.coverage.items())),
        "replicated_ops": [{"op": o, "nodes": n, "share": s, "reason": r} for o, n, s, r in plan.replicated_ops],
        "discovered_ops": [{"op": o, "nodes": n, "splits": ways} for o, n, ways in plan.discovered_ops],
        "leaves": [{"module": m, "share": s, "reason": r, "batch": how} for m, s, r, how in plan.leaves],
        "what_if": [
            {
                "setting": w.setting,
                "value": w.value,
                "degrees": w.degrees,
                "step_seconds": w.seconds,
                "samples_per_second": w.samples_per_second if w.seconds else None,
                "peak_memory_bytes": w.peak_nbytes,
                "reason": w.reason,
            }
            for w in found.what_if
        ],
        "measured": _measured(found),
        "assumptions": list(found.assumptions),
        "constraints": list(plan.constraints),
        "notes": list(plan.notes),
    }


def _alternatives(found: Any) -> dict[str, Any]:
    return {a.name: {"step_seconds": a.seconds, "peak_memory_bytes": a.peak_nbytes, "reason": a.reason} for a in found}


def _measured(found: Facts) -> dict[str, Any] | None:
    if not found.measured:
        return None
    return {
        "steps": found.measured.steps,
        "step_seconds": found.measured.step_seconds,
        "single_device_seconds": found.measured.single_device_seconds,
        "comparisons": [
            {"name": c.name, "unit": c.unit, "predicted": c.predicted, "measured": c.measured}
            for c in found.comparisons
        ],
    }
