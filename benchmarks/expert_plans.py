"""Our plan beside the plan that experts published, for the same model, devices and batch; both costs in our model.

    python benchmarks/expert_plans.py [ID ...] [--time-limit 60] [--json benchmarks/results/expert_plans.json]

ID: as in the first column (default: all). Every configuration is traced at its published shape on the meta device and
searched twice: freely, and with the published degrees, microbatches, recomputation and storage split. "why" is what the
free plan does less of, from the figures of the two plans; "otherwise" says what the published run did that the plan
standing for it doesn't, so that it may be better than its cost here. Where no plan of ours is the published one, that
column says why. --json keeps what other rows the file has.

Configurations and sources: benchmarks/experts.py, benchmarks/published.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from experts import Expert, experts, model_of
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import records
from shardplan.errors import ShardplanError
from shardplan.planner.cluster import Cluster
from shardplan.planner.constraints import degrees
from shardplan.planner.costs.links import LinkModel
from shardplan.planner.costs.model import CostModel
from shardplan.planner.export import trace_model
from shardplan.planner.plan import Plan
from shardplan.planner.search import SolveOptions, solve

_WANTED = 12
"""Configurations of which both costs are known."""
_CLOSE = 1.01
"""The search proves 1 %."""


def measure(expert: Expert, time_limit: float) -> dict[str, Any]:
    """Runs in a process of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    began = time.process_time()
    ids = torch.empty((expert.batch, expert.seq), dtype=torch.int64, device="meta")
    trace = trace_model(model_of(expert), (), {"input_ids": ids, "labels": ids})
    cluster = Cluster.preset(expert.nodes, nodes=-(-expert.devices // 8))
    costs = CostModel(cluster, LinkModel(cluster, None), None, measure=False)
    ours = solve(trace, cluster, costs, SolveOptions(time_limit=time_limit, hints=False))
    found: dict[str, Any] = {
        "devices": expert.devices,
        "published": published(expert),
        "otherwise": expert.inexpressible() or expert.outside(),
        "ours": described(ours),
        "gap": ours.status.gap,
        "ours_seconds": ours.step_seconds,
        "theirs": "-",
        "theirs_seconds": None,
        "why": "",
    }
    if not expert.inexpressible():
        given = SolveOptions(
            constraints=(degrees(**expert.degrees()),),
            microbatches=expert.microbatches,
            rematerialize=True if expert.recompute else "auto",
            zero=expert.zero,
            time_limit=time_limit,
            hints=False,
        )
        try:
            theirs = solve(trace, cluster, costs, given)
            found |= {"theirs": described(theirs), "theirs_seconds": theirs.step_seconds}
            found["why"] = "; ".join(reasons(ours, theirs)) or "the same arrangement"
        except ShardplanError as error:
            found["why"] = str(error).splitlines()[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found | {"cpu_seconds": time.process_time() - began, "peak_nbytes": peak}


def published(expert: Expert) -> str:
    named = {"dp": expert.dp, "tp": expert.tp, "pp": expert.pp, "cp": expert.cp, "ep": expert.ep}
    text = " ".join(f"{name}{size}" for name, size in named.items() if size > 1)
    more = f", {expert.chunks} chunks" if expert.chunks > 1 else ""
    more += ", all recomputed" if expert.recompute else ""
    return f"{text}, {expert.microbatches} microbatches{more}" + (f", zero {expert.zero}" if expert.zero else "")


def described(plan: Plan) -> str:
    again = sum(len(stage.rematerialized) for stage in plan.stages)
    stored = f", zero {max(s.level for s in plan.storage.values())}" if plan.storage else ""
    return f"{plan.degrees()}, {again} of {sum(len(s.blocks) for s in plan.stages)} recomputed{stored}"


def reasons(ours: Plan, theirs: Plan) -> list[str]:
    """What the free plan does less of, with the seconds of a step that this is worth, the largest first."""
    mine = _parts(ours)
    parts = {name: seconds - mine[name] for name, seconds in _parts(theirs).items()}
    least = 0.01 * theirs.step_seconds
    told = sorted((item for item in parts.items() if abs(item[1]) > least), key=lambda item: -item[1])
    return [f"{seconds:+.2f} s {name}" for name, seconds in told]


def _parts(plan: Plan) -> dict[str, float]:
    """A step's seconds: of the mean stage, of the slowest over it, in filling and draining, once a step."""
    busy = [plan.microbatches * (s.forward_seconds + s.backward_seconds) for s in plan.stages]
    once = max(stage.once_seconds for stage in plan.stages)
    mean = sum(busy) / len(busy)
    return {
        "compute and messages of tensor parallelism": mean,
        "uneven stages": max(busy) - mean,
        "once a step": once,
        "filling, draining and messages of the pipeline": plan.step_seconds - max(busy) - once,
    }


def main() -> int:
    known = experts()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", default=list(known))
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds of each search")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.ids) - set(known):
        parser.error(f"no configuration {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if given.in_process:
        print(json.dumps(measure(known[given.ids[0]], given.time_limit)))
        return 0
    rows: dict[str, dict[str, Any]] = records.read(given.json).get("rows", {})
    for name in given.ids:
        command = [sys.executable, __file__, name, "--in-process", "--time-limit", str(given.time_limit)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(f"{name}: failed", file=sys.stderr)
            continue
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        records.write(given.json, "expert_plans", targets(rows), rows=rows, comparable=costs_of(rows))
    show({name: rows[name] for name in known if name in rows})
    return 0


def targets(rows: dict[str, dict[str, Any]]) -> list[records.Checked]:
    both = [row for row in rows.values() if row["theirs_seconds"] is not None]
    worst = max((row["ours_seconds"] / row["theirs_seconds"] for row in both), default=float("nan"))
    return [
        records.Target("published configurations with both costs", _WANTED, most=False).check(len(both)),
        records.Target("our plan's cost over the published plan's, worst", _CLOSE).check(worst),
    ]


def costs_of(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    return {f"{name}: s a step": row["ours_seconds"] for name, row in rows.items()}


def show(rows: dict[str, dict[str, Any]]) -> None:
    table = Table(title="Published plans and ours, both costs in our model", show_lines=True)
    for column in ("model", "devices", "published", "as a plan of ours", "s", "ours", "s", "gap", "why", "otherwise"):
        table.add_column(column)
    for name, row in rows.items():
        theirs = "-" if row["theirs_seconds"] is None else f"{row['theirs_seconds']:.2f}"
        told = (row["published"], row["theirs"], theirs, row["ours"], f"{row['ours_seconds']:.2f}", f"{row['gap']:.1%}")
        table.add_row(name, str(row["devices"]), *told, row["why"], row["otherwise"])
    Console(width=220).print(table)


if __name__ == "__main__":
    sys.exit(main())
