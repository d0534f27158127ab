"""Write `broadcast_tensors` as one expand per tensor that grows; the others are the arguments themselves, as in eager
execution, where a later write to one of them is a write to the argument."""

from __future__ import annotations

import operator

import torch

from shardplan.planner.passes.draft import Draft, packet

name = "broadcasts"


def apply(draft: Draft) -> None:
    for node in draft.ops():
        if packet(node) != "aten.broadcast_tensors":
            continue
        for getter in list(node.users):
            if getter.target is not operator.getitem:
                continue
            source = node.args[0][getter.args[1]]  # type: ignore[index]
            shape = getter.meta["val"].shape
            if source.meta["val"].shape != shape:  # type: ignore[union-attr]
                source = draft.emit(getter, torch.ops.aten.expand.default, source, list(shape), like=getter)
            draft.replace(getter, source)  # type: ignore[arg-type]
        if not node.users:
            draft.graph.erase_node(node)
