"""Compute once what input-only code computes several times (every layer slices the same positions and masks)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from shardplan.planner.passes.draft import Draft
from shardplan.planner.trace import mutated
from shardplan.planner.trace import needs_grad as flows

name = "common"


def apply(draft: Draft) -> None:
    """Only for deterministic ops through which no gradient flows, of values that no op changes."""
    changed = {buffer for node in draft.ops() for buffer in mutated(node)}
    free = {n for n, s in draft.sources.items() if s.kind != "param" and n not in changed}
    first: dict[Any, fx.Node] = {}
    for node in draft.ops():
        if flows(node) or mutated(node) or not all(argument in free for argument in node.all_input_nodes):
            continue
        op = node.target
        if isinstance(op, torch._ops.OpOverload) and (
            torch.Tag.nondeterministic_seeded in op.tags or op._schema.is_mutable
        ):
            continue
        key = (node.target, _hashable(node.args), _hashable(node.kwargs))
        if key in first:
            draft.replace(node, first[key])
        else:
            first[key] = node
            free.add(node)


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, dict):
        return tuple(sorted((key, _hashable(item)) for key, item in value.items()))
    if isinstance(value, (bool, int, float)):
        return type(value).__name__, repr(value)
    return value
