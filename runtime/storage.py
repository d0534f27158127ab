"""What a step does with parameters that are split for storage, besides what the stage's code does itself (see
`planner.storage` and `rewrite.storage`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from shardplan.planner.plan import BUCKET_NBYTES
from shardplan.rewrite import storage
from shardplan.rewrite.program import Program, TensorSpec
from shardplan.runtime.comm import DistComm

_SHARE = 32
_LEAST_NBYTES = 128 << 10
_BESIDE = 1
"""Messages that may be under way besides the newest; each takes memory."""


class _Bucket:
    """Parameters of level 1 whose gradients travel together. absent: those that had none in the step before; pending:
    those whose gradient is not final yet."""

    __slots__ = ("absent", "pending", "specs")

    def __init__(self, specs: list[TensorSpec]) -> None:
        self.specs = specs
        self.absent: set[str] = set()
        self.pending: set[str] = set()


class SplitStorage:
    """The split parameters of one stage of a program on one rank.

    used: what the stage's code uses (at levels 1 and 2 whole tensors), parts: what is stored, by name. Whole gradients
    of level 1 go to the parts bucket by bucket, in the order of the last backward, as soon as all of a bucket are
    final; all ranks of a stage run the same code, so these messages match.
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
        self._resident = [spec for spec in mine if spec.storage is not None and spec.storage.level < 3]
        late = [spec for spec in mine if spec.storage is not None and spec.storage.level == 1 and spec.trainable]
        self._uneven = [spec for spec in late if spec.name in program.uneven]
        shared = {spec.name for spec in late if len(spec.stages) > 1}
        apart = program.uneven | program.late | shared
        place = {argument.name: n for n, argument in enumerate(program.stages[stage].arguments)}
        ordered = sorted((s for s in late if s.name not in apart), key=lambda s: -place.get(s.name, -1))
        self._buckets = [_Bucket(bucket) for bucket in _buckets(ordered)]
        self._afterwards = [spec for spec in late if spec.name in apart]
        self._handles: list[Any] = []
        self._armed = False
        self._next = 0

    # -- gradients of level 1 ------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Have every gradient come here when it has been accumulated."""
        for bucket in self._buckets:
            for spec in bucket.specs:
                whole = self._used[spec.name]
                hook = partial(self._arrived, bucket, spec.name)
                self._handles.append(whole.register_post_accumulate_grad_hook(hook))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def start(self) -> None:
        """Before the first microbatch."""
        self._armed, self._next = False, 0

    def arm(self) -> None:
        """Before the backward that makes the gradients final."""
        self._armed = True
        for bucket in self._buckets:
            bucket.pending = {spec.name for spec in bucket.specs} - bucket.absent

    def _arrived(self, bucket: _Bucket, name: str, _whole: torch.Tensor) -> None:
        if not self._armed:
            return
        bucket.pending.discard(name)
        while self._next < len(self._buckets) and not self._buckets[self._next].pending:
            self._send(self._buckets[self._next])
            self._next += 1

    def _send(self, bucket: _Bucket) -> None:
        there = [spec for spec in bucket.specs if self._used[spec.name].grad is not None]
        bucket.absent = {spec.name for spec in bucket.specs} - {spec.name for spec in there}
        self._scatter(there)

    def _scatter(self, specs: list[TensorSpec]) -> None:
        wholes = [self._used[spec.name] for spec in specs]
        gradients = [whole.grad for whole in wholes]
        for whole in wholes:
            whole.grad = None
        storage.scatter(self._comm, *self._of(specs), gradients, beside=_BESIDE)

    def scatter(self) -> None:
        """Backward is over: the whole gradients of level 1 that are left are summed, and what every rank has of them
        goes to the stored parts."""
        self._armed = False
        for bucket in self._buckets[self._next :]:
            self._send(bucket)
        for bucket in self._buckets[: self._next]:
            if stray := [spec for spec in bucket.specs if self._used[spec.name].grad is not None]:
                self._scatter(stray)  # gradients that came after their bucket
        self._even_out()
        for specs in _buckets(spec for spec in self._afterwards if self._used[spec.name].grad is not None):
            self._scatter(specs)
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
        arriving: list[Callable[[], object]] = []
        with torch.no_grad():
            for bucket in _buckets(self._resident):
                places, parts = self._of(bucket)
                wholes = [self._used[spec.name] for spec in bucket]
                arriving.append(storage.gather(self._comm, places, [part.detach() for part in parts], wholes))
                if len(arriving) > _BESIDE:
                    arriving.pop(0)()
            for arrive in arriving:
                arrive()

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
