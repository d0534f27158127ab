"""Replicas that step by themselves and average their parameters every so many steps (local SGD, Stich 2018).

Parameters that replicas have in common (placement D on "dp") keep the gradient of their own replica's part of the
batch. The loss is a mean over the whole batch, so an optimizer step takes n times that gradient, n replicas; with plain
SGD and an average after every step that is what one device does. Sums over other axes are taken as ever, and so are
those of parameters that replicas share out between them. The optimizer's state stays with each replica. A checkpoint
has the average, for any plan, and beside it what each replica has, for plans of as many replicas.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from shardplan.errors import NotSupported
from shardplan.planner.placement import D, S
from shardplan.planner.plan import BUCKET_NBYTES
from shardplan.rewrite.program import Program, TensorSpec
from shardplan.runtime import optim
from shardplan.runtime.checkpoint import Part, Reader
from shardplan.runtime.groups import Groups
from shardplan.runtime.parameters import Shards, owners
from shardplan.runtime.reduction import packed
from shardplan.runtime.tied import homes

AXIS = "dp"


def check(program: Program) -> None:
    """Raises NotSupported where replicas cannot step by themselves."""
    for spec in program.parameters if program.average_every else ():
        if spec.storage is not None and spec.storage.axis == AXIS and spec.trainable:
            raise NotSupported(
                f"replicas share the storage of {spec.name}, so they cannot step by themselves",
                hints=["average_every= goes with zero=0"],
            )
        if len({placement.mesh.size(AXIS) for placement in homes(program, spec)}) > 1:
            raise NotSupported(
                f"stages of different numbers of replicas share {spec.name}, and average_every= is given"
            )


class Replicas:
    """Of one rank. Make it on every rank, in the same order (groups are created)."""

    def __init__(self, shards: Shards, groups: Groups) -> None:
        program = shards.program
        self.every = program.average_every
        self.since = 0
        self._shards = shards
        self._specs: list[TensorSpec] = []
        self.count = self.index = 0
        check(program)
        if not self.every:
            return
        for placement in dict.fromkeys(program.placement):
            groups.of_stage(placement, (AXIS,))
        if shards.stage < 0:
            return
        placement = program.placement[shards.stage]
        self.count, self.index = placement.mesh.size(AXIS), placement.coordinate(shards.rank)[AXIS]
        if self.count > 1:
            self._group = groups.get(placement.group(shards.rank, (AXIS,)))
            self._specs = [spec for spec in shards.mine() if self._apart(spec)]

    def _apart(self, spec: TensorSpec) -> bool:
        mesh = self._shards.program.placement[self._shards.stage].mesh
        return spec.trainable and spec.layout[mesh.axes.index(AXIS)] == D

    def _parameters(self) -> list[nn.Parameter]:
        return [self._shards.parameters[spec.name] for spec in self._specs]

    def scale(self) -> None:
        """Before the optimizer's step: gradients as of a batch of this replica alone."""
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, float(self.count))  # pyright: ignore[reportPrivateImportUsage]

    def stepped(self) -> bool:
        """After the optimizer's step. -> whether parameters were averaged."""
        self.since += bool(self.every)
        due = bool(self.every) and self.since >= self.every
        if due:
            self.average()
        return due

    def average(self) -> None:
        """Every replica takes the mean of all."""
        self.since = 0
        parameters = self._parameters()
        for parameter, mean in zip(parameters, self._means(parameters), strict=True):
            with torch.no_grad():
                parameter.copy_(mean)

    def _means(self, tensors: list[nn.Parameter]) -> list[torch.Tensor]:
        """Of all replicas. Collective along the replicas."""
        found: dict[int, torch.Tensor] = {}
        for _, bucket in packed([(self._group, list(tensors))] if tensors else [], BUCKET_NBYTES):
            flat = torch.cat([tensor.detach().flatten() for tensor in bucket])
            self._group.allreduce([flat]).wait()
            flat /= self.count
            parts = flat.split([tensor.numel() for tensor in bucket])
            found |= {id(t): part.view(t.shape) for t, part in zip(bucket, parts, strict=True)}
        return [found[id(tensor)] for tensor in tensors]

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def averaged(self) -> dict[str, torch.Tensor]:
        """Means by name of the parameters that differ between replicas. Collective along the replicas."""
        return dict(zip((spec.name for spec in self._specs), self._means(self._parameters()), strict=True))

    def parts(self, optimizer: torch.optim.Optimizer | None) -> Iterator[Part]:
        """What each replica has, [replicas, *shape] of every tensor."""
        for spec in self._writing():
            parameter = self._shards.parameters[spec.name]
            stepped = self._shards.stepped[spec.name]
            held = [("", parameter.data), *(optim.state_of(optimizer, stepped) if optimizer is not None else ())]
            for key, value in held:
                whole = value.shape == parameter.shape
                shape = spec.shape if whole else tuple(value.shape)
                pieces = self._shards.pieces(spec) if whole else [[(0, n)] for n in value.shape]
                mine = [[(self.index, self.index + 1)], *pieces]
                yield Part(_name(spec.name, key), value.unsqueeze(0), (self.count, *shape), mine)

    def _writing(self) -> Iterable[TensorSpec]:
        """Specs of which this rank writes its replica's part."""
        for spec in self._specs:
            placement = self._shards.program.placement[self._shards.stage]
            layout = tuple(S(0) if a == AXIS else p for a, p in zip(placement.mesh.axes, spec.layout, strict=True))
            if spec.stages[0] in self._shards.stages and self._shards.rank in owners(placement, layout):
                yield spec

    def read(self, reader: Reader, since: int, optimizer: torch.optim.Optimizer | None) -> None:
        """After the average was read: take what this replica had, where as many were saved."""
        self.since = 0
        for spec in self._specs:
            parameter = self._shards.parameters[spec.name]
            prefix = _name(spec.name, "")
            if prefix not in reader.parts or reader.shape(prefix)[0] != self.count:
                return
            state: dict[str, torch.Tensor] = {}
            for name in [name for name in reader.parts if name.startswith(prefix)]:
                shape, dtype = reader.shape(name), reader.dtype(name)
                whole = shape[1:] == spec.shape
                value = torch.empty((1, *(parameter.shape if whole else shape[1:])), dtype=dtype)
                pieces = self._shards.pieces(spec) if whole else [[(0, n)] for n in shape[1:]]
                reader.read(name, shape, [[(self.index, self.index + 1)], *pieces], value)
                state[name.removeprefix(prefix)] = value[0].to(parameter.device if whole else "cpu")
            parameter.data.copy_(state.pop(""))
            if optimizer is not None:
                optim.restore(optimizer, self._shards.stepped[spec.name], state)
        self.since = since


def _name(parameter: str, key: str) -> str:
    return f"replicas/{parameter}/{key}"
