"""`ParallelModel`: a model that runs as its plan says, with one face wherever the ranks are."""

from __future__ import annotations

import html
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from shardplan.batch import Batch, Inputs, canonical, example_batch, rebuild_output
from shardplan.calibrating import keep_evidence, measured_of
from shardplan.calls import Call, Calls
from shardplan.errors import NotRunnableHere, UsageError
from shardplan.metrics import Metrics, StepMetrics
from shardplan.model_state import ModelState
from shardplan.planner.plan import Plan
from shardplan.planner.report.measured import Measured
from shardplan.planner.trace import Trace
from shardplan.ranks import InPlace, Ranks
from shardplan.rewrite import compile as compile_program
from shardplan.runtime import rank_calls
from shardplan.runtime.loading import Drawn
from shardplan.runtime.rank_calls import Job
from shardplan.sampling import Sampler, source_of
from shardplan.serving import Followers, Server, check_settings
from shardplan.values import (
    Init,
    Weights,
    names_by_rank,
    supply_of,
    tensors_of,
)


@dataclass(slots=True)
class Planned:
    """What planning gave, and the ranks that wait for it (None: they are not here). inputs: of the planned batch."""

    plan: Plan
    trace: Trace
    inputs: Inputs
    ranks: Ranks | None


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run, as given to `auto_parallel`."""

    loss_fn: Callable[..., Any] | None = None
    optimizer: Callable[..., torch.optim.Optimizer] | None = None
    clip_norm: float | None = None
    seed: int = 0
    weights: Weights | None = None
    init: Init | None = None
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    backend: str | None = None
    verbose: bool = False


class ParallelModel(ModelState):
    """Made by `shardplan.auto_parallel`. Calls take the *global* batch, positional or by name, and the target by name.

    A call may differ from the planned one: fewer samples (a last batch), another length, other optional inputs, the
    other mode (`eval`). It is traced once and runs under the same plan (see `shardplan.calls`); samples that do not
    divide by the number of replicas are computed by all of them.

    In a driver (plain script) the ranks are worker processes and this process holds no parameters; under torchrun every
    process calls the same methods at the same time. Raises InputMismatch where a batch is not shaped as planned,
    NotRunnableHere where the devices are only described, WorkerFailed and WorkerTimeout as `runtime.launch` says.
    """

    def __init__(self, model: nn.Module, settings: Settings, planner: Callable[[Batch], Planned]) -> None:
        super().__init__(model)
        self._settings = settings
        self._planner = planner
        self._planned: Planned | None = None
        self._calls: Calls | None = None
        self._metrics: Metrics | None = None
        self._server: Server | None = None
        self._closed = False

    # -- planning and loading ------------------------------------------------------------------------------------------

    def prepare(self, example: Any) -> None:
        """Plan for this global batch and load the ranks; done by `auto_parallel`, or by the first call."""
        self._prepare(example_batch(self._model, example, self._settings.loss_fn is not None))

    def _prepare(self, batch: Batch) -> None:
        planned = self._planner(batch)
        try:
            if planned.ranks is not None:
                self._load(planned.ranks, planned)
        except BaseException:
            if planned.ranks is not None:
                planned.ranks.close()
            raise
        self._planned = planned

    def _load(self, ranks: Ranks, planned: Planned) -> None:
        self._calls = Calls(
            self._model,
            self._settings.loss_fn,
            planned.plan,
            planned.trace,
            planned.inputs,
            quiet=ranks.in_place and os.environ.get("RANK") != "0",
        )
        kind = self._calls.planned.key
        programs = {kind: compile_program(planned.trace, planned.plan, kind)}
        settings = self._settings
        job = Job(programs, settings.optimizer, settings.clip_norm, settings.seed, settings.scheduler, settings.backend)
        alike = len({device.kind for device in planned.plan.devices}) == 1
        self._supply = supply_of(self._model, settings.weights, settings.init, settings.seed, programs, alike)
        held = set().union(*names_by_rank(programs, len(planned.plan.devices)))
        self._rest = self._supply.only(tensors_of(self._model).keys() - held)
        ranks.hint = self._checkpoints.hint
        ranks.load(job, replace(self._supply, told=self._settings.verbose))

    @property
    def plan(self) -> Plan:
        """The plan in use. Raises UsageError before the first call where auto_parallel had no example."""
        if self._planned is None:
            raise UsageError("there is no plan yet", hints=["pass example_inputs=, or make the first call"])
        return self._planned.plan

    @property
    def trace(self) -> Trace:
        """The traced graph that the plan is for. Raises UsageError before the first call, as `plan`."""
        return self._ready().trace

    def _ready(self) -> Planned:
        if self._closed:
            raise UsageError("this model was closed", hints=["call auto_parallel again"])
        if self._planned is None:
            raise UsageError("there is no plan yet", hints=["pass example_inputs=, or make the first call"])
        return self._planned

    def _ranks(self) -> Ranks:
        planned = self._ready()
        if planned.ranks is None:
            raise _not_here(planned.plan)
        if self._server is not None and threading.current_thread() is not self._server.thread:
            raise UsageError("this model answers requests", hints=["close the engine first"])
        return planned.ranks

    # -- running -------------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> ParallelModel:
        """Put the model in training mode (or evaluation mode), as `torch.nn.Module.train` does."""
        self._model.train(mode)
        return self

    def eval(self) -> ParallelModel:
        """Put the model in evaluation mode: dropout off, running statistics used."""
        return self.train(False)

    def train_step(self, *inputs: Any, target: Any = None, **kwargs: Any) -> torch.Tensor:
        """Gradients of the global batch from zero, clipping, optimizer step. -> loss [] of the global batch."""
        if self._settings.optimizer is None:
            raise UsageError(
                "train_step needs an optimizer",
                hints=["auto_parallel(..., optimizer=lambda params: torch.optim.AdamW(params, lr=3e-4))"],
            )
        self._send_options()
        loss = self._train(rank_calls.train_step, inputs, kwargs, target)
        if self._optimizer is not None:
            self._optimizer.stepped()
        return loss

    def step(self, *inputs: Any, target: Any = None, **kwargs: Any) -> torch.Tensor:
        """Forward and backward only; gradients are added to what is there. -> loss [] of the global batch."""
        return self._train(rank_calls.step, inputs, kwargs, target)

    def zero_grad(self) -> None:
        """Drop the gradients on all ranks."""
        self._ranks().call(rank_calls.zero_grad)

    def optimizer_step(self) -> None:
        """Clip the gradients that `step` left, step the optimizer and move the scheduler. Several calls of `step`
        before it accumulate gradients: ``zero_grad()``, ``step(...)`` a few times, ``optimizer_step()``."""
        self._send_options()
        self._ranks().call(rank_calls.optimizer_step)
        if self._optimizer is not None:
            self._optimizer.stepped()

    def _train(self, function: Callable[..., Any], inputs: Any, kwargs: Any, target: Any) -> torch.Tensor:
        drawn = inputs[0] if len(inputs) == 1 and isinstance(inputs[0], Drawn) else None
        if drawn is not None:
            sampler = self._samplers[drawn.source]
            batch = sampler.example(self._model, drawn.count, self._settings.loss_fn is not None)
            call = self._call(batch, training=True)
            loss = self._told(function, drawn, call)
            sampler.used(drawn)
            return loss
        batch = self._batch(inputs, kwargs, target)
        call = self._call(batch.whole(), training=True)
        return self._told(function, call.inputs.bind(batch), call)

    def _told(self, function: Callable[..., Any], given: Any, call: Call) -> torch.Tensor:
        """Run a step, and tell the metrics of it."""
        ranks, metrics, step, record = self._ranks(), self._metrics, self._steps, None
        started = time.perf_counter()
        if metrics is not None and metrics.wants_detail(step):
            loss, record = ranks.call(rank_calls.metered, function.__name__, given, call.key)
        else:
            loss = ranks.call(function, given, call.key)
        self._steps += 1
        if metrics is not None:
            value = loss.item()
            metrics.give(StepMetrics(step, value, time.perf_counter() - started, call.plan.batch_size, record))
        return loss

    def metrics(
        self,
        callback: Callable[[StepMetrics], Any] | None = None,
        *,
        jsonl: str | os.PathLike[str] | None = None,
        tensorboard: str | os.PathLike[str] | None = None,
        traces: str | os.PathLike[str] | None = None,
        every: int = 100,
    ) -> None:
        """Tell of every training step from now on; replaces what was told before.

        callback: called with `StepMetrics`, on every rank under torchrun. jsonl: a file to append to; tensorboard,
        traces: directories for event files and for timelines that Perfetto shows (by rank 0). every: each such step has
        its instructions timed, for seconds by phase, bubble, bytes, memory and the timeline; 0: none.
        """
        writes = not self._ranks().in_place or os.environ.get("RANK") == "0"
        made = Metrics(callback, jsonl, tensorboard, traces, every, writes)
        if self._metrics is not None:
            self._metrics.close()
        self._metrics = made

    def rows(self) -> dict[str, list[tuple[int, int]]]:
        """By input, the (start, stop) rows of the planned global batch that this rank reads (under torchrun); an input
        that it does not read is not named. ``train_step`` takes ``Rows(tensor, runs, count)`` in place of an input."""
        assert self._calls is not None
        return rank_calls.engine_of(self._session("rows")).rows(self._calls.planned.key)

    def sampler(
        self,
        dataset: Any,
        batch_size: int | None = None,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> Sampler:
        """Global batches of a dataset, of which every rank loads its own rows only::

            for epoch in range(sampler.epoch, epochs):
                for batch in sampler:
                    loss = pm.train_step(batch)

        dataset: has len() and samples by index, each as ``example_inputs=`` is but for one sample; it is sent to the
        workers where this process drives some. batch_size: of the global batch; None: the planned one. shuffle: anew
        every epoch, by seed and epoch. collate: list of samples -> batch. Checkpoints keep the place: after `load` or
        `resume` the loop goes on with the next batch.
        """
        inputs, ranks = self._ready().inputs, self._ranks()
        number = len(self._samplers)
        source, sample = source_of(
            number,
            dataset,
            collate or default_collate,
            shuffle,
            seed,
            self._model,
            self._settings.loss_fn is not None,
            inputs.bind,
        )
        made = Sampler(source, batch_size or self.plan.batch_size, drop_last, sample)
        ranks.call(rank_calls.add_source, source)
        if number < len(self._places):
            made.restore(self._places[number])
        self._samplers.append(made)
        return made

    def _batch(self, inputs: Any, kwargs: Any, target: Any) -> Batch:
        batch = canonical(self._model, tuple(inputs), kwargs, target)
        if self._planned is None and not self._closed:
            self._prepare(batch.whole())
        return batch

    def _call(self, batch: Batch, training: bool) -> Call:
        """The call that a batch is; its program is on the ranks."""
        planned, ranks = self._ready(), self._ranks()
        if training and not planned.trace.training:
            raise UsageError('this model was planned for objective="infer"', hints=['objective="train"'])
        assert self._calls is not None
        call, program, dropped = self._calls.find(batch, training)
        if dropped is not None:
            ranks.call(rank_calls.drop, dropped)
        if program is not None:
            ranks.call(rank_calls.use, call.key, program)
        return call

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Forward without gradients, in the mode that the model is in. -> whole output, built as the model builds it;
        what needs inputs that are not given (a loss without labels) is None."""
        self._batch(inputs, kwargs, None)
        return self._forward(inputs, kwargs, everywhere=self._ranks().in_place)

    def _forward(self, inputs: Any, kwargs: Any, everywhere: bool) -> Any:
        """everywhere: the output is needed on all ranks, not on rank 0 only."""
        batch = self._batch(inputs, kwargs, None)
        call, ranks = self._call(batch, training=False), self._ranks()
        outputs = ranks.call(rank_calls.forward, call.inputs.bind(batch), everywhere, call.key)
        return rebuild_output(call.trace, outputs)

    def measure(
        self, *inputs: Any, steps: int = 5, calibrate: bool = False, target: Any = None, **kwargs: Any
    ) -> Measured:
        """Time steps of training on this batch (with the optimizer, where there is one) and count their memory; after
        that everything is as it was. ``plan.report(path, measured)`` sets the result beside the prediction.

        calibrate: keep what the prediction was off by, class of ops by class of ops, for the plans to come on devices
        like these (see `shardplan.calibrating`). Raises UsageError where the batch is not the planned one, or the plan
        does not say what it predicts.
        """
        batch = self._batch(inputs, kwargs, target)
        call = self._call(batch, training=True)
        ranks = self._ranks()
        found = ranks.call(rank_calls.measure, call.inputs.bind(batch), steps, call.key)
        measured = measured_of(call.plan, found, steps)
        if calibrate:
            if call.plan is not self.plan:
                raise UsageError("only the planned batch calibrates", hints=["measure(calibrate=True) on that batch"])
            if not isinstance(ranks, InPlace) or ranks.session.rank == 0:
                keep_evidence(call.plan, measured, found["places"])
        return measured

    # -- serving -------------------------------------------------------------------------------------------------------

    def engine(
        self,
        max_batch: int = 32,
        max_wait_ms: float = 5.0,
        *,
        max_queue: int = 1024,
        sizes: Sequence[int] | None = None,
    ) -> Server:
        """Answer single requests in batches, in evaluation mode: ``engine.submit(x)`` gives a future of the output for
        one sample (inputs without their batch dim).

        A batch is run when `max_batch` requests are there, or `max_wait_ms` after its first one came; rows that are
        missing are filled up to the next of `sizes` (None: only `max_batch`). At most `max_queue` requests wait. Until
        the engine is closed the model takes no other calls. Under torchrun every rank calls this; rank 0 takes
        requests, the others call ``engine.serve()``, which returns when rank 0 closes its engine.
        """
        found, ranks, mode = (
            check_settings(max_batch, max_wait_ms, max_queue, sizes),
            self._ranks(),
            self._model.training,
        )
        self.eval()

        def ended() -> None:
            self._server = None
            self.train(mode)

        everyone = Followers(ranks, lambda call: self._forward(*call, everywhere=False))
        self._server = Server(everyone, found, max_wait_ms / 1000, max_queue, ended)
        return self._server

    # -- notebooks -----------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        name = type(self._model).__name__
        if self._planned is None:
            return f"ParallelModel({name}, planned at its first call)"
        plan = self._planned.plan
        ranks = self._planned.ranks
        where = "only planned" if ranks is None else "closed" if self._closed else "running"
        return f"ParallelModel({name}, {plan.degrees()} on {len(plan.devices)} devices, {where})"

    def _repr_html_(self) -> str:
        """What it is, and the report of its plan, in a notebook."""
        head = f"<p>{html.escape(repr(self))}</p>"
        return head + (self._planned.plan._repr_html_() if self._planned is not None else "")

    # -- the end -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the workers, or drop this rank's shards, when a checkpoint that is being written is whole. Does nothing
        the second time. Raises CheckpointError where it could not be written."""
        if self._closed:
            return
        if self._server is not None:
            self._server.close(drain=False)
        if self._metrics is not None:
            self._metrics.close()
        if self._planned is None or self._planned.ranks is None:
            self._closed = True
            return
        try:
            if self._planned.ranks.alive:
                self._checkpoints.finish()
        finally:
            self._closed = True
            self._planned.ranks.close()

    def __enter__(self) -> ParallelModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _not_here(plan: Plan) -> NotRunnableHere:
    kinds: dict[str, int] = {}
    per_node: dict[int, int] = {}
    for device in plan.devices:
        kinds[device.kind] = kinds.get(device.kind, 0) + 1
        per_node[device.node] = per_node.get(device.node, 0) + 1
    script = sys.argv[0] if sys.argv and sys.argv[0].endswith(".py") else "train.py"
    nodes = f"--nnodes {len(per_node)} " if len(per_node) > 1 else ""
    where = "--rdzv-backend c10d --rdzv-endpoint HOST:29500 " if len(per_node) > 1 else ""
    return NotRunnableHere(
        f"the plan is for {' + '.join(f'{n} x {kind}' for kind, n in kinds.items())}, which are not on this machine",
        hints=[f"there: torchrun {nodes}--nproc-per-node {max(per_node.values())} {where}{script}"],
    )
