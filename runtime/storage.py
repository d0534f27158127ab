"""What a step does with parameters that are split for storage, besides what the stage's code does itself (see
`planner.storage` and `rewrite.storage`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from shardplan.planner.plan import BUCKET_NBYTES
from shardplan.rewrite import storage
from shardplan.rewrite.program import Program, TensorSpec
from shardplan.runtime.comm import DistComm

_SHARE = 16
_LEAST_NBYTES = 256 << 10


class SplitStorage:
    """The split parameters of one stage of a program on one rank.

    used: what the stage's code uses (at levels 1 and 2 whole tensors), parts: what is stored, by name.
    """

    def __init__(
        self,
        program: Program,
        stage: int,
        comm: DistComm,
        used: Mapping[str, torch.Tensor],
        parts: Mapping[str, torch.Tensor],
    ) -> None:
        self._comm = comm
        self._used = used
        self._parts = parts
        mine = [spec for spec in program.parameters if stage in spec.stages and spec.storage is not None]
        self._places = {spec.name: spec.place(program.placement[stage].mesh) for spec in mine}
        self._late = [spec for spec in mine if spec.storage is not None and spec.storage.level == 1]
        self._resident = [spec for spec in mine if spec.storage is not None and spec.storage.level < 3]
        self._uneven = [spec for spec in self._late if spec.name in program.uneven]

    def scatter(self) -> None:
        """The whole gradients of level 1 are summed; what every rank has of them goes to the stored parts."""
        self._even_out()
        for bucket in _buckets(spec for spec in self._late if self._used[spec.name].grad is not None):
            wholes = [self._used[spec.name] for spec in bucket]
            gradients = [whole.grad for whole in wholes]
            for whole in wholes:
                whole.grad = None
            storage.scatter(self._comm, *self._of(bucket), gradients)
        storage.settle(self._comm)

    def _even_out(self) -> None:
        """A gradient that some ranks have is zero on the others."""
        for spec in self._uneven:
            whole, axis = self._used[spec.name], self._places[spec.name][0]
            present = torch.tensor(whole.grad is not None, dtype=torch.int32, device=whole.device)
            if int(self._comm.all_reduce(present, axis, "max")) and whole.grad is None:
                whole.grad = torch.zeros_like(whole)

    def refresh(self) -> None:
        """After the parts have changed: bring the whole parameters up to date."""
        with torch.no_grad():
            for bucket in _buckets(self._resident):
                places, parts = self._of(bucket)
                wholes = [self._used[spec.name] for spec in bucket]
                storage.gather(self._comm, places, [part.detach() for part in parts], wholes)()

    def _of(self, bucket: list[TensorSpec]) -> tuple[list[storage.Place], list[torch.Tensor]]:
        return [self._places[spec.name] for spec in bucket], [self._parts[spec.name] for spec in bucket]


def _buckets(specs: Iterable[TensorSpec]) -> Iterator[list[TensorSpec]]:
    """In order, at most `BUCKET_NBYTES` together (a larger parameter stands alone), and less where that would be a
    large share of them all: what is sent takes memory besides."""
    held = [(spec, spec.dtype.itemsize * torch.Size(spec.shape).numel()) for spec in specs]
    limit = min(BUCKET_NBYTES, max(sum(size for _, size in held) // _SHARE, _LEAST_NBYTES))
    bucket: list[TensorSpec] = []
    nbytes = 0
    for spec, mine in held:
        if bucket and nbytes + mine > limit:
            yield bucket
            bucket, nbytes = [], 0
        bucket.append(spec)
        nbytes += mine
    if bucket:
        yield bucket
