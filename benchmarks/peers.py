"""The same work by the ways that people use today, in one run: step, memory, planning and the lines that one writes.

    python -m benchmarks.peers [--rate 1000] [--repeats 7] [--published] [-o FILE] [--loopback]

Two ranks on an emulated link train one decoder on one batch: shardplan (which chooses its plan, with costs profiled on
the spot), DistributedDataParallel, FSDP2, parallelize_module, torch.distributed.pipelining and, where it is installed,
accelerate's device_map. First losses are compared; then all take their steps in turn (`benchmarks.protocol`). Memory is
the most that is alive in a step on the fullest rank. Lines are those of the function that makes a contestant, without
what all have in common (model, batch, loss, optimizer). --published: figures that others published, beside what
shardplan plans and predicts for the same job (`benchmarks/peers.toml`); a minute more.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks import opponents, records
from benchmarks.cluster import EmulatedCluster, missing, uniform
from benchmarks.opponents import Size, Step
from benchmarks.protocol import TIE, interleaved
from benchmarks.records import Target

RANKS = 2
OURS = "shardplan"
_MICROBATCHES = 4
_FACTS = Path(__file__).parent / "peers.toml"
TARGETS = (Target("ours over the fastest peer", 1 + TIE),)


def makers(size: Size, rank: int) -> dict[str, Callable[[], Step]]:
    """Contestant -> what makes its step."""
    found: dict[str, Callable[[], Step]] = {
        OURS: lambda: opponents.planned(size, RANKS),
        "DDP": lambda: opponents.ddp(size, rank, RANKS),
        "FSDP2": lambda: opponents.fsdp2(size, rank, RANKS),
        "parallelize_module": lambda: opponents.dtensor_tp(size, RANKS),
        "torch pipelining": lambda: opponents.torch_pipeline(size, rank, RANKS, _MICROBATCHES),
        "one device": lambda: opponents.eager(size),
    }
    if importlib.util.find_spec("accelerate") is not None:
        found["accelerate device_map"] = lambda: opponents.device_map(size)
    return found


_WRITTEN: dict[str, tuple[Any, ...]] = {
    OURS: (opponents.planned, opponents.Planned.__call__),
    "DDP": (opponents.ddp,),
    "FSDP2": (opponents.fsdp2,),
    "parallelize_module": (opponents.dtensor_tp,),
    "torch pipelining": (opponents.torch_pipeline, opponents.Half),
    "one device": (opponents.eager,),
    "accelerate device_map": (opponents.device_map,),
}


def lines_of(*written: Any) -> int:
    """Lines of code of functions and classes: no blank lines, comments, docstrings or signatures of functions."""
    total = 0
    for item in written:
        text = inspect.getsource(item).replace(f'"""{item.__doc__}"""', "")
        lines = [line.strip() for line in text.splitlines()]
        total += sum(1 for line in lines if line and not line.startswith(("#", "@"))) - 1
    return total


# -- on a rank ---------------------------------------------------------------------------------------------------------


def _on_rank(rank: int, size: Size, repeats: int, folder: str) -> dict[str, Any]:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": "0", "SHARDPLAN_CACHE": folder}
    steps: dict[str, Step] = {}
    setup: dict[str, float] = {}
    for name, make in makers(size, rank).items():
        started = time.process_time()
        steps[name] = make()
        setup[name] = time.process_time() - started
    losses = {name: _mean_loss(name, step()) for name, step in steps.items()}
    if max(losses.values()) - min(losses.values()) > 1e-3:
        raise ValueError(f"the contestants compute different losses: {losses}")
    samples = interleaved(steps, repeats)
    peaks = {}
    for name, step in steps.items():
        dist.barrier()
        peak = torch.tensor(_peak(step))
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        peaks[name] = int(peak)
    ours = steps[OURS]
    assert isinstance(ours, opponents.Planned)
    plan = ours.pm.plan
    told = {"plan": plan.degrees(), "predicted_seconds": plan.step_seconds}
    return {"samples": samples, "setup_seconds": setup, "peak_nbytes": peaks, "losses": losses, **told}


def _mean_loss(name: str, loss: torch.Tensor) -> float:
    """The loss of the global batch: ranks have their part's, all of it, or the last stage has it."""
    value = loss.detach().clone().float()
    dist.all_reduce(value)
    return float(value) / (1 if name == "torch pipelining" else RANKS)


def _peak(step: Step) -> int:
    """Bytes on this rank."""
    from shardplan.runtime.live_bytes import peak_of

    if isinstance(step, opponents.Planned):
        ids, target = step.batch
        return step.pm.measure(ids, target=target, steps=1).peak_nbytes[dist.get_rank()]
    return peak_of(step, torch.device("cpu"), _held(step))


def _held(step: Step) -> list[torch.Tensor]:
    """Tensors that stay between steps: of the modules and optimizers that the step refers to."""
    found: list[torch.Tensor] = []
    for cell in getattr(step, "__closure__", None) or ():
        value = cell.cell_contents
        if isinstance(value, torch.nn.Module):
            for tensor in (*value.parameters(), *value.buffers()):
                found += [tensor, *([tensor.grad] if tensor.grad is not None else [])]
        elif isinstance(value, torch.optim.Optimizer):
            found += [x for state in value.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    return [getattr(tensor, "_local_tensor", tensor) for tensor in found]


# -- published figures -------------------------------------------------------------------------------------------------


def published(index: int) -> dict[str, float]:
    """Our figures for a published job; runs in a process of its own. planning_seconds: of the processor."""
    from benchmarks.tracing import SHAPES, build
    from shardplan.planner.cluster import Cluster
    from shardplan.planner.costs.links import LinkModel
    from shardplan.planner.costs.model import CostModel
    from shardplan.planner.export import trace_model
    from shardplan.planner.search import SolveOptions, solve
    from shardplan.runtime.meta import meta_model

    fact = facts()["published"][index]
    torch.set_num_threads(1)
    model = meta_model(lambda: build(SHAPES[fact["model"]], fact["seq"])).train()
    ids = torch.empty((fact["batch"], fact["seq"]), dtype=torch.int64, device="meta")
    cluster = Cluster.preset("dgx-h100", nodes=fact["devices"] // 8)
    costs = CostModel(cluster, LinkModel(cluster, None), None, measure=False)
    started = time.process_time()
    plan = solve(trace_model(model, (), {"input_ids": ids, "labels": ids}), cluster, costs, SolveOptions())
    return {
        "planning_seconds": time.process_time() - started,
        "predicted_step_seconds": plan.step_seconds,
        "plan": plan.degrees(),
    }  # type: ignore[return-value]


def facts() -> dict[str, Any]:
    return tomllib.loads(_FACTS.read_text())


def _published() -> list[dict[str, Any]]:
    found = []
    for index, fact in enumerate(facts()["published"]):
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers", "--one-published", str(index)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found.append({**fact, **json.loads(done.stdout.splitlines()[-1])})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=1000.0, help="of the link, in Mbit/s; 0: unlimited")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--width", type=int, default=Size().width)
    parser.add_argument("--published", action="store_true", help="also plan what others published figures of")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--loopback", action="store_true", help="no links: needs no root")
    parser.add_argument("--one-published", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one_published is not None:
        print(json.dumps(published(given.one_published)))
        return 0
    if not given.loopback and (why := missing()):
        print(f"no emulated links here: {why} (or --loopback)", file=sys.stderr)
        return 2
    links = uniform(RANKS, given.rate)
    size = Size(width=given.width)
    with (
        tempfile.TemporaryDirectory(prefix="shardplan-peers-") as folder,
        EmulatedCluster(links, loopback=given.loopback) as cluster,
    ):
        answers = cluster.run(_on_rank, size, given.repeats, folder)
    rows = _rows(answers[0])
    others = _published() if given.published else records.read(given.output).get("published", [])
    _show(rows, others, links.name, Console(width=180))
    ours = rows[0]["seconds"]
    fastest = min(row["seconds"] for row in rows[1:])
    checked = [target.check(ours / fastest) for target in TARGETS]
    told = {name: answers[0][name] for name in ("plan", "predicted_seconds", "samples")}
    records.write(given.output, "peers", checked, links=links.name, rows=rows, published=others, **told)
    for target in checked:
        print(f"{'' if target.met else 'MISSED: '}{target}")
    return 0 if all(target.met for target in checked) else 7


def _rows(answer: dict[str, Any]) -> list[dict[str, Any]]:
    told = facts()["contestant"]
    return [
        {
            "name": name,
            "seconds": statistics.median(samples),
            "setup_seconds": answer["setup_seconds"][name],
            "peak_nbytes": answer["peak_nbytes"][name],
            "lines": lines_of(*_WRITTEN[name]),
            **told[name],
        }
        for name, samples in answer["samples"].items()
    ]


def _show(rows: list[dict[str, Any]], others: list[dict[str, Any]], links: str, console: Console) -> None:
    table = Table(title=f"One decoder, two ranks, {links}")
    for column in ("", "step ms", "to ours", "set-up CPU s", "peak MiB", "lines", "a person decides", "cannot"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['seconds'] * 1e3:.1f}",
            f"{row['seconds'] / rows[0]['seconds']:.2f}",
            f"{row['setup_seconds']:.1f}",
            f"{row['peak_nbytes'] / 2**20:.0f}",
            str(row["lines"]),
            row["decides"],
            row["cannot"],
        )
    console.print(table)
    for other in others:
        console.print(
            f"{other['what']}: published {other['theirs_seconds']:g} s ({other['parts']}; {other['source']}), "
            f"ours {other[other['ours']]:.3g} s {other['ours'].replace('_', ' ')}, {other['plan']}"
        )


if __name__ == "__main__":
    from benchmarks import peers  # ranks import what they run by its name

    sys.exit(peers.main())
