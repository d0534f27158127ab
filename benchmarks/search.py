"""How long the search takes, and what it proves: models on clusters that are only described (H100 presets).

    python -m benchmarks.search [NAME ...] [--time-limit 60] [--profile] [-o benchmarks/results/search.json]

NAME: "8b@8", "70b@512", ... (default: all). A row is a process of its own: seconds of the processor for trace, solve
and the whole process, peak memory, the plan, its bound and gap. --profile: where the time of the search goes, by
function. Needs the package transformers. -o: keep the figures, and the targets that they met or missed.

The models are in ``benchmarks/search_models.py``.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from search_models import MIXTURES, ROWS, inputs_of, model_of

from benchmarks import records
from shardplan.planner.cluster import Cluster
from shardplan.planner.costs.links import LinkModel
from shardplan.planner.costs.model import CostModel
from shardplan.planner.export import trace_model
from shardplan.planner.search import SolveOptions, solve


def measure(name: str, time_limit: float, profiled: bool) -> dict[str, Any]:
    """Runs in a process of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    row = ROWS[name]
    model, inputs = model_of(row), inputs_of(row)
    began = time.process_time()
    trace = trace_model(model, (), inputs)
    found: dict[str, Any] = {"trace": time.process_time() - began, "segments": len(trace.segments)}
    cluster = Cluster.preset("dgx-h100", nodes=row.devices // 8)
    costs = CostModel(cluster, LinkModel(cluster, None), None, measure=False)
    options = SolveOptions(time_limit=time_limit, optimizer_factor=2.0)
    profiler = cProfile.Profile()
    if profiled:
        profiler.enable()
    began = time.process_time()
    plan = solve(trace, cluster, costs, options)
    found["solve"] = time.process_time() - began
    if profiled:
        profiler.disable()
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("cumtime").print_stats(40)
    return found | {
        "plan": plan.degrees(),
        "step": plan.step_seconds,
        "bound": plan.status.lower_bound,
        "gap": plan.status.gap,
        "outcome": plan.status.outcome,
        "searched": plan.status.searched,
        "whole": time.process_time(),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def figures(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What two runs can be compared by."""
    return {f"{name}: {what}": row[what] for name, row in rows.items() for what in ("solve", "gap")}


def targets(rows: dict[str, dict[str, Any]]) -> list[records.Checked]:
    """Of every row."""
    found = []
    for name, row in rows.items():
        most = 30.0 if ROWS[name].model in MIXTURES else 15.0
        found.append(records.Target(f"{name}: CPU seconds of the search", most).check(row["solve"]))
        found.append(records.Target(f"{name}: gap", 0.01).check(row["gap"]))
        found.append(records.Target(f"{name}: CPU seconds of the whole process", 90.0).check(row["whole"]))
        found.append(records.Target(f"{name}: GiB of memory at most", 4.0).check(row["peak"] / 2**30))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=list(ROWS))
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds for the search")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="keep the figures")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.rows) - set(ROWS):
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    if given.in_process:
        print(json.dumps(measure(given.rows[0], given.time_limit, given.profile)))
        return 0
    table = Table(title="Search on H100 presets")
    for column in (
        "model@devices",
        "trace CPU s",
        "solve CPU s",
        "whole CPU s",
        "GiB",
        "plan",
        "step s",
        "bound s",
        "gap",
        "cases",
    ):
        table.add_column(column, justify="left" if column == "plan" else "right")
    rows: dict[str, dict[str, Any]] = {}
    for name in given.rows:
        command = [sys.executable, __file__, name, "--in-process", "--time-limit", str(given.time_limit)]
        command += ["--profile"] if given.profile else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            table.add_row(name, "failed")
            continue
        found = rows[name] = json.loads(done.stdout.splitlines()[-1])
        records.write(given.output, "search", targets(rows), rows=rows, comparable=figures(rows))
        table.add_row(
            name,
            f"{found['trace']:.1f}",
            f"{found['solve']:.1f}",
            f"{found['whole']:.1f}",
            f"{found['peak'] / 2**30:.2f}",
            found["plan"],
            f"{found['step']:.3f}",
            f"{found['bound']:.3f}",
            f"{found['gap']:.2%}",
            "/".join(str(count) for count in found["searched"].values()),
        )
    Console(width=160).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
