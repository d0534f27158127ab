"""A bucket of gradients that are summed over a group together."""

from __future__ import annotations

from typing import Any

import torch


class Bucket:
    """Gradients of some leaves that are summed over one group together.

    flat: [elements of all leaves], made when the first of them arrives; None for a leaf alone in its bucket, whose
    gradient is summed where it is. absent: leaves that had no gradient in the step before. pending: leaves whose
    gradient is not final yet. wire_dtype: what is sent, None for the gradients' own.
    """

    __slots__ = ("absent", "flat", "group", "launched", "leaves", "pending", "views", "wire", "wire_dtype", "work")

    def __init__(self, group: Any, leaves: list[torch.Tensor], wire_dtype: torch.dtype | None = None) -> None:
        self.group = group
        self.leaves = leaves
        self.wire_dtype = wire_dtype
        self.absent: set[int] = set()
        self.flat: torch.Tensor | None = None
        self.views: list[torch.Tensor] = []
        self.wire: torch.Tensor | None = None
        self.pending = 0
        self.launched = False
        self.work: Any = None

    @property
    def flattens(self) -> bool:
        """Whether gradients are moved together."""
        return len(self.leaves) > 1

    def start(self) -> None:
        self.pending = len(self.leaves) - len(self.absent)
        self.launched = False
        self.work = self.wire = None

    def take(self, index: int) -> None:
        """Move a leaf's gradient to its place in the bucket."""
        leaf = self.leaves[index]
        if not self.flattens:
            return
        view = self.place(index)
        if leaf.grad is not view:
            assert leaf.grad is not None
            leaf.grad = view.copy_(leaf.grad)

    def place(self, index: int) -> torch.Tensor:
        """Where in the bucket a leaf's gradient lies."""
        if self.flat is None:
            leaf = self.leaves[index]
            sizes = [leaf.numel() for leaf in self.leaves]
            self.flat = flat = torch.empty(sum(sizes), dtype=leaf.dtype, device=leaf.device)
            parts = flat.split(sizes)
            self.views = [part.view(leaf.shape) for part, leaf in zip(parts, self.leaves, strict=True)]
        return self.views[index]

    def launch(self) -> None:
        """Start the sum; where no leaf has a gradient there is none, on any rank of the group."""
        self.launched = True
        present = [leaf.grad is not None for leaf in self.leaves]
        if not any(present):
            return
        for index, here in enumerate(present):
            if here:
                self.take(index)
        for view, here in zip(self.views, present, strict=False):
            if not here:
                view.zero_()
        flat = self.flat
        if flat is None:
            gradient = self.leaves[0].grad
            assert gradient is not None
            if not gradient.is_contiguous():
                self.leaves[0].grad = gradient = gradient.contiguous()
            flat = gradient.view(-1)
        self.wire = flat if self.wire_dtype is None else flat.to(self.wire_dtype)
        self.work = self.group.allreduce([self.wire])

    def proceed(self) -> None:
        """When backward is over: start what is left to be sent."""

    def wait(self) -> None:
        """Wait for the sum."""
        self.absent = {i for i, leaf in enumerate(self.leaves) if leaf.grad is None}
        if self.work is None:
            return
        self.work.wait()
        assert self.wire is not None
        if self.wire_dtype is not None:
            target = self.flat if self.flat is not None else self.leaves[0].grad
            assert target is not None
            target.view(-1).copy_(self.wire)
        self.wire = None
