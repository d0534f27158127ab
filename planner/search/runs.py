"""What a column runs: the ops of a segment, the tensors that they hold, and a strategy for each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from shardplan.planner.rules import Strategy
from shardplan.planner.storage import Storage
from shardplan.planner.trace import Segment, Trace, infos, resolve, tensor_args


@dataclass(frozen=True, slots=True)
class Run:
    """How a column runs its segment: a tp strategy per op and parameter it reads, and how a parameter is stored, by
    position in the segment."""

    choices: tuple[Strategy | None, ...]
    parameters: tuple[Strategy | None, ...]
    storage: tuple[Storage | None, ...]
    rematerialized: bool = False


def ops_of(trace: Trace, segment: Segment) -> list[fx.Node]:
    """The segment's ops, results of multi-result ops left out."""
    nodes = (trace.node(name) for name in segment.nodes)
    return [node for node in nodes if resolve(node)[0] is node and infos(node)]


def held_by(trace: Trace, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Parameters and buffers that the ops read, in order of first use."""
    found: dict[fx.Node, None] = {}
    for node in nodes:
        for argument in tensor_args(node):
            source = trace.sources.get(argument.name)
            if source is not None and source.kind in ("param", "buffer"):
                found[argument] = None
    return list(found)
