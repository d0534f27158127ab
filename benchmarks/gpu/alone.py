"""One rank of a job by itself: it computes what it would compute among the others, and what would come from them is
made up. So a stage of a model for 32 GPUs is timed on the one GPU that is there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardplan.planner.schedules import Op
from shardplan.rewrite.program import Program
from shardplan.runtime.engine import Engine
from shardplan.runtime.groups import Channel, Groups
from shardplan.runtime.live_bytes import peak_of
from shardplan.runtime.supply import Supply

_SPREAD = 0.02  # of made-up weights: small, so that losses stay finite


class _Done:
    """The work of a collective that is over."""

    def wait(self, *_: Any) -> bool:
        return True


class _Nobody:
    """A process group in which all the others hold what this rank holds. Results are valid numbers: indices that
    arrive stay in range."""

    group_name = "nobody"

    def allreduce(self, _tensors: Sequence[torch.Tensor], _options: Any = None) -> _Done:
        return _Done()

    def _allgather_base(self, into: torch.Tensor, value: torch.Tensor) -> _Done:
        into.view(-1, value.numel()).copy_(value.reshape(1, -1))
        return _Done()

    def _reduce_scatter_base(self, into: torch.Tensor, value: torch.Tensor) -> _Done:
        into.view(-1).copy_(value.reshape(-1)[: into.numel()])
        return _Done()

    def alltoall_base(self, into: torch.Tensor, value: torch.Tensor, *_: Any) -> _Done:
        into.copy_(value)
        return _Done()

    def send(self, _tensors: Sequence[torch.Tensor], _to: int, _tag: int = 0) -> _Done:
        return _Done()

    def recv(self, tensors: Sequence[torch.Tensor], _source: int, _tag: int = 0) -> _Done:
        for tensor in tensors:
            tensor.zero_()
        return _Done()


class Nobody(Groups):
    """Groups in which this rank is alone."""

    def __init__(self) -> None:
        self._group = _Nobody()

    def get(self, ranks: Any) -> Any:
        return self._group

    def channel(self, source: int, target: int, lane: int = 0) -> Channel:
        return Channel(self._group, source, target, lane)

    def close(self) -> None:
        pass


class _MadeUp:
    """Values of any parameter or buffer, of the size of this rank's part."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def part(
        self, _name: str, _shape: tuple[int, ...], pieces: Sequence[Sequence[tuple[int, int]]], dtype: torch.dtype
    ) -> torch.Tensor:
        extents = [sum(stop - start for start, stop in dim) for dim in pieces]
        made = torch.empty(extents, dtype=dtype, device=self._device)
        return made.normal_(0, _SPREAD) if dtype.is_floating_point else made.zero_()


class MadeUp(Supply):
    @contextmanager
    def open(self, device: torch.device) -> Iterator[Any]:
        yield _MadeUp(device)


@dataclass(frozen=True, slots=True)
class Measured:
    """Median seconds of an instruction, by op; peak_nbytes: of a step (0 where it cannot be known)."""

    seconds: dict[Op, float]
    step_seconds: float
    peak_nbytes: int


class Alone:
    """Rank `rank` of a program on a device. Starts a process group of its own, which `close` ends."""

    def __init__(
        self,
        program: Program,
        rank: int,
        device: torch.device,
        optimizer: Callable[..., torch.optim.Optimizer],
        batch: Mapping[str, torch.Tensor],
        weights: Mapping[str, torch.Tensor] | None = None,
        backend: str | None = None,
    ) -> None:
        world = 1 + max(max(placement.ranks) for placement in program.placement)
        if not dist.is_initialized():
            dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        self.device = device
        self.batch = {name: value.to(device) for name, value in batch.items()}
        self.engine = Engine(
            {"train": program}, rank, world, device, optimizer, backend=backend, groups=Nobody() if world > 1 else None
        )
        if weights is None:
            self.engine.load_parts(MadeUp())
        else:
            self.engine.load_full(weights)

    def step(self) -> torch.Tensor:
        loss = self.engine.train_step(self.batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return loss

    def measured(self, repeats: int) -> Measured:
        """Steps after a warm-up, each with its instructions timed one by one, and one in which memory is counted."""
        executor = self.engine.executor("train")
        for _ in range(2):
            self.step()
        self.engine.zero_grad()
        peak = peak_of(self.step, self.device, self.engine.standing())
        found: dict[Op, list[float]] = {}
        whole: list[float] = []
        for _ in range(repeats):
            started = time.perf_counter()
            self.step()
            whole.append(time.perf_counter() - started)
            executor.spans = []
            self.step()
            for span in executor.spans:
                found.setdefault(span.instruction.op, []).append(span.end - span.ready)
            executor.spans = None
        return Measured({op: statistics.median(v) for op, v in found.items()}, statistics.median(whole), peak)

    def close(self) -> None:
        self.engine.close()
        if dist.is_initialized():
            dist.destroy_process_group()
