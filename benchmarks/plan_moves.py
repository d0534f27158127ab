"""The plan moves for the right reason: link speed and memory, with costs measured on this machine.

    python benchmarks/plan_moves.py [--devices 2] [--layers 6] [--batch 8] [--record tests/recorded]

Plans the byte-level GPT of the examples three times: with the links as measured between two workers, with the same
links 100 times slower, and with a memory limit below what one device needs. Exits with 7 where a plan does not move.
--record keeps every price that the searches were told, for the test that repeats them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from train_byte_gpt import ByteGPT

from shardplan.planner.cluster import Cluster
from shardplan.planner.constraints import Constraint, degrees, memory
from shardplan.planner.costs.links import LinkModel
from shardplan.planner.costs.model import CostModel
from shardplan.planner.costs.recorded import RecordingCosts
from shardplan.planner.costs.tables import LinkTables
from shardplan.planner.export import trace_model
from shardplan.planner.plan import Plan
from shardplan.planner.search import SolveOptions, solve
from shardplan.runtime import rank_calls
from shardplan.runtime.launch import Workers


def token_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    cluster = Cluster.parse(given.devices)
    with Workers([device.local for device in cluster.devices]) as workers:
        tables = workers.call(rank_calls.tables)[0]
    ids = torch.randint(256, (given.batch, 128))
    model = ByteGPT(layers=given.layers)
    trace = trace_model(model, (ids,), loss_fn=token_loss, target=ids)
    recordings: dict[str, RecordingCosts] = {}

    def plan(name: str, tables: LinkTables, *constraints: Constraint) -> Plan:
        if name not in recordings:
            links = LinkModel(cluster, tables)
            recordings[name] = RecordingCosts(CostModel(cluster, links, None, measure=True, budget_seconds=60.0))
        return solve(trace, cluster, recordings[name], SolveOptions(constraints=constraints))

    one = plan("measured", tables, degrees(dp=1, tp=1, pp=1))
    held = one.memory()[0]
    limit = (held.parameters + held.gradients + held.optimizer) * 9 // 10
    plans = {
        "links as measured": plan("measured", tables),
        "links 100 times slower": plan("slow", tables.scaled(100)),
        f"at most {limit / 2**20:.0f} MiB a device": plan("measured", tables, memory(limit)),
    }
    table = Table("job", "plan", "devices", "predicted step", "peak", "outcome")
    for name, found in {"one device": one, **plans}.items():
        peak = max(m.peak_nbytes for m in found.memory()) / 2**20
        used = sum(len(stage.ranks) for stage in found.stages)
        table.add_row(
            name, found.degrees(), str(used), f"{found.step_seconds * 1e3:.0f} ms", f"{peak:.0f} MiB",
            f"{found.status.outcome}, gap {found.status.gap:.1%}",
        )  # fmt: skip
    Console().print(table)
    for name, recording in recordings.items() if given.record else ():
        given.record.mkdir(parents=True, exist_ok=True)
        (given.record / f"plan_moves_{name}.json").write_text(recording.text())
    measured, slow, tight = plans.values()
    failures = []
    if _shape(measured) == _shape(slow):
        failures.append("the plan is the same on a link 100 times slower")
    if max(m.peak_nbytes for m in tight.memory()) > limit or sum(len(s.ranks) for s in tight.stages) < 2:
        failures.append("the plan under the memory limit does not fit or runs on one device")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 7 if failures else 0


def _shape(plan: Plan) -> tuple[object, ...]:
    return tuple((stage.first, stage.ranks, stage.mesh) for stage in plan.stages)


if __name__ == "__main__":
    sys.exit(main())
