"""Make the casts of autocast regions explicit: the traced result dtype tells what autocast did to the inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from shardplan.planner.passes.draft import Draft, not_traceable

name = "autocast-casts"


def apply(draft: Draft) -> None:
    """Per op: no cast, all inputs to the region's dtype, or all to float32, whichever gives the traced dtypes."""
    for node in draft.ops():
        region = node.meta.pop("autocast", None)
        if region is None or not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
            continue
        wanted = _dtypes(node.meta.get("val"))
        for dtype in (None, region, torch.float32):
            if _dtypes(_try(draft, node, dtype)) == wanted:
                if dtype is not None:
                    _cast(draft, node, dtype)
                break
        else:
            raise not_traceable(node, f"uses {node.target} in an autocast region in a way that has no explicit form")


def _dtypes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(_dtypes(item) for item in value)
    return type(value)


def _castable(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _try(draft: Draft, node: fx.Node, dtype: torch.dtype | None) -> Any:
    def value(argument: fx.Node) -> Any:
        found = argument.meta["val"]
        return found.to(dtype) if dtype is not None and _castable(argument) else found

    try:
        with draft.fake_mode, torch.no_grad():
            args, kwargs = map_arg((node.args, dict(node.kwargs)), value)
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError):
        return None


def _cast(draft: Draft, node: fx.Node, dtype: torch.dtype) -> None:
    for argument in list(node.all_input_nodes):
        if _castable(argument) and argument.meta["val"].dtype != dtype:
            cast = draft.emit(node, torch.ops.aten.to.dtype, argument, dtype, like=node)
            node.replace_input_with(argument, cast)
