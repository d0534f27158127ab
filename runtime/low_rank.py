"""Sums of matrix gradients as products of small factors: PowerSGD (Vogels, Karimireddy, Jaggi 2019, algorithm 1).

Rank i of a group has the gradient M_i [n, m] and what earlier steps left out of it, E_i. With Q [m, r] of the step
before (the same on all ranks):

    M_i := M_i + E_i,   P := orthonormal basis of sum_i M_i Q,   Q_i := M_i^T P,   E_i := M_i - P Q_i^T,   Q := sum Q_i

and every rank takes P Q^T for sum_i M_i. Two all-reduces of r (n + m) elements instead of one of n m: the first begins
when the bucket's gradients are final, while backward goes on, the second when backward is over. What counts later of
the E_i is their sum, which a checkpoint keeps, with Q.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from shardplan.planner.wire import Wire
from shardplan.rewrite.program import TensorSpec
from shardplan.runtime.bucket import Bucket
from shardplan.runtime.checkpoint import Part, Pieces, Reader
from shardplan.runtime.groups import Groups
from shardplan.runtime.parameters import Shards


@dataclass(slots=True)
class Factors:
    """Of one gradient, between steps. error: [n, m], None where nothing was left out. q: [m, r]."""

    q: torch.Tensor
    error: torch.Tensor | None = None

    @staticmethod
    def first(leaf: torch.Tensor, rank: int) -> Factors:
        """The same on all ranks of a group."""
        generator = torch.Generator().manual_seed(leaf.numel())
        columns = leaf[0].numel()
        return Factors(torch.randn(columns, rank, generator=generator).to(leaf.device, leaf.dtype))


class LowRankBucket(Bucket):
    """A bucket of matrices. kept: leaf -> `Factors`, of this program and of others that share the leaves."""

    __slots__ = ("_factors", "_lefts", "_matrices", "_rank", "_sent", "kept")

    def __init__(self, group: Any, leaves: list[torch.Tensor], rank: int, kept: dict[torch.Tensor, Factors]) -> None:
        super().__init__(group, leaves)
        self.kept = kept
        self._rank = rank
        self._factors: list[Factors] = []
        self._matrices: list[torch.Tensor] = []
        self._lefts: list[torch.Tensor] = []
        self._sent: torch.Tensor | None = None

    @property
    def flattens(self) -> bool:
        return False

    def launch(self) -> None:
        """Add what was left out, and start the sum of the first factors."""
        self.launched = True
        if all(leaf.grad is None for leaf in self.leaves):
            return
        self._factors, self._matrices = [], []
        for leaf in self.leaves:
            if leaf not in self.kept:
                self.kept[leaf] = Factors.first(leaf, self._rank)
            factors = self.kept[leaf]
            if leaf.grad is None:
                gradient = torch.zeros_like(leaf, memory_format=torch.contiguous_format)
            else:
                leaf.grad = gradient = leaf.grad.contiguous()
            matrix = gradient.view(len(leaf), -1)
            if factors.error is not None:
                matrix += factors.error
            self._factors.append(factors)
            self._matrices.append(matrix)
        pairs = zip(self._matrices, self._factors, strict=True)
        self._sent = torch.cat([(matrix @ factors.q).flatten() for matrix, factors in pairs])
        self.work = self.group.allreduce([self._sent])

    def proceed(self) -> None:
        """When backward is over: start the sum of the second factors."""
        if self.work is None:
            return
        self.work.wait()
        lefts = self._parted([len(matrix) for matrix in self._matrices])
        mine = []
        for position, (factors, matrix) in enumerate(zip(self._factors, self._matrices, strict=True)):
            left = lefts[position] = _basis(lefts[position])
            right = matrix.t() @ left
            factors.error = torch.addmm(matrix, left, right.t(), alpha=-1)
            mine.append(right.flatten())
        self._lefts = lefts
        self._sent = torch.cat(mine)
        self.work = self.group.allreduce([self._sent])

    def wait(self) -> None:
        self.absent = {i for i, leaf in enumerate(self.leaves) if leaf.grad is None}
        if self.work is None:
            return
        self.work.wait()
        rights = self._parted([matrix.shape[1] for matrix in self._matrices])
        for left, right, factors, matrix in zip(self._lefts, rights, self._factors, self._matrices, strict=True):
            factors.q = right.clone()
            torch.mm(left, right.t(), out=matrix)
        self._factors, self._matrices, self._lefts, self._sent = [], [], [], None

    def _parted(self, rows: list[int]) -> list[torch.Tensor]:
        """What was summed, by matrix: [rows, r]."""
        assert self._sent is not None
        parts = self._sent.split([count * self._rank for count in rows])
        return [part.view(count, self._rank) for part, count in zip(parts, rows, strict=True)]


def _basis(columns: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that span these, the same on all ranks."""
    rough = columns.dtype in (torch.bfloat16, torch.float16)
    return torch.linalg.qr(columns.float() if rough else columns).Q.to(columns.dtype)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def saved(shards: Shards, groups: Groups, factors: dict[torch.Tensor, Factors]) -> list[Part]:
    """What this rank writes: of every gradient the sum of what ranks have left out, and Q of its part. Collective in
    the groups that sum gradients."""
    found = []
    for spec, parameter, ranks in _summed(shards):
        kept = factors.get(parameter)
        if kept is None:
            continue
        error = torch.zeros_like(parameter.data) if kept.error is None else kept.error.view(parameter.shape).clone()
        groups.get(ranks).allreduce([error]).wait()
        if shards.owns(spec):
            pieces = shards.pieces(spec)
            whole = [[(0, extent)] for extent in kept.q.shape]
            found.append(Part(_error_name(spec), error, spec.shape, pieces))
            found.append(Part(_factor_name(spec, pieces), kept.q, tuple(kept.q.shape), whole))
    return found


def read(reader: Reader, shards: Shards, wire: Wire, factors: dict[torch.Tensor, Factors]) -> None:
    """Take it up; what was left out goes to one rank of every sum."""
    factors.clear()
    for spec, parameter, ranks in _summed(shards):
        rank = wire.factored(parameter.shape)
        if not rank or _error_name(spec) not in reader.parts:
            continue
        kept = factors[parameter] = Factors.first(parameter, rank)
        pieces = shards.pieces(spec)
        name = _factor_name(spec, pieces)
        if name in reader.parts and reader.shape(name) == tuple(kept.q.shape):
            kept.q.copy_(reader.whole(name))
        if shards.rank == min(ranks):
            error = torch.empty_like(parameter.data)
            reader.read(_error_name(spec), spec.shape, pieces, error)
            kept.error = error.view(len(error), -1)


def _summed(shards: Shards) -> Iterator[tuple[TensorSpec, torch.Tensor, tuple[int, ...]]]:
    for spec in shards.mine():
        parameter = shards.parameters.get(spec.name)
        if parameter is not None and spec.reduce_axes:
            yield spec, parameter, shards.program.placement[shards.stage].group(shards.rank, spec.reduce_axes)


def _error_name(spec: TensorSpec) -> str:
    return f"reduction/{spec.name}/left out"


def _factor_name(spec: TensorSpec, pieces: Pieces) -> str:
    runs = ",".join("+".join(f"{start}-{stop}" for start, stop in dim) for dim in pieces)
    return f"reduction/{spec.name}/q of {runs}"
