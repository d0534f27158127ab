"""Which device holds which slice of a tensor, as text."""

from __future__ import annotations

from shardplan.planner.plan import Plan
from shardplan.planner.report.explain import matching
from shardplan.planner.report.pictures import slices
from shardplan.planner.report.words import names_text, ranges

_MOST_TENSORS = 20
_HELD = ("param", "buffer", "input")


def visualize(plan: Plan, pattern: str) -> str:
    """For every parameter, buffer or input that the glob matches (results of ops, where it matches nothing else): its
    shape, and per stage which devices hold which slice. Devices with the same slice share a line.

    Raises NoMatch, naming the nearest names.
    """
    every = matching(plan, pattern)
    found = [node for node, summary in every if summary.op in _HELD] or [n for n, summary in every if summary.outputs]
    lines: list[str] = []
    for node in found[:_MOST_TENSORS]:
        summary = plan.nodes[node]
        lines.append(f"{summary.name or node}  {summary.outputs[0]}")
        groups: dict[tuple[int, str], list[int]] = {}
        for stage, rank, text in slices(plan, node):
            groups.setdefault((stage, text), []).append(rank)
        for (stage, text), ranks in groups.items():
            word = "device" if len(ranks) == 1 else "devices"
            lines.append(f"  stage {stage}, {word} {ranges(ranks)}: {text}")
        stored = plan.storage.get(summary.name)
        if stored is not None:
            lines.append(f"  stored apart: {stored}")
    if len(found) > _MOST_TENSORS:
        lines.append(f"and {len(found) - _MOST_TENSORS} more: {names_text(found[_MOST_TENSORS:])}")
    return "\n".join(lines) + "\n"
