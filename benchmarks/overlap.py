"""Do gradient sums hide behind backward? `python -m benchmarks.overlap [--job usual] [--json FILE]`

Two ranks on an emulated link whose rate is chosen so that summing the gradients takes as long as backward. The link is
profiled, and the data-parallel plan made for what was found (its buckets are the planner's choice). Measured, in turn
within each repeat: a step of forward and backward, the same with all sums after backward, the compute alone (the same
stage without sums), the sums alone, and DistributedDataParallel in buckets of its usual size and of the plan's. Shown:
each / max(compute, sums), wanted of ours <= 1.15. Needs what `benchmarks.cluster` needs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import shardplan as sp
from benchmarks import jobs, records
from benchmarks.cluster import EmulatedCluster, missing, uniform
from benchmarks.records import Target
from shardplan.planner.cluster import Cluster
from shardplan.planner.costs.links import LinkModel
from shardplan.planner.costs.model import CostModel
from shardplan.planner.costs.store import Store
from shardplan.planner.export import trace_model
from shardplan.planner.plan import Plan
from shardplan.planner.search import SolveOptions, solve
from shardplan.rewrite import compile
from shardplan.runtime.engine import Engine
from shardplan.runtime.measure_links import measure_links, plan_groups

TARGET = Target("overlapped / max(compute, sums)", 1.15)
RANKS = 2
_WARM_UPS = 2
_LINK_SECONDS = 6.0
_DDP_MIB = 25
_held: dict[str, Any] = {}


def prepare(rank: int, job: str) -> tuple[float, int]:
    """Load the job on both ranks. -> (seconds of a backward, bytes of gradients)."""
    torch.manual_seed(0)
    model, (ids, target), loss_fn = jobs.make(job)
    assert loss_fn is not None
    trace = trace_model(model, (ids,), loss_fn=loss_fn, target=target)
    _held.update(model=model, trace=trace, batch=(ids, target), loss_fn=loss_fn)
    seconds = []
    for _ in range(5):
        loss = loss_fn(model(ids.chunk(RANKS)[rank]), target.chunk(RANKS)[rank])
        started = time.perf_counter()
        loss.backward()
        seconds.append(time.perf_counter() - started)
    model.zero_grad()
    slowest = torch.tensor(statistics.median(seconds), dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest), sum(p.numel() * p.element_size() for p in model.parameters())


def load(rank: int) -> int:
    """Make the plan for the links of the moment and load it. -> its bucket size."""
    tables = measure_links(plan_groups(RANKS), budget_seconds=_LINK_SECONDS)
    trace, (ids, target), model = _held["trace"], _held["batch"], _held["model"]
    texts = [""]
    if rank == 0:
        cluster = Cluster.parse(RANKS)
        costs = CostModel(cluster, LinkModel(cluster, tables), Store(":memory:"), model=trace.fingerprint)
        options = SolveOptions(
            constraints=(sp.degrees(dp=RANKS, tp=1, pp=1),), microbatches=1, rematerialize=False, zero=0, hints=False
        )
        texts = [solve(trace, cluster, costs, options).to_json()]
    dist.broadcast_object_list(texts, 0)
    plan = Plan.from_json(texts[0])
    engine = Engine({"train": compile(trace, plan)}, rank, RANKS, "cpu")
    engine.load_full({**dict(model.named_parameters()), **dict(model.named_buffers())})
    names = [s.name for s in trace.sources.values() if s.kind == "input"]
    inputs = {name: target if name == "target" else ids for name in names}
    _held.update(engine=engine, executor=engine.executor("train"), inputs=inputs, bucket=plan.bucket_nbytes)
    return plan.bucket_nbytes


def _ddp(rank: int, mib: float) -> Callable[[], None]:
    wrapped = torch.nn.parallel.DistributedDataParallel(
        copy.deepcopy(_held["model"]),
        gradient_as_bucket_view=True,
        bucket_cap_mb=mib,  # pyright: ignore
    )
    ids, target = (value.chunk(RANKS)[rank] for value in _held["batch"])

    def step() -> None:
        wrapped.zero_grad()
        _held["loss_fn"](wrapped(ids), target).backward()

    return step


def measure(rank: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of the slowest rank, by what ran."""
    engine, executor, inputs = _held["engine"], _held["executor"], _held["inputs"]
    sums = executor.sums
    run, arm = executor.runs[0], executor.runs[0].arm

    def step() -> None:
        run.arm = arm
        executor.run(inputs)

    def afterwards() -> None:
        run.arm = lambda: None
        executor.run(inputs)
        run.arm = arm

    def compute() -> None:
        run.start(inputs, run.shared)
        run.count()
        with torch.enable_grad():
            for instruction in executor.instructions[:2]:
                run.handler(instruction.op)(0, instruction)
        run.finish()

    def alone() -> None:
        for bucket in sums_buckets:
            bucket.start()
            bucket.launch()
        for bucket in sums_buckets:
            bucket.wait()

    engine.zero_grad()
    step()
    sums_buckets = [bucket for stage in sums._stages.values() for bucket in stage.buckets]
    bucket_mib = _held["bucket"] / (1 << 20)
    functions = {"overlapped": step, "afterwards": afterwards, "compute": compute, "sums": alone}
    for mib in dict.fromkeys((_DDP_MIB, bucket_mib)):
        functions[f"DDP, {mib:g} MiB"] = _ddp(rank, mib)
    found: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(-_WARM_UPS, repeats):
        for name, function in functions.items():
            if name != "sums":
                engine.zero_grad()
                sums.start()
            dist.barrier()
            started = time.perf_counter()
            function()
            seconds = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            if repeat >= 0:
                found[name].append(float(seconds))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", default="usual")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json")
    given = parser.parse_args()
    if why := missing():
        print(f"no emulated links here: {why}", file=sys.stderr)
        return 2
    with EmulatedCluster(uniform(RANKS)) as cluster:
        backward, nbytes = cluster.run(prepare, given.job)[0]
        rate = round(nbytes * 8 / backward / 1e6)
        cluster.change(uniform(RANKS, rate))
        time.sleep(0.2)
        bucket = cluster.run(load)[0]
        samples = cluster.run(measure, given.repeats)[0]
    median = {name: statistics.median(values) for name, values in samples.items()}
    limit = max(median["compute"], median["sums"])
    ratio = median["overlapped"] / limit
    print(
        f"{given.job}: {nbytes / 1e6:.1f} MB of gradients in buckets of {bucket / (1 << 20):g} MiB,"
        f" backward {backward * 1e3:.0f} ms, link {rate} Mbit/s"
    )
    for name, seconds in median.items():
        print(f"{name:14} {seconds * 1e3:8.1f} ms   {seconds / limit:.2f} x max(compute, sums)")
    checked = TARGET.check(ratio)
    print(f"{'' if checked.met else 'MISSED: '}{checked}")
    if given.json:
        facts = {"job": given.job, "rate_mbit": rate, "nbytes": nbytes, "bucket_nbytes": bucket, "ratio": ratio}
        records.write(Path(given.json), "overlap", [checked], **facts, samples=samples)
    return 0 if checked.met else 7


if __name__ == "__main__":
    from benchmarks import overlap  # ranks keep what they hold in the module, which they import by its name

    sys.exit(overlap.main())
