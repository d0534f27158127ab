"""A stage's function through `torch.compile`: one graph, with the collectives inside as functional collectives.

Hooks see all gradients of a stage at once when its compiled backward ends, so the sums over replicas overlap less.
"""

from __future__ import annotations

import logging
import sys
import time
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch

from shardplan.planner.placement import MICROBATCH_AXIS
from shardplan.rewrite.comm import Comm
from shardplan.rewrite.program import StageCode, StageRanks
from shardplan.runtime.groups import Groups

log = logging.getLogger("shardplan")
_FUNCTIONAL: Any = torch.ops._c10d_functional
# What a stage's source calls that one compiled graph cannot hold, and what to say of it.
_OUTSIDE = (
    ("random_ops.", "it draws random numbers, whose keys change with every step"),
    ('"mb"', "it treats microbatches differently"),
    ("'mb'", "it treats microbatches differently"),
    ("storage.", "its parameters are split for storage"),
    ("later.", "its weight gradients are computed later"),
    ("run_leaf", "it calls a submodule that runs whole"),
)


class FunctionalComm:
    """`rewrite.comm.Comm` of one rank in one stage, whose collectives a compiler can trace."""

    def __init__(self, placement: StageRanks, rank: int, groups: Groups) -> None:
        self._index = placement.coordinate(rank)
        self._axes: dict[str, tuple[int, str, list[int] | None, list[int] | None]] = {}
        for axis, size in zip(placement.mesh.axes, placement.mesh.sizes, strict=True):
            if axis != MICROBATCH_AXIS and size > 1:
                ranks = placement.group(rank, (axis,))
                rising = sorted(ranks)
                order = None if list(ranks) == rising else [rising.index(r) for r in ranks]
                inverse = None if order is None else [ranks.index(r) for r in rising]
                self._axes[axis] = size, str(groups.get(ranks).group_name), order, inverse

    def size(self, axis: str) -> int:
        return self._axes[axis][0] if axis in self._axes else 1

    def index(self, axis: str) -> int:
        return self._index.get(axis, 0)

    def all_reduce(self, x: torch.Tensor, axis: str, op: str = "sum") -> torch.Tensor:
        if axis not in self._axes:
            return x
        return _FUNCTIONAL.wait_tensor(_FUNCTIONAL.all_reduce(x.contiguous(), op, self._axes[axis][1]))

    def all_gather(self, x: torch.Tensor, dim: int, axis: str) -> torch.Tensor:
        if axis not in self._axes:
            return x
        size, group, order, _ = self._axes[axis]
        x = x.contiguous() if x.ndim else x.reshape(1)
        stacked = _FUNCTIONAL.wait_tensor(_FUNCTIONAL.all_gather_into_tensor(x, size, group))
        if dim == 0 and order is None:
            return stacked
        parts = stacked.chunk(size)
        return torch.cat(parts if order is None else [parts[place] for place in order], dim)

    def reduce_scatter(self, x: torch.Tensor, dim: int, axis: str) -> torch.Tensor:
        if axis not in self._axes:
            return x
        outgoing, rows = self._outgoing(x, dim, axis)
        if not x.is_cuda:  # see `DistComm.reduce_scatter`
            incoming = self._swap(outgoing, axis).view(self._axes[axis][0], *rows)
            return incoming.sum(0, dtype=x.dtype)
        size, group, _, _ = self._axes[axis]
        found = _FUNCTIONAL.wait_tensor(_FUNCTIONAL.reduce_scatter_tensor(outgoing, "sum", size, group))
        return found.view(rows)

    def all_to_all(self, x: torch.Tensor, split_dim: int, concat_dim: int, axis: str) -> torch.Tensor:
        if axis not in self._axes:
            return x
        size, _, order, _ = self._axes[axis]
        outgoing, rows = self._outgoing(x, split_dim, axis)
        parts = self._swap(outgoing, axis).view(size, *rows).unbind()
        return torch.cat(parts if order is None else [parts[place] for place in order], concat_dim)

    def exchange(self, x: torch.Tensor, sent: list[int], arriving: list[int], axis: str) -> torch.Tensor:
        if axis not in self._axes:
            return x
        _, group, order, inverse = self._axes[axis]
        if inverse is not None:
            parts = x.split(sent)
            x = torch.cat([parts[index] for index in inverse])
            sent, arriving = ([counts[index] for index in inverse] for counts in (sent, arriving))
        incoming = _FUNCTIONAL.wait_tensor(_FUNCTIONAL.all_to_all_single(x, arriving, sent, group))
        if order is None:
            return incoming
        parts = incoming.split(arriving)
        return torch.cat([parts[place] for place in order])

    def _outgoing(self, x: torch.Tensor, dim: int, axis: str) -> tuple[torch.Tensor, tuple[int, ...]]:
        """-> (what every rank of the group gets, one after the other along dim 0; shape of one rank's part)."""
        size, _, _, inverse = self._axes[axis]
        parts = x.chunk(size, dim)
        stacked = torch.stack(parts if inverse is None else [parts[index] for index in inverse])
        return stacked.flatten(0, 1) if stacked.ndim > 1 else stacked, tuple(parts[0].shape)

    def _swap(self, outgoing: torch.Tensor, axis: str) -> torch.Tensor:
        size, group, _, _ = self._axes[axis]
        lengths = [outgoing.shape[0] // size] * size
        return _FUNCTIONAL.wait_tensor(_FUNCTIONAL.all_to_all_single(outgoing, lengths, lengths, group))


class CompiledStage:
    """A stage's function, compiled at its first call; called with the same arguments.

    seconds: how long the first call took, which is compiling and one forward. Where compiling fails the function runs
    as it is, and `reason` says why.
    """

    def __init__(self, function: Callable[..., Any], comm: FunctionalComm, name: str, backend: str) -> None:
        self._plain = function
        self._compiled: Callable[..., Any] | None = None
        self.name = name
        self.seconds = 0.0
        self.reason = ""

        def stage(device: torch.device, *arguments: Any) -> Any:
            return function(comm, device, *arguments)

        self._compiled = torch.compile(stage, fullgraph=True, dynamic=False, backend=backend)

    def __call__(self, comm: Comm, device: torch.device, *arguments: Any) -> Any:
        if self._compiled is None:
            return self._plain(comm, device, *arguments)
        if self.seconds:
            return self._compiled(device, *arguments)
        started = time.perf_counter()
        try:
            found = self._compiled(device, *arguments)
        except Exception as error:
            if not _is_of_compiler(error):
                raise
            self._compiled = None
            self.reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
            log.warning("%s is not compiled, it runs as it is: %s", self.name, self.reason)
            return self._plain(comm, device, *arguments)
        self.seconds = time.perf_counter() - started
        log.info("%s compiled in %.1f s", self.name, self.seconds)
        return found


def compiled(function: Callable[..., Any], code: StageCode, comm: FunctionalComm, name: str, backend: str) -> Any:
    """The function of a stage, compiled; as it is, with a warning, where one graph cannot hold it. comm: for the
    compiled function, to which whoever calls it passes another."""
    for text, reason in _OUTSIDE:
        if text in code.source:
            log.warning("%s is not compiled, it runs as it is: %s", name, reason)
            return function
    _make_module(function)
    return CompiledStage(function, comm, name, backend)


def _make_module(function: Callable[..., Any]) -> None:
    """The compiler imports the module of a function that it traces; a stage's source has none until now."""
    scope = function.__globals__
    scope["__name__"] = name = f"shardplan_stage_{id(function)}"
    module = types.ModuleType(name)
    module.__dict__.update({key: value for key, value in scope.items() if value is not function})
    sys.modules[name] = module
    weakref.finalize(function, sys.modules.pop, name, None)


def _is_of_compiler(error: Exception) -> bool:
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch"))
