"""Sums of gradients at the end of a step: over the mesh axes of a stage, then over the stages of a tied parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from shardplan.errors import NotSupported
from shardplan.rewrite.program import Program, TensorSpec
from shardplan.runtime.groups import Groups

_BUCKET_NBYTES = 25 << 20


class GradientSums:
    """The sums that one rank takes part in. All ranks make it in the same order (groups are created).

    Every rank runs the same sums of a group in the same order: parameters are taken in the program's order, and all
    sums inside stages come before those between stages.
    """

    def __init__(
        self, program: Program, stage: int, rank: int, tensors: Mapping[str, torch.Tensor], groups: Groups
    ) -> None:
        for spec in program.parameters:
            if len(spec.reduce_axes) > 1:
                for index in spec.stages:
                    groups.of_stage(program.placement[index], spec.reduce_axes)
        for ranks in sorted({ranks for spec in program.parameters for ranks in twins(program, spec)}):
            groups.get(ranks)
        inside: dict[tuple[int, ...], list[torch.Tensor]] = {}
        between: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for spec in program.parameters:
            if not spec.trainable or stage not in spec.stages:
                continue
            ranks = program.placement[stage].group(rank, spec.reduce_axes)
            if len(ranks) > 1:
                inside.setdefault(ranks, []).append(tensors[spec.name])
            for ranks in twins(program, spec):
                if rank in ranks:
                    between.setdefault(ranks, []).append(tensors[spec.name])
        # One order of all groups of the job, so that ranks that share some of their groups do not wait in a circle.
        ordered = sorted(inside.items(), key=lambda item: (-len(item[0]), item[0]))
        self._inside = [(groups.get(ranks), leaves) for ranks, leaves in ordered]
        self._between = [(groups.get(ranks), leaves) for ranks, leaves in sorted(between.items())]
        uneven = {id(tensors[name]) for name in program.uneven if name in tensors}
        held = [(group, [leaf for leaf in leaves if id(leaf) in uneven]) for group, leaves in self._inside]
        self._uneven = [(group, leaves) for group, leaves in held if leaves]
        self._agreed = False

    def run(self) -> None:
        """Replace the gradients by their sums."""
        for group, leaves in self._uneven:
            for leaf in _read_anywhere(group, leaves):
                if leaf.grad is None:
                    leaf.grad = torch.zeros_like(leaf)
        _sum_gradients(self._inside)
        if not self._agreed:
            self._between = [(group, _read_anywhere(group, leaves)) for group, leaves in self._between]
            self._agreed = True
        for _, leaves in self._between:
            for leaf in leaves:
                if leaf.grad is None:
                    leaf.grad = torch.zeros_like(leaf)
        _sum_gradients(self._between)


def twins(program: Program, spec: TensorSpec) -> list[tuple[int, ...]]:
    """Ranks at the same place of several stages that hold the same part of a tied parameter. Raises NotSupported."""
    if len(spec.stages) < 2:
        return []
    placements = [program.placement[stage] for stage in spec.stages]
    if len({p.mesh for p in placements}) > 1:
        raise NotSupported(f"{spec.name} is tied across stages of unequal width")
    return [tuple(ranks) for ranks in zip(*(p.ranks for p in placements), strict=True)]


def buckets(tensors: Iterable[torch.Tensor], nbytes: int = _BUCKET_NBYTES) -> list[list[torch.Tensor]]:
    """Tensors of one dtype together, in order, at most `nbytes` in a bucket (a larger tensor stands alone)."""
    found: list[list[torch.Tensor]] = []
    open_: dict[torch.dtype, tuple[list[torch.Tensor], int]] = {}
    for tensor in tensors:
        mine = tensor.numel() * tensor.element_size()
        bucket, size = open_.get(tensor.dtype, ([], 0))
        if not bucket or size + mine > nbytes:
            bucket, size = [], 0
            found.append(bucket)
        bucket.append(tensor)
        open_[tensor.dtype] = bucket, size + mine
    return found


def _sum_gradients(sums: list[tuple[Any, list[torch.Tensor]]]) -> None:
    """All-reduce bucket by bucket; while one is under way the next is packed. Gradients become views of the buckets.

    A parameter without a gradient has none on any rank of its group, whose ranks run the same code.
    """
    running: list[tuple[Any, list[torch.Tensor], torch.Tensor]] = []
    for group, leaves in sums:
        for bucket in buckets(leaf for leaf in leaves if leaf.grad is not None):
            gradients = [leaf.grad for leaf in bucket if leaf.grad is not None]
            if len(gradients) == 1:
                flat = gradients[0].contiguous().view(-1)
            else:
                flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
                for leaf in bucket:
                    leaf.grad = None  # so that no more than a bucket is held twice
            del gradients
            running.append((group.allreduce([flat]), bucket, flat))
    for work, bucket, flat in running:
        work.wait()
        for leaf, part in zip(bucket, flat.split([leaf.numel() for leaf in bucket]), strict=True):
            leaf.grad = part.view(leaf.shape)


def _read_anywhere(group: Any, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tied parameters that get a gradient in at least one of their stages."""
    present = torch.tensor([leaf.grad is not None for leaf in leaves], dtype=torch.int32, device=leaves[0].device)
    dist.all_reduce(present, dist.ReduceOp.MAX, group=group)
    return [leaf for leaf, some in zip(leaves, present.tolist(), strict=True) if some]
