"""Remove ops that give back their argument: aliases, casts to the same dtype, reshapes to the same shape, dropout that
drops nothing. Runs after `functionalize`, so that nothing is left that could tell a copy from its original."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from shardplan.planner.passes.draft import Draft, aten_ops, packet, same_storage
from shardplan.planner.trace import mutated
from shardplan.planner.trace import needs_grad as flows

name = "no-ops"

ALIASES = {"aten.alias", "aten.lift_fresh", "aten.lift_fresh_copy", "aten.lift"}
CASTS = {"aten.to", "aten._to_copy", "aten.type_as"}
RESHAPES = aten_ops("view reshape _unsafe_view flatten unflatten squeeze expand slice view_as expand_as")
DROPOUTS = {"aten.dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten.feature_alpha_dropout"}


def apply(draft: Draft) -> None:
    changed = {buffer for node in draft.ops() for buffer in mutated(node)}
    if changed:
        changed |= {n for n in draft.ops() if any(same_storage(n.meta.get("val"), b.meta["val"]) for b in changed)}
    for node in draft.ops():
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and source not in changed and _is_no_op(node, source):
            draft.replace(node, source)


def _is_no_op(node: fx.Node, source: fx.Node) -> bool:
    op, before, after = packet(node), source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if before.shape != after.shape or before.dtype != after.dtype or before.device != after.device:
        return False
    if op in ALIASES or op in RESHAPES:
        return True
    if op == "aten.detach":
        return not flows(source)
    if op in CASTS or op == "aten.clone":
        return before.stride() == after.stride() or not _asks_for_layout(node)
    if op == "aten.contiguous":
        return before.is_contiguous(memory_format=node.kwargs.get("memory_format", torch.contiguous_format))  # type: ignore[arg-type]
    if op in DROPOUTS:
        return bool(node.args[1] == 0 or not node.args[2])
    return _is_neutral(node, op)


def _asks_for_layout(node: fx.Node) -> bool:
    return node.kwargs.get("memory_format") not in (None, torch.preserve_format)


def _is_neutral(node: fx.Node, op: str) -> bool:
    """x + 0, x - 0, x * 1, x / 1 with a Python number that leaves the dtype alone."""
    other: Any = node.args[1] if len(node.args) > 1 else None
    if node.kwargs or isinstance(other, bool) or not isinstance(other, (int, float)):
        return False
    return (op in ("aten.add", "aten.sub") and other == 0) or (op in ("aten.mul", "aten.div") and other == 1)
