"""Simulated ranks: the ranks of one stage mesh as threads of this process, for tests and proofs without processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import product
from typing import Any, TypeVar

import torch

from shardplan.planner.placement import Mesh
from shardplan.rewrite.draws import mix
from shardplan.rewrite.later import Later

T = TypeVar("T")


class _Exchange:
    """A rendezvous of the ranks of one group: everybody puts a value in, everybody gets all of them, in index order."""

    def __init__(self, size: int, timeout_seconds: float) -> None:
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=timeout_seconds)

    def swap(self, index: int, value: Any) -> list[Any]:
        self.slots[index] = value
        self.barrier.wait()
        result = list(self.slots)
        self.barrier.wait()
        return result


class ThreadComm:
    """`rewrite.comm.Comm` of one simulated rank. `microbatch` is the index on the axis "mb"."""

    def __init__(self, mesh: Mesh, coordinate: dict[str, int], exchanges: dict[Any, _Exchange]) -> None:
        self.mesh = mesh
        self.coordinate = coordinate
        self.exchanges = exchanges
        self.microbatch = 0
        self.base_seed = 0
        self.step = 0
        self.unsettled: list[Callable[[], None]] = []
        self.later = Later()

    def size(self, axis: str) -> int:
        return self.mesh.size(axis)

    def index(self, axis: str) -> int:
        return self.microbatch if axis == "mb" else self.coordinate.get(axis, 0)

    def _swap(self, axis: str, value: Any) -> list[Any]:
        if axis == "mb":
            raise RuntimeError("there is no collective on the microbatch axis")
        others = tuple(sorted((a, i) for a, i in self.coordinate.items() if a != axis))
        return self.exchanges[axis, others].swap(self.coordinate[axis], value)

    def all_reduce(self, x: torch.Tensor, axis: str, op: str = "sum") -> torch.Tensor:
        if self.size(axis) == 1:
            return x
        stacked = torch.stack(self._swap(axis, x.detach().clone()))
        return stacked.sum(0, dtype=x.dtype) if op == "sum" else stacked.amax(0)

    def all_gather(self, x: torch.Tensor, dim: int, axis: str) -> torch.Tensor:
        return x if self.size(axis) == 1 else torch.cat(self._swap(axis, x.detach().clone()), dim)

    def reduce_scatter(self, x: torch.Tensor, dim: int, axis: str) -> torch.Tensor:
        size = self.size(axis)
        return x if size == 1 else self.all_reduce(x, axis).chunk(size, dim)[self.index(axis)].contiguous()

    def all_to_all(self, x: torch.Tensor, split_dim: int, concat_dim: int, axis: str) -> torch.Tensor:
        size = self.size(axis)
        if size == 1:
            return x
        everyone = self._swap(axis, x.detach().clone())
        return torch.cat([part.chunk(size, split_dim)[self.index(axis)] for part in everyone], concat_dim)

    def exchange(self, x: torch.Tensor, sent: list[int], arriving: list[int], axis: str) -> torch.Tensor:
        if self.size(axis) == 1:
            return x
        everyone = self._swap(axis, x.detach().clone().split(sent))
        return torch.cat([parts[self.index(axis)] for parts in everyone])

    def start_all_gather(self, x: torch.Tensor, axis: str) -> Callable[[], torch.Tensor]:
        gathered = self.all_gather(x, 0, axis)
        return lambda: gathered

    def start_reduce_scatter(self, x: torch.Tensor, axis: str) -> Callable[[], torch.Tensor]:
        summed = self.reduce_scatter(x, 0, axis)[0]
        return lambda: summed

    def key(self, site: int) -> int:
        return mix(self.base_seed, self.step, site) >> 1


def make_comms(mesh: Mesh, timeout_seconds: float = 60.0) -> dict[tuple[int, ...], ThreadComm]:
    """One communicator per rank of the mesh, by coordinate in the mesh's axis order ("mb" left out)."""
    axes = [(axis, size) for axis, size in zip(mesh.axes, mesh.sizes, strict=True) if axis != "mb"]
    exchanges: dict[Any, _Exchange] = {}
    for axis, size in axes:
        rest = [(a, range(n)) for a, n in axes if a != axis]
        for combination in product(*(indices for _, indices in rest)):
            others = tuple(sorted(zip((a for a, _ in rest), combination, strict=True)))
            exchanges[axis, others] = _Exchange(size, timeout_seconds)
    names = [a for a, _ in axes]
    return {
        coordinate: ThreadComm(mesh, dict(zip(names, coordinate, strict=True)), exchanges)
        for coordinate in product(*(range(size) for _, size in axes))
    }


def run_ranks(
    mesh: Mesh | dict[tuple[int, ...], ThreadComm], function: Callable[[ThreadComm], T]
) -> dict[tuple[int, ...], T]:
    """Run `function(comm)` once per rank (of a mesh, or of communicators made before), each in a thread.

    Returns coordinate -> result. The first exception of a rank is raised.
    """
    comms = make_comms(mesh) if isinstance(mesh, Mesh) else mesh
    if len(comms) == 1:
        return {coordinate: function(comm) for coordinate, comm in comms.items()}
    results: dict[tuple[int, ...], T] = {}
    errors: list[BaseException] = []

    def run(coordinate: tuple[int, ...], comm: ThreadComm) -> None:
        try:
            results[coordinate] = function(comm)
        except BaseException as error:  # a rank's failure must free the others, whatever it was
            errors.append(error)
            for exchange in comm.exchanges.values():
                exchange.barrier.abort()

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in comms.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    if real or errors:
        raise (real or errors)[0]
    return results
