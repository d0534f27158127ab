"""Write ops that only ask a tensor for its shape or dtype with that shape or dtype.

Such a tensor (``x.type_as(y)``) is no operand: how it lies on a mesh says nothing about the op, and no stage has to
send it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from shardplan.planner.passes.draft import Draft

name = "known-forms"

aten = torch.ops.aten
_SHAPES: dict[Any, Any] = {
    aten.view_as.default: aten.reshape.default,
    aten.reshape_as.default: aten.reshape.default,
    aten.expand_as.default: aten.expand.default,
}
_DTYPES = {aten.type_as.default, aten.to.other}


def apply(draft: Draft) -> None:
    for node in draft.ops():
        value = node.meta.get("val")
        if len(node.args) < 2 or not isinstance(node.args[1], fx.Node) or not isinstance(value, torch.Tensor):
            continue
        if node.target in _SHAPES:
            node.args = (node.args[0], list(value.shape))
            node.target = _SHAPES[node.target]
        elif node.target in _DTYPES:
            node.args = (node.args[0], value.dtype, *node.args[2:])
            node.target = aten.to.dtype
