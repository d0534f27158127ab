"""The engine: one rank with its shards, its programs and its optimizer. Every method is collective."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shardplan.errors import CheckpointError, NotSupported, UsageError
from shardplan.planner.instructions import Op
from shardplan.planner.placement import local_slices
from shardplan.rewrite.parts import assemble
from shardplan.rewrite.program import Program, TensorSpec
from shardplan.runtime import checkpoint
from shardplan.runtime.comm import Groups
from shardplan.runtime.executor import Executor
from shardplan.runtime.parameters import Shards, collect, owners

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Batch = Mapping[str, torch.Tensor]


class Engine:
    """One rank of a job. torch.distributed has to be initialised, with the ranks that the programs name.

    programs: by kind ("train", "forward"); all of one plan. optimizer_factory: makes an optimizer of this rank's local
    parameters. clip: largest global norm of the gradients, or None. seed: of random ops.
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
    ) -> None:
        self.programs = dict(programs)
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(device)
        self.clip = clip
        self.seed = seed
        self.steps = 0
        self.groups = Groups()
        self.shards = Shards(_with_all_buffers(programs), rank, self.device)
        self.optimizer_factory = optimizer_factory
        self.optimizer: torch.optim.Optimizer | None = None
        self._executors: dict[str, Executor] = {}

    # -- parameters ----------------------------------------------------------------------------------------------------

    def load_full(self, whole: Mapping[str, torch.Tensor] | Callable[[str], torch.Tensor]) -> None:
        """Take this rank's parts of whole parameters and buffers, given by name."""
        get = whole.__getitem__ if isinstance(whole, Mapping) else whole
        self.shards.load(get)
        self._ready()

    def _ready(self) -> None:
        if not self._executors:
            for kind, program in self.programs.items():
                self._executors[kind] = Executor(
                    program, self.rank, self.device, self.shards.tensors(), self.groups, self.seed, f"{kind} "
                )
        trainable = [p for p in self.shards.parameters.values() if p.requires_grad]
        if self.optimizer is None and self.optimizer_factory is not None and trainable:
            self.optimizer = self.optimizer_factory(trainable)

    def use(self, kind: str, program: Program) -> None:
        """Add a program of the same plan, or replace the one of that kind."""
        programs = {**self.programs, kind: program}
        _with_all_buffers(programs)
        self.programs = programs
        if self._executors:
            self._executors[kind] = Executor(
                program, self.rank, self.device, self.shards.tensors(), self.groups, self.seed, f"{kind} "
            )

    def executor(self, kind: str) -> Executor:
        """The executor of a program kind. Raises UsageError where there is none or no parameters were loaded."""
        found = self._executors.get(kind)
        if found is None:
            raise UsageError(f"this job has no {kind} program" if self._executors else "no parameters were loaded")
        return found

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's local parameters by original name."""
        yield from self.shards.parameters.items()

    # -- steps ---------------------------------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        for parameter in self.shards.parameters.values():
            parameter.grad = None

    def train_step(self, batch: Batch) -> torch.Tensor:
        """Gradients of the global batch and an optimizer step. -> loss [], the same on every rank."""
        if self.optimizer_factory is None:
            raise UsageError(
                "train_step needs an optimizer", [], ["pass optimizer=lambda params: torch.optim.AdamW(...)"]
            )
        self.zero_grad()
        return self._train(batch, self._optimize)

    def step(self, batch: Batch) -> torch.Tensor:
        """Gradients of the global batch are added to those in place. -> loss [], the same on every rank."""
        return self._train(batch, None)

    def _train(self, batch: Batch, optimizer_step: Callable[[], None] | None) -> torch.Tensor:
        executor = self.executor("train")
        earlier = None
        if optimizer_step is None and any(p.grad is not None for p in self.shards.parameters.values()):
            # The sum over ranks is taken of this step's gradients only; the earlier ones are summed already.
            earlier = {name: p.grad for name, p in self.shards.parameters.items()}
            self.zero_grad()
        share, _ = executor.run(batch, True, optimizer_step, self.steps)
        if self.clip is not None and optimizer_step is not None and executor.stage < 0:
            self._optimize()  # the norm is a sum over all ranks, idle ones included
        for name, grad in (earlier or {}).items():
            parameter = self.shards.parameters[name]
            parameter.grad = grad if parameter.grad is None else parameter.grad + (0 if grad is None else grad)
        self.steps += 1
        return executor.whole_loss(share)

    def _optimize(self) -> None:
        if self.clip is not None:
            self._clip(self.clip)
        if self.optimizer is not None:
            self.optimizer.step()

    def _clip(self, limit: float) -> torch.Tensor:
        """Scale gradients to a global norm of at most `limit`; every element of a parameter counts once."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for name, parameter in self.shards.parameters.items():
            if parameter.grad is not None:
                total += parameter.grad.double().square().sum() / self.shards.replicas(self.shards.specs[name])
        dist.all_reduce(total)
        norm = total.sqrt()
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        for parameter in self.shards.parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(scale.to(parameter.grad.dtype))
        return norm

    def forward(self, batch: Batch, training: bool = False) -> dict[int, torch.Tensor]:
        """Outputs of the model on the global batch: position in the traced outputs -> whole tensor, on every rank."""
        executor = self.executor("forward")
        with torch.no_grad():
            _, microbatches = executor.run(batch, training, None, self.steps)
        return self._outputs(executor, microbatches)

    def _outputs(self, executor: Executor, microbatches: list[list[torch.Tensor]]) -> dict[int, torch.Tensor]:
        program = executor.program
        mine: list[tuple[int, tuple[tuple[str, int], ...], torch.Tensor]] = []
        for microbatch, values in enumerate(microbatches):
            coordinate = (*executor.coordinate.items(), ("mb", microbatch))
            for (_, result), value in zip(executor._outputs, values, strict=True):
                if self.rank in owners(executor.placement, result.layout):
                    mine.append((result.index, coordinate, value.detach().cpu()))
        everyone: list[Any] = [mine]
        if self.world_size > 1:
            everyone = [None] * self.world_size
            dist.all_gather_object(everyone, mine)
        parts: dict[int, dict[Any, torch.Tensor]] = {}
        for index, coordinate, value in (item for some in everyone for item in some):
            parts.setdefault(index, {})[coordinate] = value
        found = {}
        for stage, code in enumerate(program.stages):
            for result in code.results:
                if result.kind == "output" and result.index in parts:
                    mesh = program.placement[stage].mesh
                    whole = assemble(parts[result.index], result.layout, mesh, result.global_shape)
                    found[result.index] = whole.to(self.device)
        return found

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

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], facts: Mapping[str, Any] | None = None) -> None:
        """The whole training state; loads under any plan and world size. Raises CheckpointError."""
        checkpoint.save(path, self._parts(), {"steps": self.steps, "seed": self.seed, "user": dict(facts or {})})

    def load(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Read what `save` wrote, under whatever plan. -> the facts that were given to `save`."""
        reader = checkpoint.Reader(path)
        for spec in self.shards.mine():
            tensor = self.shards.tensors()[spec.name]
            reader.read(f"model/{spec.name}", spec.shape, self._pieces(spec), tensor.data)
        if self.optimizer is not None:
            self._load_optimizer(reader)
        self.steps = int(reader.facts["steps"])
        self.seed = int(reader.facts["seed"])
        for executor in self._executors.values():
            if executor.stage >= 0:
                executor.comm.base_seed = self.seed
        return reader.facts["user"]

    def _pieces(self, spec: TensorSpec) -> checkpoint.Pieces:
        placement = self.shards.program.placement[self.shards.stage]
        return local_slices(spec.shape, spec.layout, placement.mesh, placement.coordinate(self.rank))

    def _owned(self) -> Iterator[TensorSpec]:
        for spec in self.shards.mine():
            placement = self.shards.program.placement[self.shards.stage]
            if self.shards.stage == spec.stages[0] and self.rank in owners(placement, spec.layout):
                yield spec

    def _parts(self) -> list[checkpoint.Part]:
        found = []
        tensors = self.shards.tensors()
        for spec in self._owned():
            found.append(checkpoint.Part(f"model/{spec.name}", tensors[spec.name], spec.shape, self._pieces(spec)))
            parameter = self.shards.parameters.get(spec.name)
            if self.optimizer is None or parameter is None:
                continue
            for key, value in self.optimizer.state.get(parameter, {}).items():
                value = value if torch.is_tensor(value) else torch.tensor(value)
                name = f"optimizer/{spec.name}/{key}"
                if value.shape == parameter.shape:
                    found.append(checkpoint.Part(name, value, spec.shape, self._pieces(spec)))
                else:
                    whole = [[(0, extent)] for extent in value.shape]
                    found.append(checkpoint.Part(name, value, tuple(value.shape), whole))
        return found

    def _load_optimizer(self, reader: checkpoint.Reader) -> None:
        assert self.optimizer is not None
        stored: dict[str, list[str]] = {}
        for name in reader.parts:
            if name.startswith("optimizer/"):
                parameter, _, key = name.removeprefix("optimizer/").rpartition("/")
                stored.setdefault(parameter, []).append(key)
        for name, parameter in self.shards.parameters.items():
            spec = self.shards.specs[name]
            state: dict[str, Any] = {}
            for key in stored.get(name, ()):
                full = f"optimizer/{name}/{key}"
                shape = tuple(reader.parts[full][0]["shape"])
                if shape == spec.shape and shape:
                    state[key] = torch.zeros_like(parameter)
                    reader.read(full, shape, self._pieces(spec), state[key])
                else:
                    state[key] = torch.zeros(shape)
                    reader.read(full, shape, [[(0, extent)] for extent in shape], state[key])
            if state:
                self.optimizer.state[parameter] = state
        if not stored and self.steps:
            raise CheckpointError(f"{reader.path} holds no optimizer state")

    # -- measuring -----------------------------------------------------------------------------------------------------

    def measure(self, batch: Batch, steps: int = 5) -> dict[str, Any]:
        """Timed steps without changing anything: gradients are computed and dropped.

        -> step_seconds (median over steps of the slowest rank), stages: per stage the median seconds a microbatch of
        "forward" and "backward" and of "reduce" a step, peak_nbytes per rank (CUDA; 0 where it cannot be known).
        """
        executor = self.executor("train")
        seconds = []
        executor.spans = []
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        kept = {name: p.grad for name, p in self.shards.parameters.items()}
        buffers = {name: b.clone() for name, b in self.shards.buffers.items()}
        for index in range(steps + 1):
            self.zero_grad()
            dist.barrier()
            if index == 1:
                executor.spans.clear()
            started = time.perf_counter()
            share, _ = executor.run(batch, True, None, self.steps)
            executor.whole_loss(share)
            seconds.append(time.perf_counter() - started)
        spans, executor.spans = executor.spans, None
        for name, parameter in self.shards.parameters.items():
            parameter.grad = kept[name]
        for name, buffer in self.shards.buffers.items():
            buffer.copy_(buffers[name])
        kinds = {Op.FORWARD: "forward", Op.BACKWARD: "backward", Op.REDUCE_GRADS: "reduce"}
        by_kind: dict[str, list[float]] = {}
        for span in spans:
            if span.instruction.op in kinds:
                by_kind.setdefault(kinds[span.instruction.op], []).append(span.end - span.start)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        mine = (executor.stage, {kind: _median(values) for kind, values in by_kind.items()}, seconds[1:], peak)
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, mine)
        stages: dict[int, dict[str, float]] = {}
        for stage, kinds_of, _, _ in everyone:
            if stage >= 0:
                held = stages.setdefault(stage, {})
                for kind, value in kinds_of.items():
                    held[kind] = max(held.get(kind, 0.0), value)
        slowest = [max(values) for values in zip(*(item[2] for item in everyone), strict=True)]
        return {
            "step_seconds": _median(slowest),
            "stages": [stages[index] for index in sorted(stages)],
            "peak_nbytes": [item[3] for item in everyone],
        }

    def close(self) -> None:
        """Drop the shards and the process groups that were made for the programs."""
        self._executors.clear()
        self.optimizer = None
        self.groups.close()


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else 0.0


def _with_all_buffers(programs: Mapping[str, Program]) -> Program:
    """The program whose specs say where tensors lie: "train" where there is one; all programs have to agree."""
    main = programs.get("train") or next(iter(programs.values()))
    for program in programs.values():
        mine = {s.name: (s.layout, s.stages) for s in (*main.parameters, *main.buffers)}
        read = {a.name for code in program.stages for a in code.arguments if a.kind in ("param", "buffer")}
        for spec in (*program.parameters, *program.buffers):
            if spec.name not in read:
                continue
            layout, stages = mine[spec.name]
            if layout != spec.layout or not set(spec.stages) <= set(stages):
                raise NotSupported(f"{spec.name} lies differently in the programs of this job")
    return main
