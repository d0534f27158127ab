"""Sums of gradients: in buckets over the mesh axes of a stage while backward goes on, then over tied stages.

Every gradient that is a sum over ranks has its place in a flat bucket, into which it is moved when it first arrives;
further microbatches add to it there. In the last microbatch's backward a bucket is summed as soon as all of its
gradients are final. Buckets follow the stage's code, last used first, and are started in one order on every rank of
the stage: all of its ranks run the same code, so the sums of a group match.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from shardplan.planner.plan import BUCKET_NBYTES
from shardplan.planner.reductions import goes_alone
from shardplan.planner.wire import Wire
from shardplan.rewrite.program import Program, TensorSpec
from shardplan.runtime.bucket import Bucket
from shardplan.runtime.groups import Groups
from shardplan.runtime.low_rank import Factors, LowRankBucket
from shardplan.runtime.storage import SplitStorage
from shardplan.runtime.tied import TiedSums, read_anywhere, twins

FIRST_NBYTES = 1 << 20  # the first bucket is small, so that the link is busy early
_Sum = tuple[Any, list[torch.Tensor]]


class Attached:
    """Whose hooks the leaves of an engine carry: its programs share leaves, one of them runs at a time. factors: what
    sums of low rank keep between steps, by leaf."""

    def __init__(self) -> None:
        self._owner: GradientSums | None = None
        self.factors: dict[torch.Tensor, Factors] = {}

    def claim(self, sums: GradientSums) -> None:
        """Give the leaves the hooks of `sums`, and take those of others from them."""
        if self._owner is not sums:
            if self._owner is not None:
                self._owner.detach()
            sums.attach()
            self._owner = sums


class _StageSums:
    """The buckets of one stage, which are started in order. armed: its last backward has begun; next: the first that is
    not started."""

    __slots__ = ("armed", "buckets", "next", "strays")

    def __init__(self, buckets: list[Bucket]) -> None:
        self.buckets = buckets
        self.strays: list[_Sum] = []
        self.start()

    def start(self) -> None:
        self.armed = False
        self.next = 0
        for bucket in self.buckets:
            bucket.start()

    def arrived(self, bucket: Bucket, index: int, _leaf: torch.Tensor) -> None:
        """A gradient has been accumulated."""
        new = index in bucket.absent
        if bucket.launched:
            if not new:
                raise RuntimeError("a gradient changed after it was summed")
            self.strays.append((bucket.group, [bucket.leaves[index]]))
            return
        bucket.take(index)
        bucket.absent.discard(index)
        if not self.armed:
            bucket.pending += new
            return
        bucket.pending -= not new
        while self.next < len(self.buckets) and not self.buckets[self.next].pending:
            self.buckets[self.next].launch()
            self.next += 1

    def launch(self) -> None:
        """Start what is left."""
        self.armed = False
        for bucket in self.buckets[self.next :]:
            bucket.launch()


class GradientSums:
    """The sums that one rank takes part in, for its stages. All ranks make it in the same order (groups are created).

    beside: parameters in parts, whose gradients are looked after while the leaves have the hooks of these sums.

    `start` before the first microbatch, `arm` before the last backward of a stage, `finish` when all are done. Ranks
    that share groups run the same sums of a group in the same order: those inside stages in the order of the code,
    then those between stages.
    """

    def __init__(
        self,
        program: Program,
        stages: Sequence[int],
        rank: int,
        tensors: Mapping[str, torch.Tensor],
        groups: Groups,
        attached: Attached,
        used: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """tensors: what is stored of the parameters; used: what the stages' code takes (None: the same), where that is
        rounded its gradients are added to those of the former."""
        for spec in program.parameters:
            if len(spec.reduce_axes) > 1:
                for index in spec.stages:
                    groups.of_stage(program.placement[index], spec.reduce_axes)
        for ranks in sorted({ranks for spec in program.parameters for ranks in twins(program, spec)}):
            groups.get(ranks)
        self._tied = TiedSums(program, rank, tensors, groups)
        self._attached = attached
        self.beside: list[SplitStorage] = []
        self._handles: list[Any] = []
        self._rounded: dict[torch.Tensor, torch.Tensor] = {}
        self._agreed = False
        overlapped: dict[int, list[_Sum]] = {stage: [] for stage in stages}
        late: dict[tuple[int, ...], list[torch.Tensor]] = {}
        between: dict[tuple[int, ...], list[torch.Tensor]] = {}
        self._counted_elsewhere: list[torch.Tensor] = []
        for stage, spec in _last_used_first(program, stages):
            leaf = tensors[spec.name]
            if spec.used is not None and spec.storage is None and used is not None:
                self._rounded[leaf] = used[spec.name]
            ranks = program.placement[stage].group(rank, spec.reduce_axes)
            tied = [ranks for ranks in twins(program, spec) if rank in ranks]
            shared = sum(other in spec.stages for other in stages) > 1
            if len(ranks) > 1 and (shared or spec.storage is not None or spec.name in program.late | program.uneven):
                late.setdefault(ranks, []).append(leaf)
            elif len(ranks) > 1:
                overlapped[stage].append((groups.get(ranks), [leaf]))
            for twin in tied:
                between.setdefault(twin, []).append(leaf)
            first = program.placement[spec.stages[0]].ranks
            if rank not in first or any(rank != min(held) for held in (ranks, *tied)):
                self._counted_elsewhere.append(leaf)
        wire = Wire.parse(program.reduction)

        def bucket(group: Any, leaves: list[torch.Tensor]) -> Bucket:
            rank = wire.factored(leaves[0].shape)
            return LowRankBucket(group, leaves, rank, attached.factors) if rank else Bucket(group, leaves, wire.dtype)

        self._stages = {
            stage: _StageSums(
                [bucket(*sums) for sums in packed(found, program.bucket_nbytes, FIRST_NBYTES, wire.factored)]
            )
            for stage, found in overlapped.items()
        }
        # One order of all groups of the job, so that ranks that share some of their groups do not wait in a circle.
        ordered = sorted(late.items(), key=lambda item: (-len(item[0]), item[0]))
        self._late = [(groups.get(ranks), leaves) for ranks, leaves in ordered]
        self._between = [(groups.get(ranks), leaves) for ranks, leaves in sorted(between.items())]
        uneven = {id(tensors[name]) for name in program.uneven if name in tensors}
        held = [(group, [leaf for leaf in leaves if id(leaf) in uneven]) for group, leaves in self._late]
        self._uneven = [(group, leaves) for group, leaves in held if leaves]

    def standing(self) -> list[torch.Tensor]:
        """What the buckets hold between steps."""
        buckets = (bucket for sums in self._stages.values() for bucket in sums.buckets)
        return [bucket.flat for bucket in buckets if bucket.flat is not None]

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Called by `Attached`: have every gradient of a bucket come here when it has been accumulated."""
        for split in self.beside:
            split.attach()
        bucketed: set[torch.Tensor] = set()
        for sums in self._stages.values():
            for bucket in sums.buckets:
                for index, leaf in enumerate(bucket.leaves):
                    hook = partial(sums.arrived, bucket, index)
                    self._hook(leaf, hook, bucket, index)
                    bucketed.add(leaf)
        for leaf in self._rounded:
            if leaf not in bucketed:
                self._hook(leaf, None)

    def _hook(
        self,
        leaf: torch.Tensor,
        hook: Callable[[torch.Tensor], None] | None,
        bucket: Bucket | None = None,
        index: int = 0,
    ) -> None:
        rounded = self._rounded.get(leaf)
        if rounded is None:
            assert hook is not None
            self._handles.append(leaf.register_post_accumulate_grad_hook(hook))
            return

        def widen(used: torch.Tensor) -> None:
            gradient, used.grad = used.grad, None
            assert gradient is not None
            if leaf.grad is not None:
                leaf.grad.add_(gradient)
            elif bucket is None or bucket.launched or not bucket.flattens:
                leaf.grad = gradient.to(leaf.dtype)
            else:
                leaf.grad = bucket.place(index).copy_(gradient)
            if hook is not None:
                hook(leaf)

        self._handles.append(rounded.register_post_accumulate_grad_hook(widen))

    def detach(self) -> None:
        """Called by `Attached`: give the leaves and the memory of the buckets free."""
        for split in self.beside:
            split.detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for sums in self._stages.values():
            for bucket in sums.buckets:
                bucket.flat, bucket.views = None, []

    # -- one step ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Before the first microbatch. Gradients that are there count once: on the first rank of their sums."""
        self._attached.claim(self)
        for split in self.beside:
            split.start()
        for sums in self._stages.values():
            sums.start()
        for leaf in self._counted_elsewhere:
            if leaf.grad is not None:
                leaf.grad.zero_()

    def arm(self, stage: int) -> None:
        """Before the backward that makes the gradients of a stage final."""
        self._stages[stage].armed = True

    def finish(self) -> None:
        """Replace the gradients by their sums."""
        for sums in self._stages.values():
            sums.launch()
        for group, leaves in self._uneven:
            for leaf in read_anywhere(group, leaves):
                if leaf.grad is None:
                    leaf.grad = torch.zeros_like(leaf)
        for sums in self._stages.values():
            for bucket in sums.buckets:
                bucket.proceed()
        _sum_gradients([*(stray for sums in self._stages.values() for stray in sums.strays), *self._late])
        for sums in self._stages.values():
            sums.strays.clear()
            for bucket in sums.buckets:
                bucket.wait()
        if not self._agreed:
            self._between = [(group, read_anywhere(group, leaves)) for group, leaves in self._between]
            self._agreed = True
        for _, leaves in self._between:
            for leaf in leaves:
                if leaf.grad is None:
                    leaf.grad = torch.zeros_like(leaf)
        _sum_gradients(self._between)
        self._tied.run()


def _last_used_first(program: Program, stages: Sequence[int]) -> list[tuple[int, TensorSpec]]:
    """(stage, trainable parameter of it), in the order in which backward finishes them: the code's order, turned round,
    the last stage first. What several of the stages hold is final with the first of them."""
    found = []
    for stage in sorted(stages, reverse=True):
        place = {a.name: i for i, a in enumerate(program.stages[stage].arguments) if a.kind in ("param", "shard")}
        held = [s for s in program.parameters if s.trainable and stage == min(set(s.stages) & set(stages), default=-1)]
        found += [(stage, spec) for spec in sorted(held, key=lambda spec: -place.get(spec.name, -1))]
    return found


def packed(
    sums: Iterable[_Sum],
    nbytes: int,
    first_nbytes: int | None = None,
    kind: Callable[[Sequence[int]], int] = lambda shape: 0,
) -> list[_Sum]:
    """Sums of one group and dtype, and of one kind (shape -> kind), together, at most `nbytes` in a bucket (the first:
    `first_nbytes`).

    Leaves keep their order within a group and dtype; buckets stand in the order in which their last leaf does. A leaf
    of a quarter of a bucket or more stands alone: it need not be copied.
    """
    found: list[tuple[int, Any, list[torch.Tensor]]] = []
    open_: dict[tuple[int, torch.dtype, int], tuple[int, int]] = {}
    position = 0
    for group, leaves in sums:
        for leaf in leaves:
            mine = leaf.numel() * leaf.element_size()
            key = id(group), leaf.dtype, kind(leaf.shape)
            at, size = open_.get(key, (-1, 0))
            limit = nbytes if at != 0 or first_nbytes is None else min(nbytes, first_nbytes)
            if goes_alone(mine, nbytes):
                found.append((position, group, [leaf]))
            elif at < 0 or size + mine > limit:
                open_[key] = len(found), mine
                found.append((position, group, [leaf]))
            else:
                found[at] = position, group, [*found[at][2], leaf]
                open_[key] = at, size + mine
            position += 1
    return [(group, leaves) for _, group, leaves in sorted(found, key=lambda item: item[0])]


def _sum_gradients(sums: Iterable[_Sum]) -> None:
    """Sum what is not summed during backward, bucket by bucket: while one is under way the next is packed."""
    there = [(group, [leaf for leaf in leaves if leaf.grad is not None]) for group, leaves in sums]
    running = [Bucket(group, leaves) for group, leaves in packed(there, BUCKET_NBYTES)]
    for bucket in running:
        bucket.launch()
    for bucket in running:
        bucket.wait()
