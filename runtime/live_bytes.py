"""Peak of the bytes that are alive on one rank, above what the process held before it was measured.

On a GPU the allocator counts them. On the CPU the resident set says little (an allocator keeps what was freed), so one
step is run under torch's profiler, which sees every allocation, temporaries inside ops included.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

_NOISE = "was allocated before the profiling started"
"""Said once a process, of every tensor that is older than the profiler: of no use to anyone."""


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
    changes = _changes(step)
    if changes is None:
        return 0
    alive = most = 0
    for nbytes in changes:
        alive += nbytes
        most = max(most, alive)
    return before_nbytes + most


@contextmanager
def _unheard(noise: str) -> Iterator[None]:
    """What is written to stderr meanwhile, below Python too, comes out afterwards, without the lines that have `noise`
    in them."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="replace") as heard:
        os.dup2(heard.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            heard.seek(0)
            sys.stderr.write("".join(line for line in heard if noise not in line))


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages of some tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _changes(step: Callable[[], Any]) -> list[int] | None:
    """Bytes that this thread takes (positive) and gives back on the CPU while a step runs, in order."""
    private: Any = torch.autograd
    try:
        # The profiler that came before Kineto: it starts in milliseconds, prints nothing, and ops run at their speed.
        cpu, other = private.ProfilerState.CPU, import_module("torch._C._profiler")._ExperimentalConfig()
        private._enable_profiler_legacy(private.ProfilerConfig(cpu, False, True, False, False, False, other))
    except (
        ImportError,
        AttributeError,
        TypeError,
        RuntimeError,
    ):  # another profiler runs, or there is none
        step()
        return None
    try:
        with _unheard(_NOISE):
            step()
    finally:
        records = private._disable_profiler_legacy()
    return [event.cpu_memory_usage() for thread in records for event in thread if event.kind() == "memory_alloc"]
