"""Gradients of parameters that several stages hold: their sums between stages.

Where the stages have one mesh, ranks at the same place hold the same part and all-reduce it. Where meshes differ, every
stage sends its gradient to the others, box by box as `planner.transfers` cuts it, and adds up what arrives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import torch
import torch.distributed as dist

from shardplan.planner.placement import Layout, R
from shardplan.planner.transfers import Box, Side, transfers
from shardplan.rewrite.program import Program, StageRanks, TensorSpec
from shardplan.runtime.groups import Channel, Groups

_LANE = 1 << 16  # beyond those of activations


def homes(program: Program, spec: TensorSpec) -> list[StageRanks]:
    """The different placements of the stages that hold a tensor; stages of the same ranks share it."""
    return list(dict.fromkeys(program.placement[stage] for stage in spec.stages))


def twins(program: Program, spec: TensorSpec) -> list[tuple[int, ...]]:
    """Ranks at the same place of several stages that hold the same part of a tied parameter; none where the stages have
    different meshes."""
    placements = homes(program, spec)
    if len(placements) < 2 or len({p.mesh for p in placements}) > 1:
        return []
    return [tuple(ranks) for ranks in zip(*(p.ranks for p in placements), strict=True)]


def read_anywhere(group: Any, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The parameters that get a gradient on at least one rank of the group. Collective."""
    present = torch.tensor([leaf.grad is not None for leaf in leaves], dtype=torch.int32, device=leaves[0].device)
    dist.all_reduce(present, dist.ReduceOp.MAX, group=group)
    return [leaf for leaf, some in zip(leaves, present.tolist(), strict=True) if some]


class TiedSums:
    """Sums over stages of unequal meshes. All ranks make it in the same order (groups are created). None of the
    parameters is split for storage."""

    def __init__(self, program: Program, rank: int, tensors: Mapping[str, torch.Tensor], groups: Groups) -> None:
        self._boxes: list[tuple[torch.Tensor, list[tuple[Channel, Box]], list[tuple[Channel, Box]]]] = []
        self._groups: list[tuple[Any, list[torch.Tensor]]] = []
        for spec in program.parameters:
            placements = homes(program, spec)
            if not spec.trainable or len({p.mesh for p in placements}) < 2:
                continue
            group = groups.get({r for placement in placements for r in placement.ranks})
            sends: list[tuple[Channel, Box]] = []
            receives: list[tuple[Channel, Box]] = []
            for source, target in permutations(placements, 2):
                sides = [Side(_whole(spec), p.mesh, p.ranks) for p in (source, target)]
                for box in transfers(spec.shape, *sides):
                    channel = groups.channel(box.source, box.target, _LANE)
                    if box.source == rank:
                        sends.append((channel, box))
                    if box.target == rank:
                        receives.append((channel, box))
            if any(rank in placement.ranks for placement in placements):
                leaf = tensors[spec.name]
                self._boxes.append((leaf, sends, receives))
                self._groups.append((group, [leaf]))
        self._agreed = False

    def run(self) -> None:
        """Replace the gradients by their sums."""
        if not self._agreed:
            self._boxes = [
                item
                for item, (group, leaf) in zip(self._boxes, self._groups, strict=True)
                if read_anywhere(group, leaf)
            ]
            self._agreed = True
        for leaf, sends, receives in self._boxes:
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
            gradient = leaf.grad
            arriving = []
            for channel, box in receives:
                buffer = torch.empty_like(gradient[box.here], memory_format=torch.contiguous_format)
                arriving.append((channel.receive(buffer), buffer, box))
            parts = [gradient[box.there].clone(memory_format=torch.contiguous_format) for _, box in sends]
            leaving = [(channel.send(part), part) for (channel, _), part in zip(sends, parts, strict=True)]
            for work, buffer, box in arriving:
                work.wait()
                gradient[box.here] += buffer
            for work, _ in leaving:
                work.wait()


def _whole(spec: TensorSpec) -> Layout:
    """How the gradient lies when the sums inside the stage have been taken."""
    return tuple(p if p.is_shard else R for p in spec.layout)
