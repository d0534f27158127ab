"""What a piece of code takes of a device's memory and gives back, in order.

On a GPU the allocator counts. On the CPU the resident set says little (an allocator keeps what was freed), so the code
runs under torch's profiler, which sees every allocation, temporaries inside ops included.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import accumulate
from typing import Any

import torch

_NOISE = "was allocated before the profiling started"
"""Said once a process, of every tensor that is older than the profiler: of no use to anyone."""


def scratch(action: Callable[[], Any], device: torch.device) -> int:
    """Runs an action -> the most bytes that it had above what it leaves behind. 0 where that cannot be known."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        action()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    alive = list(accumulate(changes(action) or [], initial=0))
    return max(alive) - max(alive[-1], 0)


def changes(action: Callable[[], Any]) -> list[int] | None:
    """Bytes that this thread takes (positive) and gives back on the CPU while an action runs, in order; None where it
    cannot be known (it runs all the same)."""
    private: Any = torch.autograd
    try:
        # The profiler that came before Kineto: it starts in milliseconds, prints nothing, and ops run at their speed.
        cpu, other = private.ProfilerState.CPU, import_module("torch._C._profiler")._ExperimentalConfig()
        private._enable_profiler_legacy(private.ProfilerConfig(cpu, False, True, False, False, False, other))
    except (ImportError, AttributeError, TypeError, RuntimeError):  # another profiler runs, or there is none
        action()
        return None
    try:
        with _unheard(_NOISE):
            action()
    finally:
        records = private._disable_profiler_legacy()
    return [event.cpu_memory_usage() for thread in records for event in thread if event.kind() == "memory_alloc"]


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
