"""What the commands do once their flags are read."""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from shardplan import checking
from shardplan.api import auto_parallel, plan_traced, under_torchrun
from shardplan.batch import example_batch
from shardplan.checking import Check
from shardplan.errors import UsageError
from shardplan.planner import constraints
from shardplan.planner.plan import Plan
from shardplan.planner.report.measured import Measured
from shardplan.planner.trace import Trace
from shardplan.planning import Request, make_trace, resolve_cluster
from shardplan.progress import say_nothing, say_on_stderr
from shardplan.targets import load_target


@dataclass(frozen=True, slots=True)
class Job:
    """The flags that planning needs; see `shardplan.cli`."""

    target: str
    devices: str
    inputs: tuple[str, ...]
    batch: int | None
    seq: int | None
    memory: str | None
    pins: tuple[str, ...]
    degrees: dict[str, int]
    microbatches: int | None
    batch_norm: str
    zero: str
    objective: str
    solver: str
    time_limit: float
    gap: float
    cache: bool
    verbose: bool

    def constraints(self) -> tuple[Any, ...]:
        """Raises UsageError for a pin that cannot be read."""
        found: list[Any] = []
        for text in self.pins:
            glob, equals, stage = text.rpartition("=")
            if not equals or not glob or not stage.removeprefix("stage").isdecimal():
                raise UsageError(f"cannot read --pin {text!r}", hints=["write GLOB=STAGE, such as '*.layers.0.*=0'"])
            found.append(constraints.pin(glob, stage=int(stage.removeprefix("stage"))))
        if self.degrees:
            found.append(constraints.degrees(**self.degrees))
        return tuple(found)

    def planning(self) -> dict[str, Any]:
        """What `plan`, `auto_parallel` and `check` are all given, by their parameter names."""
        return {
            "constraints": self.constraints(),
            "microbatches": self.microbatches or "auto",
            "memory_limit": self.limit(),
            "solver": self.solver,
            "time_limit": self.time_limit,
            "gap": self.gap,
            "cache": self.cache,
            "batch_norm": self.batch_norm,
            "objective": self.objective,
            "zero": int(self.zero) if self.zero.isdecimal() else self.zero,
        }

    def limit(self) -> Any:
        """Memory limit: one text, or one per device."""
        return self.memory.split(",") if self.memory and "," in self.memory else self.memory


@dataclass(frozen=True, slots=True)
class Trained:
    """What `train` saw. losses: one per step; step_seconds: median of the steps after the first."""

    plan: Plan
    losses: tuple[float, ...]
    step_seconds: float
    measured: Measured

    def to_json(self) -> str:
        data = {
            "schema": 1,
            "model": self.plan.model,
            "degrees": self.plan.degrees(),
            "losses": list(self.losses),
            "predicted_step_seconds": self.plan.step_seconds,
            "measured_step_seconds": self.step_seconds,
        }
        return json.dumps(data, indent=1)


class Planner:
    """A job's model, batch and trace, made once, from which variants of the job are planned."""

    def __init__(self, job: Job) -> None:
        self.job = job
        target = load_target(job.target, job.inputs, job.batch, job.seq)
        self._model, self._loss_fn = target.model, target.loss_fn
        self._batch = example_batch(target.model, target.example(), target.loss_fn is not None)
        self._trace: Trace | None = None

    def plan(self, job: Job | None = None, faster_links: float = 1.0) -> Plan:
        """job: like the planner's own, with other devices, memory or constraints. Raises what `shardplan.plan` does."""
        job = job or self.job
        request = Request(loss_fn=self._loss_fn, optimizer=torch.optim.AdamW, **job.planning())
        cluster = resolve_cluster(job.devices, request)  # before the trace: its errors are the user's
        if faster_links != 1.0:
            cluster = cluster.slower_links(1.0 / faster_links)
        if self._trace is None:
            self._trace, _ = make_trace(self._model, self._batch, request)
        return plan_traced(self._trace, cluster, request, say_on_stderr if job.verbose else say_nothing)


def make_plan(job: Job) -> Plan:
    """`shardplan plan`. Raises what `shardplan.plan` raises."""
    return Planner(job).plan()


def train(job: Job, plan: Path | None, steps: int, lr: float, seed: int, quiet: bool) -> Trained | None:
    """`shardplan run`: None on ranks other than the first."""
    torch.manual_seed(seed)
    target = load_target(job.target, job.inputs, job.batch, job.seq)
    batch = example_batch(target.model, target.random_batch(seed), target.loss_fn is not None)
    leader = not under_torchrun() or _rank() == 0
    with auto_parallel(
        target.model,
        job.devices,
        batch,
        loss_fn=target.loss_fn,
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr),
        plan=plan,
        **job.planning(),
        verbose=job.verbose,
        seed=seed,
    ) as pm:
        losses: list[float] = []
        seconds: list[float] = []
        talk = leader and not quiet
        if talk:
            print(f"plan: {pm.plan.degrees()}, predicted {pm.plan.step_seconds * 1e3:.1f} ms a step")
        for step in range(steps):
            started = time.perf_counter()
            losses.append(float(pm.train_step(*batch.args, target=batch.target, **batch.kwargs)))
            seconds.append(time.perf_counter() - started)
            if talk:
                print(f"step {step:4}  loss {losses[-1]:.5f}  {seconds[-1] * 1e3:.1f} ms", flush=True)
        found = pm.measure(*batch.args, target=batch.target, **batch.kwargs)
        usual = statistics.median(seconds[1:] or seconds)
        if talk:
            print(f"step time: predicted {pm.plan.step_seconds * 1e3:.1f} ms, measured {usual * 1e3:.1f} ms")
        sys.stdout.flush()
        return Trained(pm.plan, tuple(losses), usual, replace(found, step_seconds=usual)) if leader else None


def check(job: Job, plan: Path | None, tolerance: float | None, seed: int) -> Check:
    """`shardplan check`."""
    torch.manual_seed(seed)
    target = load_target(job.target, job.inputs, job.batch, job.seq, on_meta=False)
    return checking.check(
        target.model,
        job.devices,
        target.random_batch(seed),
        target.loss_fn,
        plan,
        tolerance=tolerance,
        seed=seed,
        **job.planning(),
        verbose=job.verbose,
    )


def _rank() -> int:
    import os

    return int(os.environ["RANK"])
