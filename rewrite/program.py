"""The Program: everything a rank needs to run, as plain data. The only thing that passes from rewrite to runtime.

A stage's code is Python source, ``def stage(comm, device, <arguments>): ... return <results>``. `comm` is bound by
whoever runs it (a rank's collectives, a thread in a test), `device` replaces devices that tracing baked in. The same
source runs on every rank of a stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from shardplan.planner.instructions import Schedule
from shardplan.planner.leaf_op import Leaf
from shardplan.planner.placement import D, Layout, Mesh, local_shape
from shardplan.planner.plan import BUCKET_NBYTES
from shardplan.planner.storage import Storage


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a stage function.

    kind: "param" | "shard" (the stored part of a parameter, see `planner.storage`) | "buffer" | "constant" | "input" |
        "recv" | "denominator".
    name: parameter/buffer/constant/input name as in `Source.name`; for "recv" and "denominator" the value's name.
    stage: for "recv" the stage that sends it, else -1.
    shape, dtype: local (of a shard: the largest); requires_grad: for "recv", whether its gradient is sent back.
    layout: for "recv", how it arrives on the stage's mesh.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False
    stage: int = -1
    layout: Layout = ()


@dataclass(frozen=True, slots=True)
class Result:
    """One result of a stage function.

    kind: "send" | "loss" | "output" | "watch" (only looked at, see `rewrite.compare`).
    stages: for "send", the stages that receive it (their gradients are summed).
    index: for "output", the position in the traced output tuple.
    layout: how the local tensor lies on the stage's mesh (global_shape is the whole).
    late: it depends on parameters only, so that under a split backward its gradient goes into the second part.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False
    stages: tuple[int, ...] = ()
    index: int = -1
    layout: Layout = ()
    global_shape: tuple[int, ...] = ()
    late: bool = False


@dataclass(frozen=True, slots=True)
class StageCode:
    """Source of one stage and what goes in and out, in order."""

    source: str
    arguments: tuple[Argument, ...]
    results: tuple[Result, ...]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """How a parameter, buffer or input lies on its stage's mesh.

    layout: along the stage mesh's axes (incl. "mb", on which only inputs are split). reduce_axes: mesh axes on which
    the gradient is a sum still to be taken at the end of the step. stages: every stage that holds the tensor; where
    there are several (tied parameters) their gradients are added up as well. storage: how a parameter is split for
    storage, inside the layout, on an axis that is then none of reduce_axes; None: as it is used. dtype: stored; used:
    what the stages' code takes where that is another dtype (see `planner.precision`).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout
    trainable: bool = False
    reduce_axes: tuple[str, ...] = ()
    stages: tuple[int, ...] = ()
    aliases: tuple[str, ...] = ()
    storage: Storage | None = None
    used: torch.dtype | None = None

    def place(self, mesh: Mesh) -> tuple[str, int, int, bool, torch.dtype | None]:
        """Of a parameter that is split for storage: the axis, the dim, that dim's extent as the stage uses the
        parameter, whether a rank has only a summand of its gradient there, and the dtype in which it is used where that
        is not the one in which it is stored (see `rewrite.storage`)."""
        assert self.storage is not None
        axis, dim = self.storage.axis, self.storage.dim
        extent = local_shape(self.shape, self.layout, mesh)[dim]
        return axis, dim, extent, self.layout[mesh.axes.index(axis)] == D, self.used


@dataclass(frozen=True, slots=True)
class Denominator:
    """A sum over the whole global batch that follows from the inputs alone and is needed in every microbatch: the count
    that a token-weighted mean divides by, the sum of a mask, the mean of a target.

    Before the first microbatch the executor runs `source` (a function like a stage's, of "input", "buffer", "constant"
    and earlier "denominator" arguments only) for every microbatch, adds the results and all-reduces the sum over
    `axes`; `name` is the "denominator" argument of the stage that needs it.
    """

    name: str
    stage: int
    source: str
    arguments: tuple[Argument, ...]
    axes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StageRanks:
    """Devices of a stage: `ranks` in row-major order of the mesh without the axis "mb". shares: see `StagePlan`."""

    mesh: Mesh
    ranks: tuple[int, ...]
    shares: tuple[int, ...] = ()

    def coordinate(self, rank: int) -> dict[str, int]:
        """Axis name -> index of a rank in the mesh."""
        index = self.ranks.index(rank)
        found: dict[str, int] = {}
        for axis, size in reversed(list(zip(self.mesh.axes, self.mesh.sizes, strict=True))):
            if axis != "mb":
                found[axis] = index % size
                index //= size
        return found

    def has(self, coordinate: Mapping[str, int], microbatch: int) -> bool:
        """Whether the rank there runs a microbatch (-1: what is done once a step)."""
        if not self.shares or microbatch < 0:
            return True
        first = sum(self.shares[: coordinate["dp"]])
        return first <= microbatch < first + self.shares[coordinate["dp"]]

    def group(self, rank: int, axes: tuple[str, ...]) -> tuple[int, ...]:
        """Ranks that differ from `rank` only on `axes` (itself included), in mesh order."""
        mine = self.coordinate(rank)
        kept = [axis for axis in mine if axis not in axes]
        return tuple(r for r in self.ranks if all(self.coordinate(r)[a] == mine[a] for a in kept))


@dataclass(frozen=True, slots=True)
class Program:
    """A whole job for one call kind ("train": loss and gradients; "forward": outputs).

    stages[i] runs on placement[i]. schedule has one list per pipeline position; positions[i] gives the ranks of
    position i. loss_stage: the stage whose "loss" result counts, -1 for none. leaves: submodules that are run whole, by
    the name that the stages' sources call them. uneven: parameters that get a gradient on some ranks of a group and
    none on others, because ranks go different ways inside a leaf. late: parameters read by leaves, whose gradients may
    arrive in several parts. bucket_nbytes: about how many bytes of gradients are summed at a time; reduction,
    average_every, offload: see `Plan`.
    """

    kind: str
    stages: tuple[StageCode, ...]
    placement: tuple[StageRanks, ...]
    schedule: Schedule
    microbatches: int
    parameters: tuple[TensorSpec, ...]
    buffers: tuple[TensorSpec, ...]
    inputs: tuple[TensorSpec, ...]
    denominators: tuple[Denominator, ...] = ()
    loss_stage: int = -1
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    leaves: dict[str, Leaf] = field(default_factory=dict)
    uneven: frozenset[str] = frozenset()
    late: frozenset[str] = frozenset()
    bucket_nbytes: int = BUCKET_NBYTES
    reduction: str = "exact"
    average_every: int = 0
    offload: str = ""

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank runs."""
        return tuple(stage for stage, placement in enumerate(self.placement) if rank in placement.ranks)

    @property
    def world_size(self) -> int:
        return len({rank for stage in self.placement for rank in stage.ranks})
