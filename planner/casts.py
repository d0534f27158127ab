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


@contextlib.contextmanager
def as_ops(notes: list[str] | None = None) -> Iterator[None]:
    """Conversions of modules by this thread are casts for as long as the block runs; the modules hold the results, and
    the tensors that they held are as they were.

    notes: told of parameters that change their dtype. A graph cannot hold a buffer that is another one afterwards, so
    where there are notes to be written that raises RuntimeError.
    """
    own: Any = nn.Module._apply
    tracer = threading.get_ident()

    def apply(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        if threading.get_ident() != tracer:
            return own(module, fn, recurse)
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
                    raise RuntimeError(
                        f"{type(module).__name__}.{key} is a buffer that is converted within the forward"
                    )
                module._buffers[key] = made
        return module

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = own


def _told(module: nn.Module, before: torch.dtype, after: torch.dtype) -> str:
    return (
        f"a forward converts parameters of a {type(module).__name__} from {str(before).removeprefix('torch.')} to "
        f"{str(after).removeprefix('torch.')}: they are cast at every use and stay as they are"
    )
