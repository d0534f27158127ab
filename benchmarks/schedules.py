"""Step time of the same pipeline under every schedule, on two CPU ranks, beside what the simulator says of it.

    python -m benchmarks.schedules [--layers 8] [--width 256] [--batch 16] [--microbatches 8] [--rounds 12]

All schedules run in turn in every round; the figure is the median. The simulator is given equal stages, a forward and
both parts of a backward of one unit each, and messages that take no time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from train_byte_gpt import ByteGPT

from shardplan.planner.export import trace_model
from shardplan.planner.simulate import StageTimes, simulate
from shardplan.rewrite import compile
from shardplan.rewrite.program import Program
from tests.plans import random_plan
from tests.ranks import pool

KINDS = {"gpipe": 1, "1f1b": 1, "zb": 1, "interleaved": 2, "zbv": 2}
"""schedule -> stages a rank."""


def token_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def timed(
    rank: int, programs: dict[str, Program], state: dict[str, torch.Tensor], batch: dict[str, torch.Tensor], rounds: int
) -> dict[str, list[float]]:
    """Runs in every rank. -> seconds of every step by schedule; the first two rounds are left out."""
    import torch.distributed as dist

    from shardplan.runtime.engine import Engine

    engines: dict[str, Any] = {}
    for kind, program in programs.items():
        engines[kind] = Engine({"train": program}, rank, dist.get_world_size(), "cpu", torch.optim.SGD)
        engines[kind].load_full(state)
    found: dict[str, list[float]] = {kind: [] for kind in programs}
    for number in range(rounds + 2):
        for kind, engine in engines.items():
            dist.barrier()
            start = time.perf_counter()
            engine.train_step(batch)
            dist.barrier()
            if number > 1:
                found[kind].append(time.perf_counter() - start)
    for engine in engines.values():
        engine.close()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedules", description=__doc__)
    for name, default in (("layers", 8), ("width", 256), ("batch", 16), ("microbatches", 8), ("rounds", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.manual_seed(0)
    model = ByteGPT(given.layers, given.width, heads=4, seq=64)
    ids = torch.randint(0, 256, (given.batch, 64))
    trace = trace_model(model, (ids,), {}, loss_fn=token_loss, target=ids)
    state = {k: v.detach().clone() for k, v in model.state_dict(keep_vars=True).items()} | dict(model.named_buffers())
    batch = {s.name: ids for s in trace.sources.values() if s.kind == "input"}
    programs, said = {}, {}
    for kind, chunks in KINDS.items():
        plan = random_plan(trace, pp=2 * chunks, microbatches=given.microbatches, schedule=kind, chunks=chunks)
        programs[kind] = compile(trace, plan)
        times = [StageTimes(1.0 / chunks, 2.0 / chunks, 1.0 / chunks)] * (2 * chunks)
        said[kind] = simulate(plan.instructions, times).step_seconds
    found = pool(2).run(timed, programs, state, batch, given.rounds, timeout=600.0)[0]
    base = statistics.median(found["1f1b"])
    print(f"{'schedule':12} {'ms':>8} {'to 1f1b':>8} {'simulated':>10}")
    for kind, seconds in found.items():
        median = statistics.median(seconds)
        print(f"{kind:12} {median * 1e3:8.1f} {median / base:8.3f} {said[kind] / said['1f1b']:10.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
