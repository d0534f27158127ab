"""Peak of the bytes that are alive on one rank, above what the process held before it was measured."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch

from shardplan.planner.costs.allocations import changes


def peak_of(step: Callable[[], Any], device: torch.device, held: Iterable[torch.Tensor]) -> int:
    """Runs a step -> the most bytes that were alive in it, those of `held` (tensors that it found) included. 0 where
    it cannot be known."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return _nbytes(held) + torch.cuda.max_memory_allocated(device) - before
    gc.collect()  # what older work left behind must not count as given back by this step
    before_nbytes = _nbytes(held)
    found = changes(step)
    if found is None:
        return 0
    alive = most = 0
    for nbytes in found:
        alive += nbytes
        most = max(most, alive)
    return before_nbytes + most


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages of some tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
