"""Our plan beside the plan that experts published, for the same model, devices and batch; both costs in our model.

    python benchmarks/expert_plans.py [ID ...] [--time-limit 40] [--json FILE]

ID: as in the first column (default: all). Every configuration is traced at its published shape on the meta device and
searched twice: freely, and with the published degrees, microbatches, recomputation and storage split. The last column
is what the free plan does less of, from the figures of the two plans; "outside the search" says what the experts used
that our search doesn't plan, so that their real plan may be better than their cost here.

Sources: benchmarks/published/megatron_2021.toml (Narayanan et al. 2021, table 1), benchmarks/published/llama3.toml
(Llama team 2024, table 4).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from tracing import Shape, build

from shardplan.errors import ShardplanError
from shardplan.planner.cluster import Cluster
from shardplan.planner.constraints import degrees
from shardplan.planner.costs.links import LinkModel
from shardplan.planner.costs.model import CostModel
from shardplan.planner.export import trace_model
from shardplan.planner.plan import Plan
from shardplan.planner.search import SolveOptions, solve
from shardplan.runtime.meta import meta_model

PUBLISHED = Path(__file__).parent / "published"
_PRESETS = {"a100-80g": "dgx-a100", "h100": "dgx-h100"}


@dataclass(frozen=True, slots=True)
class Expert:
    """One published configuration. recompute: of every block; zero: storage level; outside: see module docstring."""

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    seq: int
    batch: int
    kind: str
    dp: int
    tp: int
    pp: int
    micro_batch: int
    recompute: bool
    zero: int
    outside: str

    @property
    def devices(self) -> int:
        return self.dp * self.tp * self.pp


def experts() -> dict[str, Expert]:
    """The published configurations, by name. Rows with context parallelism are left out."""
    found = {}
    for name in ("megatron_2021", "llama3"):
        table = tomllib.loads((PUBLISHED / f"{name}.toml").read_text())
        for values in table["rows"]:
            row = {"cp": 1, "zero": 0, **table["common"], **dict(zip(table["columns"], values, strict=True))}
            if row["cp"] == 1:
                found[row["id"]] = _expert(row)
    return found


def _expert(row: dict[str, Any]) -> Expert:
    chunks = row.get("interleave", 1)
    return Expert(
        name=row["id"],
        family=row["family"],
        layers=row["layers"],
        hidden=row["hidden"],
        heads=row["heads"],
        kv_heads=row.get("kv_heads", row["heads"]),
        ffn=row.get("ffn", 4 * row["hidden"]),
        vocab=row["vocab"],
        seq=row["seq_len"],
        batch=row["global_batch"],
        kind=row["kind"],
        dp=row["dp"],
        tp=row["tp"],
        pp=row["pp"],
        micro_batch=row["micro_batch"],
        recompute=row.get("recompute") == "full",
        zero=row["zero"],
        outside=f"{chunks} chunks a rank" if chunks > 1 else "",
    )


def model_of(expert: Expert) -> nn.Module:
    if expert.family == "llama":
        shape = Shape(expert.layers, expert.hidden, expert.ffn, expert.heads)
        return meta_model(lambda: build(shape, expert.seq)).train()
    from transformers import GPT2Config, GPT2LMHeadModel

    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    shape = {"n_positions": expert.seq, "n_embd": expert.hidden, "n_layer": expert.layers, "n_head": expert.heads}
    config = GPT2Config(vocab_size=expert.vocab, **shape, **off)
    return meta_model(lambda: GPT2LMHeadModel(config).bfloat16()).train()


def measure(expert: Expert, time_limit: float) -> dict[str, Any]:
    """Runs in a process of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    ids = torch.empty((expert.batch, expert.seq), dtype=torch.int64, device="meta")
    trace = trace_model(model_of(expert), (), {"input_ids": ids, "labels": ids})
    cluster = Cluster.preset(_PRESETS[expert.kind], nodes=-(-expert.devices // 8))
    costs = CostModel(cluster, LinkModel(cluster, None), None, measure=False)
    ours = solve(trace, cluster, costs, SolveOptions(time_limit=time_limit))
    given = SolveOptions(
        constraints=(degrees(dp=expert.dp, tp=expert.tp, pp=expert.pp),),
        microbatches=expert.batch // expert.dp // expert.micro_batch,
        rematerialize=True if expert.recompute else "auto",
        zero=expert.zero,
        time_limit=time_limit,
        hints=False,
    )
    found: dict[str, Any] = {"ours": described(ours), "gap": ours.status.gap, "ours_seconds": ours.step_seconds}
    try:
        theirs = solve(trace, cluster, costs, given)
    except ShardplanError as error:
        return found | {"theirs": "-", "theirs_seconds": None, "why": str(error).splitlines()[0]}
    return found | {
        "theirs": described(theirs),
        "theirs_seconds": theirs.step_seconds,
        "why": "; ".join(reasons(ours, theirs)) or "the same arrangement",
    }


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
    parser.add_argument("--time-limit", type=float, default=40.0, help="seconds of each search")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.ids) - set(known):
        parser.error(f"no configuration {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if given.in_process:
        print(json.dumps(measure(known[given.ids[0]], given.time_limit)))
        return 0
    table = Table(title="Published plans and ours, both costs in our model", show_lines=True)
    for column in ("model", "devices", "published", "s", "ours", "s", "gap", "why", "outside the search"):
        table.add_column(column)
    rows: dict[str, dict[str, Any]] = {}
    for name in given.ids:
        command = [sys.executable, __file__, name, "--in-process", "--time-limit", str(given.time_limit)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            table.add_row(name, "failed")
            continue
        found = rows[name] = json.loads(done.stdout.splitlines()[-1])
        theirs = "-" if found["theirs_seconds"] is None else f"{found['theirs_seconds']:.2f}"
        ours = f"{found['ours_seconds']:.2f}"
        expert = known[name]
        row = (name, str(expert.devices), found["theirs"], theirs, found["ours"], ours, f"{found['gap']:.1%}")
        table.add_row(*row, found["why"], expert.outside)
    Console(width=200).print(table)
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
