"""Do gradient sums hide behind backward? `python -m benchmarks.overlap [--job usual] [--json FILE]`

Two ranks on an emulated link whose rate is chosen so that summing the gradients takes as long as backward. Measured, in
turn within each repeat: a data-parallel step of forward and backward, the same step with all sums after backward, the
compute alone (the same stage without sums) and the sums alone. Shown: step / max(compute, sums), wanted <= 1.15.
Needs what `benchmarks.cluster` needs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import jobs
from benchmarks.cluster import EmulatedCluster, missing, uniform

TARGET = 1.15
RANKS = 2
_WARM_UPS = 2
_held: dict[str, Any] = {}


def prepare(rank: int, job: str) -> tuple[float, int]:
    """Load the job on both ranks. -> (seconds of a backward, bytes of gradients)."""
    import shardplan as sp
    from shardplan.planner.export import trace_model
    from shardplan.rewrite import compile
    from shardplan.runtime.engine import Engine

    torch.manual_seed(0)
    model, batch, loss_fn = jobs.make(job)
    ids, target = batch
    plan = sp.plan(
        model, "2xh100", batch, loss_fn, None, (sp.degrees(dp=2, tp=1, pp=1),),
        microbatches=1, rematerialize=False, zero=0, cache=False,
    )  # fmt: skip
    trace = trace_model(model, (ids,), loss_fn=loss_fn, target=target)
    engine = Engine({"train": compile(trace, plan)}, rank, RANKS, "cpu")
    engine.load_full({**dict(model.named_parameters()), **dict(model.named_buffers())})
    names = [s.name for s in trace.sources.values() if s.kind == "input"]
    inputs = {name: target if name == "target" else ids for name in names}
    executor = engine.executor("train")
    executor.spans = spans = []
    for _ in range(3):
        engine.zero_grad()
        executor.run(inputs)
    executor.spans = None
    backward = statistics.median(s.end - s.ready for s in spans if str(s.instruction).startswith("0B"))
    nbytes = sum(p.numel() * p.element_size() for _, p in engine.named_parameters())
    _held.update(engine=engine, executor=executor, inputs=inputs)
    return backward, nbytes


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
    found: dict[str, list[float]] = {"overlapped": [], "afterwards": [], "compute": [], "sums": []}
    for repeat in range(-_WARM_UPS, repeats):
        for name, function in zip(found, (step, afterwards, compute, alone), strict=True):
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
        samples = cluster.run(measure, given.repeats)[0]
    median = {name: statistics.median(values) for name, values in samples.items()}
    limit = max(median["compute"], median["sums"])
    ratio = median["overlapped"] / limit
    print(f"{given.job}: {nbytes / 1e6:.1f} MB of gradients, backward {backward * 1e3:.0f} ms, link {rate} Mbit/s")
    for name, seconds in median.items():
        print(f"{name:12} {seconds * 1e3:8.1f} ms   {seconds / limit:.2f} x max(compute, sums)")
    print(f"overlapped / max(compute, sums) = {ratio:.3f}, wanted <= {TARGET}: {'ok' if ratio <= TARGET else 'MISSED'}")
    if given.json:
        facts = {"schema": 1, "job": given.job, "rate_mbit": rate, "nbytes": nbytes, "ratio": ratio, "samples": samples}
        Path(given.json).write_text(json.dumps(facts))
    return 0 if ratio <= TARGET else 7


if __name__ == "__main__":
    from benchmarks import overlap  # ranks keep what they hold in the module, which they import by its name

    sys.exit(overlap.main())
