"""Put a detach where a value enters a no_grad region, so that the flat graph stops gradients where the model did (and
saves nothing for backward where the model did not)."""

from __future__ import annotations

import operator

import torch
from torch import fx

from shardplan.planner.passes.draft import Draft
from shardplan.planner.trace import needs_grad as flows
from shardplan.planner.trace import set_needs_grad

name = "detach-edges"


def apply(draft: Draft) -> None:
    detached: dict[fx.Node, fx.Node] = {}
    for node in draft.ops():
        if not node.meta.get("no_grad") or node.target is operator.getitem:
            continue
        for argument in node.all_input_nodes:
            if flows(argument):
                if argument not in detached:
                    detached[argument] = draft.emit(node, torch.ops.aten.detach.default, argument, like=node)
                    set_needs_grad(detached[argument], False)
                node.replace_input_with(argument, detached[argument])
