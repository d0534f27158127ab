"""The engine: one rank with its shards, its programs and its optimizer. Every method is collective."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardplan.errors import NotSupported, UsageError
from shardplan.planner.placement import D, Layout, R
from shardplan.planner.storage import Storage
from shardplan.planner.wire import Wire
from shardplan.rewrite.program import Program, TensorSpec
from shardplan.runtime import checkpoint, low_rank, measuring, optim, state, weight_files
from shardplan.runtime.checkpoint import Part
from shardplan.runtime.compiled import FunctionalComm, compiled
from shardplan.runtime.dtensors import Distributed, whole_of
from shardplan.runtime.executor import Executor
from shardplan.runtime.groups import Groups
from shardplan.runtime.inputs import Runs, union
from shardplan.runtime.offload import Offloaded
from shardplan.runtime.optim import OptimizerFactory, SchedulerFactory
from shardplan.runtime.parameters import Shards, collect, collect_one, collect_outputs, first_owner
from shardplan.runtime.reduction import Attached
from shardplan.runtime.replicas import Replicas
from shardplan.runtime.saving import Order, Saver
from shardplan.runtime.supply import Supply

Batch = Mapping[str, torch.Tensor]


class Engine:
    """One rank of a job. torch.distributed has to be initialised, with the ranks that the programs name.

    programs: by key; "train" or "forward" is the planned call, `use` adds others (a smaller batch, another length)
    under keys of their own. In all of them parameters and buffers lie alike. optimizer_factory: makes an optimizer of
    this rank's local parameters; scheduler_factory: a torch learning-rate scheduler of that optimizer, moved by every
    `train_step`. clip: largest global norm of the gradients, or None. seed: of random ops.
    place: where its executors write which instruction they run (see `runtime.pulse`). backend: of `torch.compile`, to
    which stages go; None: to none. groups: the process groups to use; None: makes them.
    """

    def __init__(
        self,
        programs: Mapping[str, Program],
        rank: int,
        world_size: int,
        device: torch.device | str,
        optimizer_factory: OptimizerFactory | None = None,
        clip: float | None = None,
        seed: int = 0,
        scheduler_factory: SchedulerFactory | None = None,
        place: memoryview | None = None,
        backend: str | None = None,
        groups: Groups | None = None,
    ) -> None:
        self.programs = dict(programs)
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(device)
        self.clip = clip
        self.seed = seed
        self.steps = 0
        self.groups = Groups() if groups is None else groups
        self.attached = Attached()
        self.shards = Shards(_with_all_buffers(programs), rank, self.device)
        self.replicas = Replicas(self.shards, self.groups)
        self.optimizer_factory = optimizer_factory
        self.optimizer: torch.optim.Optimizer | None = None
        self.scheduler_factory = scheduler_factory
        self.scheduler: Any = None
        self.saver = Saver()
        self.place = place
        self.backend = backend
        self._executors: dict[str, Executor] = {}
        self._loss = torch.zeros(())

    # -- parameters ----------------------------------------------------------------------------------------------------

    def load_full(self, whole: Mapping[str, torch.Tensor]) -> None:
        """Take this rank's parts of whole parameters and buffers, given by name."""
        self.load_parts(Supply(whole))

    def load_parts(self, supply: Supply) -> None:
        """Make or read this rank's parts of parameters and buffers, and no more than those."""
        self.shards.load(supply)
        if self.shards.offloaded is not None:
            self.shards.offloaded.take()
        self._ready()

    def _ready(self) -> None:
        if not self._executors:
            for kind, program in self.programs.items():
                self._executors[kind] = Executor(
                    program,
                    self.rank,
                    self.device,
                    self.shards.used(),
                    self.groups,
                    self.seed,
                    f"{kind} ",
                    self.attached,
                    self.shards.parameters,
                )
                self._compile(self._executors[kind])
            self.shards.comm = next((e.comm for e in self._executors.values() if e.stage >= 0), None)
        self._show_places()
        if self.optimizer is None and self.optimizer_factory is not None:
            if self.shards.program.offload:
                self.shards.offloaded = Offloaded(self.shards.parameters)
            trainable = [p for p in self.shards.stepped.values() if p.requires_grad]
            held = [spec for spec in self.shards.mine() if spec.name in self.shards.parameters]
            sharded = any(spec.storage is not None or any(p.is_shard for p in spec.layout) for spec in held)
            self.optimizer = optim.make(self.optimizer_factory, trainable, sharded)
            if self.optimizer is not None and self.scheduler_factory is not None:
                self.scheduler = self.scheduler_factory(self.optimizer)

    def use(self, key: str, program: Program) -> None:
        """Add a program, or replace the one of that key. Raises NotSupported where its parameters lie differently."""
        programs = {**self.programs, key: program}
        _with_all_buffers(programs)
        self.programs = programs
        if self._executors:
            self._executors[key] = Executor(
                program,
                self.rank,
                self.device,
                self.shards.used(),
                self.groups,
                self.seed,
                f"{key} ",
                self.attached,
                self.shards.parameters,
            )
            self._compile(self._executors[key])
        self._show_places()

    def _compile(self, executor: Executor) -> None:
        if self.backend is None:
            return
        for run in executor.runs:
            comm = FunctionalComm(executor.placement, self.rank, self.groups)
            run.function = compiled(run.function, run.code, comm, f"stage {run.stage}", self.backend)

    def _show_places(self) -> None:
        if self.place is None:
            return
        for executor in self._executors.values():
            executor.place = self.place

    def drop(self, key: str) -> None:
        """Forget a program that `use` added."""
        self.programs.pop(key, None)
        self._executors.pop(key, None)

    def executor(self, key: str) -> Executor:
        """The executor of a program. Raises UsageError where there is none or no parameters were loaded."""
        found = self._executors.get(key)
        if found is None:
            raise UsageError(f"this job has no {key} program" if self._executors else "no parameters were loaded")
        return found

    def rows(self, key: str) -> dict[str, Runs]:
        """Which rows of which inputs this rank reads in a program."""
        found: dict[str, Runs] = {}
        for run in self.executor(key).runs:
            for name, runs in run.inputs.rows.items():
                found[name] = union((*found.get(name, ()), *runs))
        return found

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's local parameters by original name."""
        yield from self.shards.parameters.items()

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Settings of this rank's parameter groups, and shapes of their (whole) parameters by name."""
        groups = optim.options(self.optimizer, state.names(self.shards))
        shapes = {name: spec.shape for name, spec in self.shards.specs.items()}
        return [{**group, "parameters": {name: shapes[name] for name in group["parameters"]}} for group in groups]

    # -- steps ---------------------------------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        for parameter in self.shards.parameters.values():
            parameter.grad = None

    def train_step(self, batch: Batch, key: str = "train") -> torch.Tensor:
        """Gradients of the global batch and an optimizer step. -> loss [], the same on every rank."""
        self._need_optimizer("train_step")
        self.zero_grad()
        loss = self._train(batch, self._optimize, key)
        if self.scheduler is not None:
            optim.advance(self.scheduler, loss)
        return loss

    def optimizer_step(self) -> None:
        """Clip the gradients that are there, step the optimizer and move the scheduler: after one `step` or several."""
        self._need_optimizer("optimizer_step")
        self._optimize()
        if self.scheduler is not None:
            optim.advance(self.scheduler, self._loss)

    def _need_optimizer(self, call: str) -> None:
        if self.optimizer_factory is None:
            raise UsageError(f"{call} needs an optimizer", [], ["pass optimizer=lambda params: torch.optim.AdamW(...)"])

    def step(self, batch: Batch, key: str = "train") -> torch.Tensor:
        """Gradients of the global batch are added to those in place. -> loss [], the same on every rank.

        Tensors that were taken from `.grad` before change with it: gradients keep their places in memory.
        """
        return self._train(batch, None, key)

    def _train(self, batch: Batch, optimizer_step: Callable[[], None] | None, key: str) -> torch.Tensor:
        executor = self.executor(key)
        share, _ = executor.run(batch, optimizer_step, self.steps)
        if self.clip is not None and optimizer_step is not None and executor.stage < 0:
            self._optimize()  # the norm is a sum over all ranks, idle ones included
        self.steps += 1
        self._loss = executor.whole_loss(share)
        return self._loss

    def _optimize(self) -> None:
        self.replicas.scale()
        if self.clip is not None:
            held = [(p, self.shards.replicas(self.shards.specs[name])) for name, p in self.shards.parameters.items()]
            optim.clip_gradients(held, self.clip, self.device)
        offloaded = self.shards.offloaded
        if offloaded is not None:
            offloaded.collect()
        if self.optimizer is not None:
            self.optimizer.step()
        if offloaded is not None:
            offloaded.give()
        if self.replicas.stepped() and offloaded is not None:
            offloaded.take()
        self._refresh()

    def average_replicas(self) -> None:
        """Replicas that step by themselves take the mean of their parameters now."""
        self.replicas.average()
        if self.shards.offloaded is not None:
            self.shards.offloaded.take()
        self._refresh()

    def _refresh(self) -> None:
        """Stored parameters have changed: bring what the stages use up to date."""
        self.shards.round()
        executor = next((e for e in self._executors.values() if e.stage >= 0), None)
        if executor is not None:
            executor.refresh()

    def forward(self, batch: Batch, everywhere: bool = True, key: str = "forward") -> dict[int, torch.Tensor]:
        """Outputs of the model on the global batch: position in the traced outputs -> whole tensor.

        everywhere: on every rank, else on rank 0 only ({} on the others).
        """
        executor = self.executor(key)
        with torch.no_grad():
            _, held = executor.run(batch, None, self.steps)
            return collect_outputs(executor.program, self.rank, self.device, held, everywhere)

    # -- whole tensors -------------------------------------------------------------------------------------------------

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Whole parameters and buffers by original name, tied names included, on rank 0 ({} elsewhere)."""
        program = self.shards.program
        found = collect(self.shards, self.shards.tensors(), (*program.parameters, *program.buffers))
        for spec in self.shards.specs.values():
            for alias in spec.aliases:
                if spec.name in found:
                    found[alias] = found[spec.name]
        return found

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """Whole gradients by parameter name on rank 0 ({} elsewhere); parameters without one are left out."""
        grads = {name: p.grad for name, p in self.shards.parameters.items()}
        return collect(self.shards, grads, tuple(s for s in self.shards.program.parameters if s.trainable))

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This rank's parameters and buffers by original name, as distributed tensors where the stage has several
        ranks (see `runtime.dtensors`)."""
        distributed = self._distributed()
        if distributed is None:
            return {}
        tensors = self.shards.tensors()
        return {spec.name: distributed.wrap(spec, tensors[spec.name]) for spec in self.shards.mine()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take this rank's parts of plain whole or distributed tensors. Raises UsageError where one is missing."""
        missing = [spec.name for spec in self.shards.mine() if spec.name not in state]
        if missing:
            raise UsageError(f"the state lacks {len(missing)} tensors of this rank", missing[:20])
        self.load_full({spec.name: whole_of(state[spec.name]) for spec in self.shards.mine()})

    def _distributed(self) -> Distributed | None:
        executor = next(iter(self._executors.values()), None)
        if executor is None or executor.stage < 0:
            return None
        return Distributed(executor.placement, executor.comm, self.rank, self.groups, self.device)

    def save(
        self, path: str | os.PathLike[str], facts: Mapping[str, Any] | None = None, wait: bool = True, keep: int = 0
    ) -> str:
        """The whole training state; loads under any plan and world size. -> where it is.

        facts: JSON values to keep with it. wait: False returns as soon as the state is copied, and writes it in the
        background (see `runtime.saving`). keep: 0, or `path` is a directory of checkpoints by step of which that many
        stay. Raises CheckpointError.
        """
        target = checkpoint.of_step(path, self.steps) if keep else Path(path)
        stored = {"steps": self.steps, "seed": self.seed, "since": self.replicas.since, "user": dict(facts or {})}
        mine = optim.options(self.optimizer, state.names(self.shards))
        order = Order(target, stored, {"groups": mine}, keep)
        means = self.replicas.averaged()
        left = low_rank.saved(self.shards, self.groups, self.attached.factors)

        def parts() -> Iterator[Part]:
            yield from state.parts(self.shards, self.optimizer, self.scheduler, means)
            yield from self.replicas.parts(self.optimizer)
            yield from left

        self.saver.save(order, parts, wait)
        return str(target)

    def load(self, path: str | os.PathLike[str]) -> tuple[int, dict[str, Any]]:
        """Read what `save` wrote, under whatever plan; of a directory of checkpoints the last whole one.

        -> (steps that were done, the facts that were given to `save`). Raises CheckpointError.
        """
        self.saver.wait()
        facts = checkpoint.load(path, self._read)
        self._refresh()
        self.steps = int(facts["steps"])
        self.seed = int(facts["seed"])
        for executor in self._executors.values():
            if executor.stage >= 0:
                executor.comm.base_seed = self.seed
        return self.steps, facts["user"]

    def _read(self, reader: checkpoint.Reader) -> None:
        state.read(reader, self.shards, self.optimizer, self.scheduler)
        self.replicas.read(reader, int(reader.facts.get("since", 0)), self.optimizer)
        if self.shards.offloaded is not None:
            self.shards.offloaded.take()
        low_rank.read(reader, self.shards, Wire.parse(self.shards.program.reduction), self.attached.factors)

    def save_weights(
        self,
        path: str | os.PathLike[str],
        tensors: Sequence[weight_files.Announced],
        rest: Supply,
        max_nbytes: int,
        others: Mapping[str, bytes],
    ) -> None:
        """Whole tensors as safetensors files. Each is gathered in its stage, on the first rank that holds some of it,
        which writes it. Raises CheckpointError.

        tensors: name, shape and dtype of what to write, in order. rest: has those that the programs do not use. others:
        further files, by name.
        """
        held, specs = self.shards.tensors(), self.shards.specs
        with rest.open(torch.device("cpu")) as values:

            def get(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
                if name in specs:
                    return collect_one(self.shards, held.get(name), specs[name], first_owner(self.shards, specs[name]))
                return values.whole(name, shape, dtype) if self.rank == 0 else None

            gets = (partial(get, *tensor) for tensor in tensors)
            weight_files.save(path, tensors, gets, max_nbytes, others, self.rank)

    # -- measuring -----------------------------------------------------------------------------------------------------

    def measure(self, batch: Batch, steps: int = 5, key: str = "train") -> dict[str, Any]:
        """Timed steps of training, after which everything is as before. See `runtime.measuring`."""
        parameters = self.shards.parameters
        gradients = {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()}
        tensors = list({id(t): t for t in (*self.shards.used().values(), *parameters.values())}.values())
        values = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
        optimizer = copy.deepcopy(self.optimizer.state_dict()) if self.optimizer is not None else None
        factors, since = copy.deepcopy(list(self.attached.factors.values())), self.replicas.since
        optimize = self._optimize if self.optimizer_factory is not None else None
        idle = self._optimize if optimize is not None and self.clip is not None else None
        try:
            return measuring.measure(
                self.executor(key),
                batch,
                steps,
                measuring.Around(self.steps, self.zero_grad, optimize, idle, lambda: self._held(tensors)),
            )
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, values, strict=True):
                    tensor.copy_(value)
            if self.shards.offloaded is not None:
                self.shards.offloaded.take()
            if self.optimizer is not None and optimizer is not None:
                self.optimizer.load_state_dict(optimizer)
            self.attached.factors = dict(zip(self.attached.factors, factors, strict=False))
            self.replicas.since = since
            for name, parameter in parameters.items():
                parameter.grad = gradients[name]

    def standing(self, key: str = "train") -> list[torch.Tensor]:
        """What stays on the device between steps: parameters, buffers, gradients that are there, the optimizer's state,
        buckets of gradients."""
        tensors = {id(t): t for t in (*self.shards.used().values(), *self.shards.parameters.values())}
        return [*self._held(list(tensors.values())), *self.executor(key).sums.standing()]

    def _held(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """What stays between steps: given tensors, gradients that are there, and the optimizer's state."""
        state = self.optimizer.state.values() if self.optimizer is not None else ()
        kept = [v for values in state for v in values.values() if torch.is_tensor(v) and v.device == self.device]
        found = [*tensors, *kept]
        return [*found, *(t.grad for t in found if t.grad is not None)]

    def close(self) -> None:
        """Wait for a checkpoint that is being written; then drop the shards, and the process groups that were made for
        the programs. Raises CheckpointError where it could not be written."""
        try:
            self.saver.close()
        finally:
            self._drop()

    def _drop(self) -> None:
        self._executors.clear()
        self.optimizer = None
        self.shards.parameters.clear()
        self.shards.offloaded = None
        self.shards.wholes.clear()
        self.shards.rounded.clear()
        self.shards.buffers.clear()
        self.groups.close()


def _with_all_buffers(programs: Mapping[str, Program]) -> Program:
    """The program whose specs say where tensors lie: "train" where there is one; all programs have to agree."""
    main = programs.get("train") or next(iter(programs.values()))
    for program in programs.values():
        mine = {s.name: (_stored(s), s.stages) for s in (*main.parameters, *main.buffers)}
        held = ("param", "shard", "buffer")
        read = {a.name for code in program.stages for a in code.arguments if a.kind in held}
        for spec in (*program.parameters, *program.buffers):
            if spec.name not in read:
                continue
            layout, stages = mine[spec.name]
            if layout != _stored(spec) or not set(spec.stages) <= set(stages):
                raise NotSupported(f"{spec.name} lies differently in the programs of this job")
    return main


def _stored(spec: TensorSpec) -> tuple[Layout, Storage | None]:
    """Where the elements lie: a replicated parameter is the same whether or not its gradient is a sum over ranks."""
    return tuple(R if placement == D else placement for placement in spec.layout), spec.storage
