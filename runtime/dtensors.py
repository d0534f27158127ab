"""Shards as distributed tensors, which torch.distributed.checkpoint and others can redistribute."""

from __future__ import annotations

from typing import cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from shardplan.planner.placement import MICROBATCH_AXIS, Placement, S
from shardplan.rewrite import storage
from shardplan.rewrite.parts import assemble
from shardplan.rewrite.program import StageRanks, TensorSpec
from shardplan.runtime.comm import DistComm
from shardplan.runtime.groups import Groups


class Distributed:
    """Wraps the tensors of one rank. The mesh is that of its stage, without axes of one rank."""

    def __init__(self, placement: StageRanks, comm: DistComm, rank: int, groups: Groups, device: torch.device) -> None:
        self._placement = placement
        self._comm = comm
        sized = [(a, n) for a, n in zip(placement.mesh.axes, placement.mesh.sizes, strict=True) if a != MICROBATCH_AXIS]
        self._axes = [axis for axis, size in sized if size > 1]
        # Process groups number their ranks in rising order; where a mesh does not, its shards have no standard form.
        self._rising = all(list(ranks) == sorted(ranks) for a in self._axes for ranks in [placement.group(rank, (a,))])
        self._mesh: DeviceMesh | None = None
        self._moved: dict[str, tuple[list[str], DeviceMesh]] = {}
        if self._axes:
            ranks = torch.tensor(placement.ranks).reshape([size for _, size in sized if size > 1])
            own = [groups.get(placement.group(rank, (axis,))) for axis in self._axes]
            if len(own) == 1:
                self._mesh = DeviceMesh.from_group(own[0], device.type, mesh_dim_names=(self._axes[0],))
            else:
                self._mesh = DeviceMesh.from_group(own, device.type, mesh=ranks, mesh_dim_names=tuple(self._axes))

    def wrap(self, spec: TensorSpec, local: torch.Tensor) -> torch.Tensor:
        """The tensor as one of its global shape; shares memory with `local`, which is what is stored.

        A dim that is split in sections has no counterpart there: such a tensor is gathered, a copy. On a stage of one
        rank it is a plain tensor. Collective in the stage.
        """
        local = local.detach()
        if self._mesh is None:
            return local
        states = dict(zip(self._placement.mesh.axes, spec.layout, strict=True))
        axes, mesh = self._axes, self._mesh
        stored = spec.storage
        if any(state.is_shard and state.sections for state in states.values()) or not self._rising:
            if stored is not None:
                place = (*spec.place(self._placement.mesh)[:4], None)
                local = storage.gather(self._comm, [place], [local])()[0]
            if any(state.is_shard for state in states.values()):
                local = self._whole(spec, local)
            states = {}
        elif stored is not None:
            inside = any(state.is_shard and state.dim == stored.dim for state in states.values())
            states[stored.axis] = S(stored.dim)
            if inside:
                axes, mesh = self._innermost(stored.axis)
        placements = [_standard(states.get(axis)) for axis in axes]
        shape = torch.Size(spec.shape)
        return DTensor.from_local(
            local, mesh, placements, run_check=False, shape=shape, stride=torch.empty(shape, device="meta").stride()
        )

    def _innermost(self, axis: str) -> tuple[list[str], DeviceMesh]:
        """The mesh with an axis moved to the end: what is split for storage is split inside all other splits."""
        if axis not in self._moved:
            assert self._mesh is not None
            axes = [*(a for a in self._axes if a != axis), axis]
            order = [self._axes.index(a) for a in axes]
            groups = [self._mesh.get_group(self._axes[i]) for i in order]
            ranks = self._mesh.mesh.permute(order)
            kind = self._mesh.device_type
            self._moved[axis] = axes, DeviceMesh.from_group(groups, kind, mesh=ranks, mesh_dim_names=tuple(axes))
        return self._moved[axis]

    def _whole(self, spec: TensorSpec, local: torch.Tensor) -> torch.Tensor:
        parts = {(): local}
        for axis in self._axes:
            stacked = self._comm.all_gather(torch.stack(list(parts.values())).unsqueeze(0), 0, axis)
            parts = {(*key, (axis, i)): stacked[i, j] for j, key in enumerate(parts) for i in range(len(stacked))}
        mesh = self._placement.mesh
        return assemble(parts, spec.layout, mesh, spec.shape)


def _standard(state: Placement | None) -> Shard | Replicate:
    return Shard(state.dim) if state is not None and state.is_shard else Replicate()


def whole_of(value: torch.Tensor) -> torch.Tensor:
    """The whole of a plain or distributed tensor. Collective over the mesh of a distributed one."""
    return cast(torch.Tensor, value.full_tensor()) if isinstance(value, DTensor) else value
