"""Remove ops whose result nobody reads. Ops that change a buffer, or that we know nothing about, stay."""

from __future__ import annotations

import operator

import torch
from torch import fx

from shardplan.planner.passes.draft import Draft
from shardplan.planner.trace import mutated

name = "dead-code"


def apply(draft: Draft) -> None:
    for node in reversed(list(draft.graph.nodes)):
        if node.op == "call_function" and not node.users and not _impure(node):
            draft.graph.erase_node(node)


def _impure(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return False
    return not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable or bool(mutated(node))
