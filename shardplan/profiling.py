"""What ``shardplan profile`` does: price a job's ops within a budget, run its plan, compare term by term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from shardplan.api import auto_parallel
from shardplan.batch import example_batch
from shardplan.calibrating import keep_evidence
from shardplan.cli_work import Job
from shardplan.errors import NotRunnableHere
from shardplan.planner.cluster import Cluster
from shardplan.planner.costs import calibration, profile
from shardplan.planner.costs.links import LinkModel
from shardplan.planner.costs.model import CostModel
from shardplan.planner.costs.store import Store
from shardplan.planner.placement import Mesh, R, fits
from shardplan.planner.plan import Plan
from shardplan.planner.reductions import shown_seconds
from shardplan.planner.report.measured import Measured
from shardplan.planner.rules import LocalCall, Strategy, local_call, strategies
from shardplan.planner.trace import Trace, info, infos, is_tensor, resolve, tensor_args
from shardplan.planning import Request, make_trace, one_thread
from shardplan.runtime.progress import Items
from shardplan.targets import load_target


@dataclass(frozen=True, slots=True)
class Comparison:
    """A plan beside what was measured of it. places: device keys by rank."""

    plan: Plan
    measured: Measured
    places: list[str]

    def keep(self) -> None:
        """Correct the plans to come."""
        keep_evidence(self.plan, self.measured, self.places)

    def rows(self) -> list[dict[str, Any]]:
        """Predicted and measured of the step, of every stage's phases, of classes of ops and of memory."""
        plan, measured = self.plan, self.measured
        rows = [_row("step", "seconds", plan.step_seconds, measured.step_seconds)]
        for index, stage in enumerate(plan.stages):
            seen, ops = measured.phases[index], measured.ops[index]
            predicted = {
                "forward": stage.forward_seconds,
                "backward": stage.backward_seconds,
                "reduce": shown_seconds(stage, plan.overheads.get("step", 0.0)),
                "optimizer": stage.optimizer_seconds,
                "rest": plan.overheads.get("step", 0.0),
            }
            rows += [
                _row(f"stage {index} {name}", "seconds", seconds, seen.get(name, 0.0))
                for name, seconds in predicted.items()
            ]
            collectives = sum(sum(s) for name, s in ops.items() if name.startswith("collectives"))
            rows.append(_row(f"stage {index} collectives", "seconds", sum(stage.communication_seconds), collectives))
            # Timing every op takes time itself: what the untimed instructions take is shared out.
            computed = sum(sum(s) for name, s in ops.items() if not name.startswith("collectives"))
            whole = sum(measured.computing[index].get(name, 0.0) for name in ("forward", "backward", "weight"))
            share = min(whole / computed, 1.0) if computed > 0 else 1.0
            for name, seconds in sorted(stage.op_seconds.items(), key=lambda item: -sum(item[1])):
                if name in ops:
                    rows.append(_row(f"stage {index} {name}", "seconds", sum(seconds), share * sum(ops[name])))
            if measured.peak_nbytes:
                peak = max(measured.peak_nbytes[rank] for rank in stage.ranks)
                rows.append(_row(f"stage {index} peak memory", "bytes", stage.memory.peak_nbytes, peak))
        return rows

    def to_dict(self, stored: bool) -> dict[str, Any]:
        return {
            "schema": 1,
            "model": self.plan.model,
            "degrees": self.plan.degrees(),
            "calibrated_by": self.plan.calibrated_by,
            "stored": stored,
            "comparisons": self.rows(),
        }


def _row(name: str, unit: str, predicted: float, measured: float) -> dict[str, Any]:
    return {"name": name, "unit": unit, "predicted": predicted, "measured": measured}


def reset(devices: str) -> int:
    """Forget the corrections of devices of this machine -> of how many jobs."""
    locals_ = {device.local for device in Cluster.parse(devices).devices if device.local}
    return sum(calibration.reset(Store.open(), profile.device_key(torch.device(name))) for name in sorted(locals_))


def run(job: Job, budget_seconds: float = 40.0, steps: int = 10, progress: bool = False) -> Comparison:
    """budget_seconds: for measuring ops. steps: to measure. progress: whether to say how far that is. Raises
    NotRunnableHere where the devices are only described, and what planning and running raise."""
    cluster = Cluster.parse(job.devices)
    if not cluster.is_local:
        raise NotRunnableHere("profiling needs devices of this machine", hints=["--devices auto"])
    target = load_target(job.target, job.inputs, job.batch, job.seq, on_meta=False)
    batch = example_batch(target.model, target.random_batch(0), target.loss_fn is not None)
    trace, _ = make_trace(target.model, batch, Request(loss_fn=target.loss_fn))
    costs = CostModel(cluster, LinkModel(cluster), Store.open(), budget_seconds=budget_seconds)
    with one_thread(cluster), Items("ops measured", 1, progress) as items:
        costs.warm(calls(trace, len(cluster)), 0, items.reach)
    with auto_parallel(
        target.model,
        job.devices,
        batch,
        loss_fn=target.loss_fn,
        optimizer=torch.optim.AdamW,
        **job.planning(),
        verbose=job.verbose,
    ) as pm:
        measured = pm.measure(*batch.args, steps=steps, target=batch.target, **batch.kwargs)
        places = [profile.device_key(torch.device(device.local)) for device in cluster.devices]
        return Comparison(pm.plan, measured, places)


def calls(trace: Trace, ranks: int) -> list[LocalCall]:
    """Every op of a trace whole, and in every split over all ranks."""
    found = []
    mesh = Mesh(("tp",), (ranks,))
    for node in trace.nodes():
        if node.op != "call_function" or resolve(node)[0] is not node or not infos(node):
            continue
        found.append(local_call(node, {}, mesh))
        for strategy in strategies(node) if ranks > 1 else ():
            if strategy.is_split and not strategy.impl and _fits(node, strategy, mesh):
                found.append(local_call(node, {"tp": strategy}, mesh))
    return found


def _fits(node: Any, strategy: Strategy, mesh: Mesh) -> bool:
    given = zip(tensor_args(node), strategy.inputs, strict=True)
    shapes = [(info(a).shape, p) for a, p in given if is_tensor(a)]
    shapes += [(result.shape, p) for result, p in zip(infos(node), strategy.outputs, strict=True)]
    return all(fits(shape, (placement if placement.is_shard else R,), mesh) for shape, placement in shapes)
