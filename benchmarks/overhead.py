"""What running a plan costs beside the hand-written ways: `python -m benchmarks.overhead [--json FILE] [--repeats N]`.

Two gloo ranks, each pinned to a core with one thread. Every group compares ways to train one model with one split. Its
contestants take turns (`benchmarks.protocol`), a sample is a few steps, and the figure is the ratio of their medians in
one run. Before timing the contestants' first losses are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks import opponents, records
from benchmarks.opponents import Size, Step
from benchmarks.protocol import TIE, interleaved
from benchmarks.records import Checked, Target
from shardplan.rewrite.program import Program

RANKS = 2
TARGETS = {"DTensor": 1.0, "torch pipelining": 1.0, "DDP": 1.02, "FSDP2": 1.02, "hand-written": 1.02, "eager": 1.0,
           "torch.compile": 1.0}  # fmt: skip
_PIPES = ("1f1b", *opponents.CHUNKED)
_PROGRAMS = {
    "one device": "one",
    "data parallel": "dp",
    "data parallel, 2 microbatches": "dp accumulating",
    "fully sharded": "zero3",
    "tensor parallel": "tp",
    "pipeline 1f1b, 4 microbatches": "pp 1f1b",
    "pipeline zbv, 4 microbatches": "pp zbv",
    "pipeline interleaved, 4 microbatches": "pp interleaved",
    "one device, compiled": "one",
}
"""Group -> which program of ours runs in it."""
_MICROBATCHES = 4
_SMALL, _LARGE = 64, 1 << 18  # elements
_CALLS = 50
_SPLITS = {"*.q.weight": 0, "*.k.weight": 0, "*.v.weight": 0, "*.up.weight": 0, "*.o.weight": 1, "*.down.weight": 1}


def programs(size: Size, wanted: Iterable[str]) -> dict[str, Program]:
    """What is run of ours, by name; the plans are made for described devices, so nothing is measured."""
    import shardplan as sp
    from shardplan.planner import schedules
    from shardplan.planner.export import trace_model
    from shardplan.planner.schedules import CHUNKED
    from shardplan.rewrite import compile

    model, ids, target = opponents.made(size)
    trace = trace_model(model, (ids,), loss_fn=opponents.loss_of, target=target)
    split = tuple(sp.split(glob, dim=dim) for glob, dim in _SPLITS.items())
    whole = tuple(sp.replicate(glob) for glob in ("embed.weight", "head.weight"))

    def program(devices: str, *constraints: Any, microbatches: int = 1, zero: int = 0, **settings: Any) -> Program:
        plan = sp.plan(
            model, devices, (ids, target), opponents.loss_of, opponents.adamw, constraints,
            microbatches=microbatches, rematerialize=False, zero=zero, cache=False, **settings,
        )  # fmt: skip
        return compile(trace, plan)

    def pipeline(kind: str) -> Program:
        """Even stages, two a rank where the schedule is of that kind."""
        chunks = 2 if kind in CHUNKED else 1
        count = RANKS * chunks
        pins = (sp.pin(f"layers.{i}.*", stage=i * count // size.layers) for i in range(size.layers))
        plan = sp.plan(
            model, f"{count}xh100", (ids, target), opponents.loss_of, opponents.adamw,
            (sp.degrees(dp=1, tp=1, pp=count), *pins), microbatches=_MICROBATCHES, rematerialize=False,
            schedule="1f1b", cache=False,
        )  # fmt: skip
        edges = {(link.source, link.target) for link in plan.links}
        lists = schedules.build(kind, count, _MICROBATCHES, edges, chunks=chunks)
        ranks = [(schedules.position_of(kind, stage, RANKS),) for stage in range(count)]
        stages = tuple(replace(stage, ranks=at) for stage, at in zip(plan.stages, ranks, strict=True))
        return compile(
            trace, replace(plan, devices=plan.devices[:RANKS], stages=stages, schedule=kind, instructions=lists)
        )

    twice = sp.degrees(dp=2, tp=1, pp=1)
    made: dict[str, Callable[[], Program]] = {
        "one": lambda: program("1xh100"),
        "dp": lambda: program("2xh100", twice),
        "dp accumulating": lambda: program("2xh100", twice, microbatches=2),
        "zero3": lambda: program("2xh100", twice, zero=3),
        "tp": lambda: program("2xh100", sp.degrees(dp=1, tp=2, pp=1), *split, *whole),
        **{f"pp {kind}": lambda kind=kind: pipeline(kind) for kind in _PIPES},
    }
    return {name: made[name]() for name in wanted}


def ours(program: Program, rank: int, size: Size, backend: str | None = None) -> Step:
    """A training step of the engine; its loss is that of the global batch, on every rank. backend: of torch.compile."""
    from shardplan.runtime.engine import Engine

    model, ids, target = opponents.made(size)
    engine = Engine({"train": program}, rank, RANKS, "cpu", opponents.adamw, backend=backend)
    engine.load_full({**dict(model.named_parameters()), **dict(model.named_buffers())})
    batch = dict(zip((spec.name for spec in sorted(program.inputs, key=lambda s: s.name)), (ids, target), strict=True))
    return lambda: engine.train_step(batch)


# -- in the ranks ------------------------------------------------------------------------------------------------------


def contests(found: dict[str, Program], rank: int, size: Size) -> dict[str, dict[str, Callable[[], Step]]]:
    """Group -> contestant -> what makes its step; ours is first."""
    return {
        "one device": {
            "ours": lambda: ours(found["one"], rank, size),
            "eager": lambda: opponents.eager(size),
        },
        "data parallel": {
            "ours": lambda: ours(found["dp"], rank, size),
            "DDP": lambda: opponents.ddp(size, rank, RANKS),
        },
        "data parallel, 2 microbatches": {
            "ours": lambda: ours(found["dp accumulating"], rank, size),
            "DDP": lambda: opponents.ddp_accumulating(size, rank, RANKS, 2),
        },
        "fully sharded": {
            "ours": lambda: ours(found["zero3"], rank, size),
            "FSDP2": lambda: opponents.fsdp2(size, rank, RANKS),
        },
        "tensor parallel": {
            "ours": lambda: ours(found["tp"], rank, size),
            "DTensor": lambda: opponents.dtensor_tp(size, RANKS),
            "hand-written": lambda: opponents.megatron(size, rank, RANKS),
        },
        **{
            f"pipeline {kind}, {_MICROBATCHES} microbatches": {
                "ours": lambda kind=kind: ours(found[f"pp {kind}"], rank, size),
                "torch pipelining": lambda kind=kind: opponents.torch_pipeline(size, rank, RANKS, _MICROBATCHES, kind),
            }
            for kind in _PIPES
        },
        "one device, compiled": {
            "ours": lambda: ours(found["one"], rank, size, "inductor"),
            "torch.compile": lambda: opponents.compiled(size),
        },
    }


def pieces(found: dict[str, Program], rank: int, repeats: int) -> dict[str, float]:
    """Microseconds: of an instruction beside its compute, and of collectives by their bytes, ours and torch's."""
    from shardplan.planner.placement import Mesh
    from shardplan.rewrite.program import StageRanks
    from shardplan.runtime.comm import DistComm
    from shardplan.runtime.groups import Groups

    placement = StageRanks(Mesh(("mb", "dp", "tp"), (1, 1, RANKS)), tuple(range(RANKS)))
    groups = Groups()
    groups.of_stage(placement, ("tp",))
    comm = DistComm(placement, rank, groups)
    functional: dict[str, Callable[[], object]] = {}
    for x in (torch.ones(_SMALL), torch.ones(_LARGE)):
        functional |= {
            f"all_reduce of {x.nbytes} B, ours": lambda x=x: comm.all_reduce(x, "tp"),
            f"all_reduce of {x.nbytes} B, torch": lambda x=x: dist.all_reduce(x.clone()),
            f"all_gather to {x.nbytes} B, ours": lambda x=x: comm.all_gather(x[: len(x) // RANKS], 0, "tp"),
            f"all_gather to {x.nbytes} B, torch": lambda x=x: dist.all_gather_into_tensor(
                torch.empty_like(x), x[: len(x) // RANKS]
            ),
            f"reduce_scatter of {x.nbytes} B, ours": lambda x=x: comm.reduce_scatter(x, 0, "tp"),
            f"reduce_scatter of {x.nbytes} B, torch": lambda x=x: dist.reduce_scatter_tensor(
                x.new_empty(len(x) // RANKS), x
            ),
            f"all_to_all of {x.nbytes} B, ours": lambda x=x: comm.all_to_all(x, 0, 0, "tp"),
            f"all_to_all of {x.nbytes} B, torch": lambda x=x: dist.all_to_all_single(torch.empty_like(x), x),
        }
    held: dict[str, list[float]] = {name: [] for name in functional}
    for _ in range(repeats):
        for name, call in functional.items():
            dist.barrier()
            started = time.perf_counter()
            for _ in range(_CALLS):
                call()
            held[name].append((time.perf_counter() - started) / _CALLS * 1e6)
    return {name: statistics.median(values) for name, values in held.items()} | _instructions(rank, repeats)


def _instructions(rank: int, repeats: int) -> dict[str, float]:
    """A program of one linear layer and many microbatches, against the same loop by hand."""
    import shardplan as sp
    from shardplan.planner.export import trace_model
    from shardplan.rewrite import compile
    from shardplan.runtime.engine import Engine

    count = 32
    model, x = torch.nn.Linear(4, 4), torch.randn(count, 4)

    def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output - target).square().mean()

    plan = sp.plan(model, "1xh100", (x, x), loss_of, opponents.adamw, microbatches=count, cache=False)
    trace = trace_model(model, (x,), loss_fn=loss_of, target=x)
    engine = Engine({"train": compile(trace, plan)}, rank, RANKS, "cpu")
    engine.load_full(dict(model.named_parameters()))
    executor = engine.executor("train")
    batch = dict(zip(sorted(plan.inputs), (x, x), strict=True))
    parts = list(zip(x.chunk(count), x.chunk(count), strict=True))
    run = executor.runs[0] if executor.runs else None
    functions: dict[str, list[float]] = {"ours": [], "loop": []}
    for _ in range(repeats):
        started = time.perf_counter()
        if run is not None:
            executor.run(batch)
        functions["ours"].append(time.perf_counter() - started)
        started = time.perf_counter()
        for one, two in parts:
            (loss_of(model(one), two) / count).backward()
        functions["loop"].append(time.perf_counter() - started)
    more = statistics.median(functions["ours"]) - statistics.median(functions["loop"])
    return {"instruction beside its compute": more / (2 * count) * 1e6}


def rank_main(rank: int, store: str, file: str, only: str, repeats: int, each: int, size: Size) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=120)
    )
    found: dict[str, Program] = torch.load(file, weights_only=False)
    report: dict[str, Any] = {}
    for group, makers in contests(found, rank, size).items():
        if only not in group:
            continue
        steps = {name: make() for name, make in makers.items()}
        losses = {name: _mean_loss(name, step()) for name, step in steps.items()}
        if max(losses.values()) - min(losses.values()) > 1e-3:
            raise SystemExit(f"{group}: the contestants compute different losses: {losses}")
        report[group] = interleaved(steps, repeats, each)
        del steps
    micros = pieces(found, rank, repeats)
    if rank == 0:
        Path(file).with_suffix(".json").write_text(json.dumps({"groups": report, "microseconds": micros}))
    dist.barrier()
    dist.destroy_process_group()


def _mean_loss(name: str, loss: torch.Tensor) -> float:
    """The loss of the global batch: ranks have their part's (DDP, FSDP2), all of it, or the last stage has it."""
    value = loss.detach().clone().float()
    dist.all_reduce(value)
    return float(value) / (1 if name == "torch pipelining" else RANKS)


# -- the table ---------------------------------------------------------------------------------------------------------


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for group, samples in report["groups"].items():
        mine = statistics.median(samples["ours"])
        for name, values in samples.items():
            if name != "ours":
                theirs = statistics.median(values)
                ratio = mine / theirs
                target = TARGETS[name]
                verdict = "ok" if ratio <= target else "tie" if ratio <= target * (1 + TIE) else "MISSED"
                found.append(
                    {"group": group, "against": name, "ours_ms": mine * 1e3, "theirs_ms": theirs * 1e3,
                     "ratio": ratio, "target": target, "verdict": verdict}
                )  # fmt: skip
    return found


def checked(table: list[dict[str, Any]]) -> list[Checked]:
    """The targets; a tie is not a miss."""
    return [
        Target(f"{row['group']}: step to {row['against']}", row["target"] * (1 + TIE)).check(row["ratio"])
        for row in table
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="where to write the samples and ratios")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="in a sample")
    parser.add_argument("--only", default="", help="groups whose name contains this")
    parser.add_argument("--width", type=int, default=Size().width)
    given = parser.parse_args()
    size = Size(width=given.width)
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory(prefix="shardplan-overhead-") as directory:
        file = f"{directory}/programs.pt"
        wanted = dict.fromkeys(name for group, name in _PROGRAMS.items() if given.only in group)
        torch.save(programs(size, wanted), file)
        arguments = (f"{directory}/store", file, given.only, given.repeats, given.steps, size)
        mp.spawn(rank_main, arguments, nprocs=RANKS)  # pyright: ignore[reportPrivateImportUsage]
        report = json.loads(Path(file).with_suffix(".json").read_text())
    table = rows(report)
    print(f"{'group':32} {'against':18} {'ours ms':>9} {'theirs':>9} {'ratio':>7} {'target':>7}")
    for row in table:
        print(
            f"{row['group']:32} {row['against']:18} {row['ours_ms']:9.2f} {row['theirs_ms']:9.2f}"
            f" {row['ratio']:7.3f} {row['target']:7.2f} {row['verdict']}"
        )
    for name, value in report["microseconds"].items():
        print(f"{name:51} {value:9.2f} us")
    if given.json:
        records.write(Path(given.json), "overhead", checked(table), rows=table, **report)
    return 7 if any(row["verdict"] == "MISSED" for row in table) else 0


if __name__ == "__main__":
    sys.exit(main())
