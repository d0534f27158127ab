"""Drop nodes that only check: asserts on metadata and constraints on sizes, which are constants here."""

from __future__ import annotations

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
    for node in draft.ops():
        if packet(node) in CHECKS and not node.users:
            draft.graph.erase_node(node)
