"""Drop nodes that only check: asserts on metadata, constraints on sizes, and what is computed for them alone."""

from __future__ import annotations

import torch
from torch import fx

from shardplan.planner.passes.draft import Draft, packet

name = "drop-checks"

CHECKS = frozenset(
    {
        "aten._assert_tensor_metadata",
        "aten._assert_async",
        "aten._assert_scalar",
        "aten.sym_constrain_range",
        "aten.sym_constrain_range_for_size",
        "aten._functional_assert_async",
        "aten._functional_assert_scalar",
    }
)


def apply(draft: Draft) -> None:
    drop(draft.graph)


def drop(graph: fx.Graph) -> None:
    """Sizes and numbers that depend on data are gone where only checks read them, with the ops that made them."""
    asked_of: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or node.users:
            continue
        if packet(node) in CHECKS or _is_number(node) or (node in asked_of and _is_pure(node)):
            asked_of.update(node.all_input_nodes)
            graph.erase_node(node)


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def _is_pure(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in node.target.tags
