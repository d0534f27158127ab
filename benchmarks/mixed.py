"""The search on unequal devices: 16 of four kinds with unequal links, 32 blocks; more devices; memory that binds.

    python -m benchmarks.mixed [NAME ...] [--time-limit 300] [--profile] [-o benchmarks/results/mixed.json]

Prints seconds of the processor, the plan's stages, its bound and gap, and what the same devices reach with hand-made
arrangements. Needs the package transformers.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import records
from benchmarks.records import Target
from shardplan.planner.cluster import Cluster
from shardplan.planner.costs.links import LinkModel
from shardplan.planner.costs.model import CostModel
from shardplan.planner.export import trace_model
from shardplan.planner.search import SolveOptions, solve
from shardplan.runtime.meta import meta_model

LINKS = {"h100": ("450 GB/s", "50 GB/s"), "a100-40g": ("300 GB/s", "25 GB/s"), "l40s": ("25 GB/s", "12.5 GB/s"),
         "a10g": ("12 GB/s", "3 GB/s"), "l4": ("12 GB/s", "3 GB/s"), "t4": ("6 GB/s", "3 GB/s")}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """nodes: (devices, kind) of each. blocks, hidden: of a Llama-like model; batch: sequences a step."""

    nodes: tuple[tuple[int, str], ...]
    blocks: int
    hidden: int
    batch: int
    seq: int


_FOUR = (4, "h100"), (4, "a100-40g"), (4, "l40s"), (4, "a10g")
_FIRST = "16 of four kinds"
ROWS = {
    _FIRST: Row(_FOUR, 32, 2048, 64, 2048),
    "16 of four kinds, memory binds": Row(_FOUR, 32, 4096, 64, 4096),
    "32 of three kinds": Row(((8, "a100-40g"), (8, "a100-40g"), (8, "l4"), (8, "t4")), 32, 2048, 64, 2048),
    "64 of two kinds": Row(((8, "h100"),) * 4 + ((8, "a100-40g"),) * 4, 32, 4096, 256, 2048),
    "nodes of unequal size": Row(((8, "h100"), (4, "h100"), (2, "a100-40g")), 32, 2048, 64, 2048),
}


def cluster_of(row: Row) -> Cluster:
    text = "schema = 1\n"
    for count, kind in row.nodes:
        inside, outside = LINKS[kind]
        text += f'[[node]]\ndevices = "{count} x {kind}"\n'
        text += f'link = {{ bandwidth = "{inside}", latency = "5 us" }}\n'
        text += f'uplink = {{ bandwidth = "{outside} per node", latency = "15 us" }}\n'
    return Cluster.from_toml(text)


def model_of(row: Row) -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=row.hidden,
        intermediate_size=row.hidden * 11 // 4,
        num_hidden_layers=row.blocks,
        num_attention_heads=row.hidden // 128,
        num_key_value_heads=8,
        max_position_embeddings=row.seq,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return meta_model(lambda: LlamaForCausalLM(config).bfloat16()).train()


def measure(name: str, time_limit: float, profiled: bool, console: Console) -> dict[str, Any]:
    """What a row came to."""
    row = ROWS[name]
    ids = torch.empty((row.batch, row.seq), dtype=torch.int64, device="meta")
    trace = trace_model(model_of(row), (), {"input_ids": ids, "labels": ids})
    cluster = cluster_of(row)
    costs = CostModel(cluster, LinkModel(cluster, None), None, measure=False)
    options = SolveOptions(
        time_limit=time_limit, optimizer_factor=2.0, progress=lambda text: print(text, file=sys.stderr)
    )
    profiler = cProfile.Profile()
    if profiled:
        profiler.enable()
    began = time.process_time()
    plan = solve(trace, cluster, costs, options)
    seconds = time.process_time() - began
    if profiled:
        profiler.disable()
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("cumtime").print_stats(30)
    table = Table(
        title=f"{name}: {len(trace.segments)} segments, solved in {seconds:.1f} CPU s; step {plan.step_seconds:.3f} s, "
        f"bound {plan.status.lower_bound:.3f} s, gap {plan.status.gap:.2%}; {plan.microbatches} microbatches"
    )
    for column in ("stage", "devices", "dp x tp", "segments", "recomputed", "ms", "peak GiB", "limit GiB"):
        table.add_column(column, justify="right")
    for number, stage in enumerate(plan.stages):
        kinds = ", ".join(sorted({plan.devices[r].kind for r in stage.ranks}))
        table.add_row(
            str(number),
            f"{len(stage.ranks)} x {kinds}",
            f"{stage.mesh.size('dp')} x {stage.mesh.size('tp')}",
            str(stage.last - stage.first),
            str(len(stage.rematerialized)),
            f"{1e3 * (stage.forward_seconds + stage.backward_seconds):.1f}",
            f"{stage.memory.peak_nbytes / 2**30:.1f}",
            f"{stage.memory.limit / 2**30:.1f}",
        )
    console.print(table)
    for other in plan.baselines:
        seconds_text = f"{other.seconds:.3f} s" if other.seconds is not None else "-"
        console.print(f"  {other.name}: {seconds_text} ({other.reason})")
    hand = [other.seconds for other in plan.baselines if other.seconds is not None]
    return {
        "cpu_seconds": seconds,
        "step_seconds": plan.step_seconds,
        "bound_seconds": plan.status.lower_bound,
        "gap": plan.status.gap,
        "microbatches": plan.microbatches,
        "stages": [[len(s.ranks), plan.devices[s.ranks[0]].kind, s.last - s.first] for s in plan.stages],
        "best_by_hand_seconds": min(hand, default=None),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=list(ROWS))
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds for the search")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("-o", "--output", type=Path, help="where to write the figures")
    given = parser.parse_args()
    if unknown := set(given.rows) - set(ROWS):
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    console = Console(width=160)
    rows: dict[str, dict[str, Any]] = {}
    for name in given.rows:
        rows[name] = measure(name, given.time_limit, given.profile, console)
        checked = []
        if (first := rows.get(_FIRST)) is not None:
            checked = [
                Target(f"{_FIRST}, CPU seconds", 60.0).check(first["cpu_seconds"]),
                Target(f"{_FIRST}, gap", 0.02).check(first["gap"]),
            ]
        records.write(given.output, "mixed", checked, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
