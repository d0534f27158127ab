"""Put a detach where a value leaves a no_grad region, so that the flat graph stops gradients where the model did."""

from __future__ import annotations

import torch

from shardplan.planner.passes.draft import Draft

name = "detach-edges"


def apply(draft: Draft) -> None:
    for node in draft.ops():
        value = node.meta.get("val")
        if not node.meta.get("no_grad") or not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            continue
        outside = [user for user in node.users if not user.meta.get("no_grad")]
        if outside:
            detached = draft.emit(node.next, torch.ops.aten.detach.default, node, like=node)
            for user in outside:
                user.replace_input_with(node, detached)
