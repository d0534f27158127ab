"""Write a number added to a scalar, as in ``1 - dice.mean()``, as a tensor.

The scalar of a loss is often a sum over the batch, of which a rank or a microbatch has a summand. A number would be
added by every one of them; of a tensor each takes its part, as of any value that all have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from shardplan.planner.passes.draft import Draft

name = "scalar-terms"

aten = torch.ops.aten
_SUMS: dict[Any, Any] = {
    aten.add.Tensor: aten.add.Tensor,
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Tensor: aten.sub.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.rsub.Scalar: aten.rsub.Tensor,
}


def apply(draft: Draft) -> None:
    for node in draft.ops():
        if node.target not in _SUMS or len(node.args) < 2:
            continue
        held, number = node.meta["val"], node.args[1]
        if held.ndim or not held.is_floating_point() or isinstance(number, (fx.Node, bool)):
            continue
        term = draft.emit(node, aten.full.default, [], number, like=node, dtype=held.dtype, device=held.device)
        node.target = _SUMS[node.target]
        if len(node.args) > 2:
            node.kwargs = {**node.kwargs, "alpha": node.args[2]}
        node.args = (node.args[0], term)
