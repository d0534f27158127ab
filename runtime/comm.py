"""The communicator of one rank on torch.distributed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from shardplan.planner.placement import MICROBATCH_AXIS
from shardplan.rewrite.draws import mix
from shardplan.rewrite.later import Later
from shardplan.rewrite.program import StageRanks
from shardplan.runtime.groups import Groups, traffic


def _reduction(op: Any) -> dist.AllreduceOptions:
    options = dist.AllreduceOptions()
    options.reduceOp = op
    return options


_OPTIONS = {"sum": _reduction(dist.ReduceOp.SUM), "max": _reduction(dist.ReduceOp.MAX)}


class _Axis:
    """A mesh axis with more than one rank.

    order: the group rank of every mesh index, None where they are the same (a process group sorts its ranks, a mesh
    need not). inverse: the mesh index of every group rank.
    """

    __slots__ = ("group", "inverse", "order", "place", "size")

    def __init__(self, group: Any, ranks: tuple[int, ...], rank: int) -> None:
        self.group = group
        self.size = len(ranks)
        rising = sorted(ranks)
        self.place = rising.index(rank)
        self.order = None if list(ranks) == rising else [rising.index(r) for r in ranks]
        self.inverse = None if self.order is None else [ranks.index(r) for r in rising]


class DistComm:
    """`rewrite.comm.Comm` of one rank in one stage.

    The groups' own methods are called: the functions of torch.distributed cost a third more for a small tensor.
    microbatch and step are set by the executor before it runs stage code (also before a backward, which may
    recompute).
    """

    def __init__(self, placement: StageRanks, rank: int, groups: Groups, seed: int = 0) -> None:
        self.microbatch = 0
        self.step = 0
        self.base_seed = seed
        self.unsettled: list[Callable[[], None]] = []
        self.later = Later()
        self._sizes = dict(zip(placement.mesh.axes, placement.mesh.sizes, strict=True))
        self._index = placement.coordinate(rank)
        self._axes: dict[str, _Axis] = {}
        for axis, size in self._sizes.items():
            if axis != MICROBATCH_AXIS and size > 1:
                ranks = placement.group(rank, (axis,))
                self._axes[axis] = _Axis(groups.get(ranks), ranks, rank)

    def size(self, axis: str) -> int:
        return self._sizes.get(axis, 1)

    def index(self, axis: str) -> int:
        return self.microbatch if axis == MICROBATCH_AXIS else self._index.get(axis, 0)

    def all_reduce(self, x: torch.Tensor, axis: str, op: str = "sum") -> torch.Tensor:
        held = self._axes.get(axis)
        if held is None:
            return x
        traffic.collective_nbytes += x.nbytes
        result = x.clone(memory_format=torch.contiguous_format)
        held.group.allreduce([result], _OPTIONS[op]).wait()
        return result

    def all_gather(self, x: torch.Tensor, dim: int, axis: str) -> torch.Tensor:
        held = self._axes.get(axis)
        if held is None:
            return x
        traffic.collective_nbytes += x.nbytes
        x = x.contiguous() if x.ndim else x.reshape(1)
        stacked = x.new_empty((held.size * x.shape[0], *x.shape[1:]))
        held.group._allgather_base(stacked, x).wait()
        if dim == 0 and held.order is None:
            return stacked
        parts = stacked.chunk(held.size)
        return torch.cat(parts if held.order is None else [parts[place] for place in held.order], dim)

    def reduce_scatter(self, x: torch.Tensor, dim: int, axis: str) -> torch.Tensor:
        held = self._axes.get(axis)
        if held is None:
            return x
        traffic.collective_nbytes += x.nbytes
        stacked = self._outgoing(x, dim, held)
        if not x.is_cuda:
            # gloo's own sends everything everywhere; swapping parts and adding them here moves half the bytes or less.
            incoming = torch.empty_like(stacked)
            held.group.alltoall_base(incoming, stacked, [], []).wait()
            return incoming.sum(0, dtype=x.dtype)
        result = torch.empty_like(stacked[0])
        held.group._reduce_scatter_base(result, stacked).wait()
        return result

    def all_to_all(self, x: torch.Tensor, split_dim: int, concat_dim: int, axis: str) -> torch.Tensor:
        held = self._axes.get(axis)
        if held is None:
            return x
        traffic.collective_nbytes += x.nbytes
        outgoing = self._outgoing(x, split_dim, held)
        incoming = torch.empty_like(outgoing)
        held.group.alltoall_base(incoming, outgoing, [], []).wait()
        parts = incoming.unbind()
        return torch.cat(parts if held.order is None else [parts[place] for place in held.order], concat_dim)

    def exchange(self, x: torch.Tensor, sent: list[int], arriving: list[int], axis: str) -> torch.Tensor:
        held = self._axes.get(axis)
        if held is None:
            return x
        traffic.collective_nbytes += x.nbytes
        if held.inverse is not None:
            parts = x.split(sent)
            x = torch.cat([parts[index] for index in held.inverse])
            sent, arriving = ([counts[index] for index in held.inverse] for counts in (sent, arriving))
        incoming = x.new_empty((sum(arriving), *x.shape[1:]))
        held.group.alltoall_base(incoming, x.contiguous(), arriving, sent).wait()
        if held.order is None:
            return incoming
        parts = incoming.split(arriving)
        return torch.cat([parts[place] for place in held.order])

    def start_all_gather(self, x: torch.Tensor, axis: str) -> Callable[[], torch.Tensor]:
        held = self._axes.get(axis)
        if held is None:
            return lambda: x
        stacked = x.new_empty(held.size * x.numel())
        work = held.group._allgather_base(stacked, x)

        def arrive() -> torch.Tensor:
            work.wait()
            return stacked if held.order is None else stacked.view(held.size, -1)[held.order].view(-1)

        return arrive

    def start_reduce_scatter(self, x: torch.Tensor, axis: str) -> Callable[[], torch.Tensor]:
        held = self._axes.get(axis)
        if held is None:
            return lambda: x[0]
        outgoing = x if held.inverse is None else x[held.inverse]
        arriving = torch.empty_like(outgoing if not x.is_cuda else outgoing[0])
        if x.is_cuda:
            work = held.group._reduce_scatter_base(arriving, outgoing)
        else:
            work = held.group.alltoall_base(arriving, outgoing, [], [])

        def arrive(outgoing: torch.Tensor = outgoing) -> torch.Tensor:
            work.wait()
            return arriving if outgoing.is_cuda else arriving.sum(0, dtype=arriving.dtype)

        return arrive

    @staticmethod
    def _outgoing(x: torch.Tensor, dim: int, held: _Axis) -> torch.Tensor:
        """-> [group rank, *part]: the part of `dim` that every rank of the group gets, contiguous."""
        if held.inverse is None and dim == 0:
            return x.contiguous().view(held.size, x.shape[0] // held.size, *x.shape[1:])
        parts = x.chunk(held.size, dim)
        return torch.stack(parts if held.inverse is None else [parts[index] for index in held.inverse])

    def key(self, site: int) -> int:
        return mix(self.base_seed, self.step, site) >> 1
