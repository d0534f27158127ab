"""Local shards of parameters and buffers, and whole tensors gathered from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import nn

from shardplan.planner.placement import MICROBATCH_AXIS, Layout, R, S, local_slices
from shardplan.planner.storage import Storage, part_pieces, span
from shardplan.rewrite import storage
from shardplan.rewrite.parts import assemble
from shardplan.rewrite.program import Program, StageRanks, TensorSpec
from shardplan.runtime.comm import DistComm
from shardplan.runtime.offload import Offloaded
from shardplan.runtime.stage_run import Outputs
from shardplan.runtime.supply import Supply
from shardplan.runtime.tied import homes


class Shards:
    """This rank's parameters and buffers of a program, by original name.

    parameters: what it stores and what the optimizer steps on: of a parameter that is split for storage this rank's
    part, at every level (see `planner.storage`). wholes: of such parameters at levels 1 and 2 what the stage's code
    uses, of which the stored part is a view where the split allows it. rounded: of parameters that are used in a lower
    precision what the stage's code uses (see `planner.precision`). offloaded: where the
    optimizer steps on the host. comm: of this rank's stage, once there is one.
    """

    def __init__(self, program: Program, rank: int, device: torch.device) -> None:
        self.program = program
        self.rank = rank
        self.device = device
        # The stages of a rank have one mesh, so a tensor lies in the same way in all of them.
        self.stages = program.stages_of(rank)
        self.stage = self.stages[0] if self.stages else -1
        self.comm: DistComm | None = None
        self.parameters: dict[str, nn.Parameter] = {}
        self.wholes: dict[str, torch.Tensor] = {}
        self.rounded: dict[str, torch.Tensor] = {}
        self.buffers: dict[str, torch.Tensor] = {}
        self.offloaded: Offloaded | None = None
        self.specs: dict[str, TensorSpec] = {s.name: s for s in (*program.parameters, *program.buffers)}

    def mine(self) -> Iterator[TensorSpec]:
        """Specs of the tensors that this rank holds."""
        return (spec for spec in self.specs.values() if not set(self.stages).isdisjoint(spec.stages))

    @property
    def stepped(self) -> Mapping[str, nn.Parameter]:
        """What the optimizer steps on."""
        return self.parameters if self.offloaded is None else self.offloaded.stepped

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored."""
        return {**self.parameters, **self.buffers}

    def used(self) -> dict[str, torch.Tensor]:
        """What the stage's code uses; of a parameter of level 3 it asks for the part."""
        return {**self.parameters, **self.wholes, **self.rounded, **self.buffers}

    def round(self) -> None:
        """Parameters have changed: bring what is used of them in a lower precision up to date."""
        if self.rounded:
            with torch.no_grad():
                torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                    list(self.rounded.values()), [self.parameters[name] for name in self.rounded]
                )

    def pieces(self, spec: TensorSpec) -> list[list[tuple[int, int]]]:
        """Which part of a tensor this rank stores: per dim the (start, stop) runs."""
        pieces = self._used_pieces(spec)
        if spec.storage is None:
            return pieces
        return part_pieces(pieces, spec.storage.dim, *self._along(spec.storage))

    def _used_pieces(self, spec: TensorSpec) -> list[list[tuple[int, int]]]:
        placement = self.program.placement[self.stage]
        return local_slices(spec.shape, spec.layout, placement.mesh, placement.coordinate(self.rank))

    def _along(self, stored: Storage) -> tuple[int, int]:
        """Size of the axis that a parameter is split over for storage, and this rank's index on it."""
        placement = self.program.placement[self.stage]
        return placement.mesh.size(stored.axis), placement.coordinate(self.rank)[stored.axis]

    def load(self, supply: Supply) -> None:
        """Take this rank's part of every tensor; the first call makes the leaves, later ones copy into them.

        Raises UsageError for a tensor without values, CheckpointError where a file cannot be read.
        """
        names = {spec.name for spec in self.program.parameters}
        with torch.no_grad(), supply.open(self.device) as values:
            for spec in self.mine():
                resident = spec.storage is not None and spec.storage.level < 3
                pieces = self._used_pieces(spec) if resident else self.pieces(spec)
                value = values.part(spec.name, spec.shape, pieces, spec.dtype)
                held = self.wholes.get(spec.name, self.tensors().get(spec.name))
                if held is not None:
                    held.copy_(value)
                    if resident:
                        self.parameters[spec.name].copy_(self._part(spec, value))
                elif spec.name not in names:
                    self.buffers[spec.name] = value
                elif resident:
                    part = self._part(spec, value).contiguous()
                    whole = value if spec.used is None else value.to(spec.used)
                    part = part if spec.used is None else part.clone()  # lest the whole of higher precision stay
                    assert spec.storage is not None  # what `resident` says
                    self.wholes[spec.name] = whole.requires_grad_(spec.storage.level == 1)
                    self.parameters[spec.name] = nn.Parameter(part, requires_grad=spec.trainable)
                else:
                    self.parameters[spec.name] = nn.Parameter(value, requires_grad=spec.trainable)
                    if spec.used is not None:
                        used = torch.empty_like(value, dtype=spec.used)
                        self.rounded[spec.name] = used.requires_grad_(spec.trainable)
        self.round()

    def _part(self, spec: TensorSpec, whole: torch.Tensor) -> torch.Tensor:
        """The part that this rank stores of a parameter as its stage uses it; a view."""
        assert spec.storage is not None
        size, index = self._along(spec.storage)
        start, stop = span(whole.shape[spec.storage.dim], size, index)
        return whole.narrow(spec.storage.dim, start, stop - start)

    def joined(self, spec: TensorSpec, part: torch.Tensor) -> torch.Tensor:
        """A stored part and those of the other ranks, as the stage uses the parameter. Collective in the stage."""
        if spec.storage is None:
            return part
        assert self.comm is not None
        place = (*spec.place(self.program.placement[self.stage].mesh)[:4], None)
        return storage.gather(self.comm, [place], [part.detach()])()[0]

    def owns(self, spec: TensorSpec) -> bool:
        """Whether this rank's part counts where every element of a tensor is wanted once."""
        placement = self.program.placement[self.stage]
        axis = spec.storage.axis if spec.storage is not None else ""
        layout = tuple(S(0) if a == axis else p for a, p in zip(placement.mesh.axes, spec.layout, strict=True))
        return spec.stages[0] in self.stages and self.rank in owners(placement, layout)

    def replicas(self, spec: TensorSpec) -> int:
        """On how many ranks of the job every element of the tensor is stored."""
        split = {MICROBATCH_AXIS, spec.storage.axis if spec.storage is not None else ""}
        total = 0
        for held in homes(self.program, spec):
            copies = 1
            for axis, size, placement in zip(held.mesh.axes, held.mesh.sizes, spec.layout, strict=True):
                if axis not in split and not placement.is_shard:
                    copies *= size
            total += copies
        return total


def owners(placement: StageRanks, layout: Layout) -> list[int]:
    """Ranks that together hold a tensor once, in mesh order."""
    found = []
    for rank in placement.ranks:
        coordinate = placement.coordinate(rank)
        if all(
            p.is_shard or coordinate.get(axis, 0) == 0
            for axis, p in zip(placement.mesh.axes, layout, strict=True)
            if axis != MICROBATCH_AXIS
        ):
            found.append(rank)
    return found


def collect(
    shards: Shards, held: Mapping[str, torch.Tensor | None], specs: tuple[TensorSpec, ...]
) -> dict[str, torch.Tensor]:
    """Whole tensors on rank 0 (an empty dict elsewhere). Collective: every rank calls it with the same specs.

    held: this rank's parts (None: there is none anywhere, the tensor is left out). Sums are expected to be taken: what
    is not a shard is whole.
    """
    each = ((spec, collect_one(shards, held.get(spec.name), spec)) for spec in specs)
    return {spec.name: whole for spec, whole in each if whole is not None}


def collect_one(shards: Shards, held: torch.Tensor | None, spec: TensorSpec, to: int = 0) -> torch.Tensor | None:
    """As `collect`, of one tensor: the whole on rank `to`, on the CPU; None elsewhere, or where there is none
    anywhere."""
    if held is not None and spec.stages[0] in shards.stages:
        held = shards.joined(spec, held)
    placement = shards.program.placement[spec.stages[0]]
    sources = owners(placement, spec.layout)
    part = held if shards.rank in sources else None
    present = torch.tensor([part is not None], dtype=torch.int64, device=shards.device)
    if dist.get_world_size() > 1:
        dist.all_reduce(present, dist.ReduceOp.MAX)
    if not int(present):
        return None
    parts: dict[tuple[tuple[str, int], ...], torch.Tensor] = {}
    for source in sources:
        coordinate = placement.coordinate(source)
        if shards.rank == source:
            value = torch.zeros(0) if part is None else part.detach().contiguous()
            if source != to:
                dist.send(value, to)
        if shards.rank == to:
            if source != to:
                shape = _shape(spec, placement, coordinate)
                value = torch.empty(shape, dtype=spec.dtype, device=shards.device)
                dist.recv(value, source)
            parts[tuple(coordinate.items())] = value.cpu()  # pyright: ignore[reportPossiblyUnboundVariable]
    return assemble(parts, spec.layout, placement.mesh, spec.shape) if shards.rank == to else None


def first_owner(shards: Shards, spec: TensorSpec) -> int:
    """The first rank that holds a tensor, or a part of it."""
    return owners(shards.program.placement[spec.stages[0]], spec.layout)[0]


def collect_outputs(
    program: Program, rank: int, device: torch.device, held: Outputs, everywhere: bool
) -> dict[int, torch.Tensor]:
    """Whole outputs of a forward program by position in the traced outputs, on rank 0 or on every rank. Collective.

    held: this rank's parts.
    """
    found: dict[int, torch.Tensor] = {}
    for stage, code in enumerate(program.stages):
        placement = program.placement[stage]
        for position, result in enumerate(code.results):
            if result.kind != "output":
                continue
            sources = owners(placement, result.layout)
            split = dict(zip(placement.mesh.axes, result.layout, strict=True)).get(MICROBATCH_AXIS, R) != R
            count = program.microbatches if split else 1
            parts: dict[tuple[tuple[str, int], ...], torch.Tensor] = {}
            for source in sources:
                if rank not in (0, source):
                    continue
                if rank == source:
                    stacked = torch.stack([held[i][stage, position] for i in range(count)])
                else:
                    stacked = torch.empty((count, *result.shape), dtype=result.dtype, device=device)
                if source != 0:
                    dist.send(stacked, 0) if rank == source else dist.recv(stacked, source)
                if rank == 0:
                    place = placement.coordinate(source).items()
                    parts |= {(*place, (MICROBATCH_AXIS, i)): part for i, part in enumerate(stacked.unbind())}
            if rank == 0:
                found[result.index] = assemble(parts, result.layout, placement.mesh, result.global_shape)
            elif everywhere:
                found[result.index] = torch.empty(result.global_shape, dtype=result.dtype, device=device)
            if everywhere and dist.get_world_size() > 1:
                dist.broadcast(found[result.index], 0)
    return found


def _shape(spec: TensorSpec, placement: StageRanks, coordinate: dict[str, int]) -> tuple[int, ...]:
    shape = list(spec.shape)
    for axis, size, p in zip(placement.mesh.axes, placement.mesh.sizes, spec.layout, strict=True):
        if p.is_shard and axis != MICROBATCH_AXIS:
            shape[p.dim] //= size
    return tuple(shape)
