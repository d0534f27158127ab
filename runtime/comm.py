"""The communicator of one rank on torch.distributed, and the process groups it needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from shardplan.rewrite.program import StageRanks

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class Groups:
    """Process groups by their ranks. Every rank of the job asks for the same groups in the same order, also for those
    it is not in: creating one is collective."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, ...], Any] = {}

    def get(self, ranks: Iterable[int]) -> Any:
        """The group of these ranks, created at the first call (ranks outside it get a token)."""
        key = tuple(ranks)
        if key not in self._groups:
            whole = list(key) == list(range(dist.get_world_size()))
            self._groups[key] = dist.group.WORLD if whole else dist.new_group(list(key))
        return self._groups[key]

    def of_stage(self, placement: StageRanks, axes: tuple[str, ...]) -> None:
        """Create all groups of a stage along `axes`."""
        for group in sorted({placement.group(rank, axes) for rank in placement.ranks}):
            if len(group) > 1:
                self.get(group)

    def close(self) -> None:
        """Destroy the groups that were created here."""
        for group in self._groups.values():
            if group is not dist.group.WORLD and group is not dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(group)
        self._groups.clear()


class DistComm:
    """`rewrite.comm.Comm` of one rank in one stage.

    microbatch, step and training are set by the executor before it runs stage code (also before a backward, which may
    recompute).
    """

    def __init__(self, placement: StageRanks, rank: int, groups: Groups, seed: int = 0) -> None:
        self.training = True
        self.microbatch = 0
        self.step = 0
        self.base_seed = seed
        self._sizes = dict(zip(placement.mesh.axes, placement.mesh.sizes, strict=True))
        self._index = placement.coordinate(rank)
        self._groups: dict[str, Any] = {}
        for axis, size in self._sizes.items():
            if axis != "mb" and size > 1:
                self._groups[axis] = groups.get(placement.group(rank, (axis,)))

    def size(self, axis: str) -> int:
        return self._sizes.get(axis, 1)

    def index(self, axis: str) -> int:
        return self.microbatch if axis == "mb" else self._index.get(axis, 0)

    def all_reduce(self, x: torch.Tensor, axis: str, op: str = "sum") -> torch.Tensor:
        if self.size(axis) == 1:
            return x
        result = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, _OPS[op], group=self._groups[axis])
        return result

    def all_gather(self, x: torch.Tensor, dim: int, axis: str) -> torch.Tensor:
        size = self.size(axis)
        if size == 1:
            return x
        x = x.contiguous()
        stacked = x.new_empty((size * x.shape[0], *x.shape[1:]) if x.ndim else (size,))
        dist.all_gather_into_tensor(stacked, x, group=self._groups[axis])
        if dim == 0:
            return stacked
        return torch.cat(stacked.chunk(size), dim)

    def reduce_scatter(self, x: torch.Tensor, dim: int, axis: str) -> torch.Tensor:
        size = self.size(axis)
        if size == 1:
            return x
        if not x.is_cuda:
            # gloo reduces and scatters at the price of an all-reduce.
            return self.all_reduce(x, axis).chunk(size, dim)[self.index(axis)].contiguous()
        stacked = x.contiguous() if dim == 0 else torch.cat(x.chunk(size, dim))
        result = stacked.new_empty((stacked.shape[0] // size, *stacked.shape[1:]))
        dist.reduce_scatter_tensor(result, stacked, group=self._groups[axis])
        return result

    def all_to_all(self, x: torch.Tensor, split_dim: int, concat_dim: int, axis: str) -> torch.Tensor:
        size = self.size(axis)
        if size == 1:
            return x
        outgoing = torch.stack(x.chunk(size, split_dim))
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=self._groups[axis])
        return torch.cat(incoming.unbind(), concat_dim)

    def seed(self, site: int, axes: tuple[str, ...]) -> int:
        parts = (self.base_seed, self.step, site, self.microbatch if "mb" in axes else -1)
        return hash((*parts, *(self.index(axis) for axis in sorted(axes) if axis != "mb"))) & 0x7FFF_FFFF_FFFF
