"""Submodules that are converted while the model runs: ``self.router = self.router.to(torch.float32)`` in a forward.

PyTorch gives the parameters other values for good, which a trace cannot follow and a run on trial must not do. Here the
module gets the results of casts instead, through which gradients pass to the parameters as they were.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

_OWN: Any = nn.Module._apply
_LOCK = threading.Lock()
# Thread -> the notes of the blocks that it is in. Simulated ranks are threads, and others may convert what they like.
_INSIDE: dict[int, list[list[str] | None]] = {}


@contextlib.contextmanager
def as_ops(notes: list[str] | None = None) -> Iterator[None]:
    """Conversions of modules by this thread are casts for as long as the block runs; the modules hold the results, and
    the tensors that they held are as they were.

    notes: told of parameters that change their dtype. A graph cannot hold a buffer that is another one afterwards, so
    where there are notes to be written that raises RuntimeError.
    """
    thread = threading.get_ident()
    with _LOCK:
        _INSIDE.setdefault(thread, []).append(notes)
        nn.Module._apply = _apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        with _LOCK:
            _INSIDE[thread].pop()
            if not _INSIDE[thread]:
                del _INSIDE[thread]
            if not _INSIDE:
                nn.Module._apply = _OWN


def _apply(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    if threading.get_ident() not in _INSIDE:
        return _OWN(module, fn, recurse)
    notes = _INSIDE[threading.get_ident()][-1]
    for child in module.children() if recurse else ():
        child._apply(fn)
    for key, value in module._parameters.items():
        if value is not None and (made := fn(value)) is not value:
            module._parameters[key] = made  # type: ignore[assignment]
            if notes is not None and made.dtype != value.dtype:
                notes.append(_told(module, value.dtype, made.dtype))
    for key, value in module._buffers.items():
        if value is not None and (made := fn(value)) is not value:
            if notes is not None:
                raise RuntimeError(f"{type(module).__name__}.{key} is a buffer that is converted within the forward")
            module._buffers[key] = made
    return module


def _told(module: nn.Module, before: torch.dtype, after: torch.dtype) -> str:
    return (
        f"a forward converts parameters of a {type(module).__name__} from {str(before).removeprefix('torch.')} to "
        f"{str(after).removeprefix('torch.')}: they are cast at every use and stay as they are"
    )
