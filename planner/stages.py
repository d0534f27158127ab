"""Which stage computes what, and which tensors cross between stages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from shardplan.planner.trace import TensorInfo, Trace, info, is_tensor, resolve


@dataclass(frozen=True, slots=True)
class Crossing:
    """A tensor made on one stage and read on later ones; it is sent directly to each of them.

    name: the node; source: its stage; targets: reading stages, ascending; info: global shape, dtype, needs_grad.
    """

    name: str
    source: int
    targets: tuple[int, ...]
    info: TensorInfo


@dataclass(frozen=True, slots=True)
class StageSplit:
    """stage_of: node name -> stage, for every node of a segment. crossings: in graph order.

    loss_stage: the stage that computes the loss (-1: none). outputs: output position -> (node name, stage).
    """

    count: int
    stage_of: dict[str, int]
    crossings: tuple[Crossing, ...]
    loss_stage: int
    outputs: dict[int, tuple[str, int]]

    def edges(self) -> frozenset[tuple[int, int]]:
        """(source stage, target stage) of every activation message."""
        return frozenset((c.source, target) for c in self.crossings for target in c.targets)

    def grad_edges(self) -> frozenset[tuple[int, int]]:
        """The subset of `edges` along which a gradient comes back."""
        return frozenset((c.source, t) for c in self.crossings if c.info.needs_grad for t in c.targets)


def split_stages(trace: Trace, bounds: tuple[int, ...]) -> StageSplit:
    """bounds: index of the first segment of every stage, ascending, first 0. Raises ValueError otherwise."""
    if not bounds or bounds[0] != 0 or list(bounds) != sorted(set(bounds)) or bounds[-1] >= max(len(trace.segments), 1):
        raise ValueError(f"bounds {bounds} do not split {len(trace.segments)} segments")
    ends = [*bounds[1:], len(trace.segments)]
    stage_of = {
        name: stage
        for stage, (first, last) in enumerate(zip(bounds, ends, strict=True))
        for segment in trace.segments[first:last]
        for name in segment.nodes
    }
    for node in trace.nodes():
        maker = resolve(node)[0]
        if maker is not node and maker.name in stage_of:
            stage_of[node.name] = stage_of[maker.name]  # a result of an op is at home where the op runs
    last_stage = len(bounds) - 1
    outputs: dict[int, tuple[str, int]] = {}
    crossings: list[Crossing] = []
    for node in trace.nodes():
        if node.op == "output":
            for position, value in enumerate(_flat(node.args[0])):
                if isinstance(value, fx.Node):
                    # A shared value (or an input handed through) is computed wherever it is asked for.
                    outputs[position] = value.name, stage_of.get(value.name, last_stage)
            continue
        if node.name not in stage_of:
            continue
        mine = stage_of[node.name]
        targets = sorted({stage_of[u.name] for u in node.users if u.name in stage_of} - {mine})
        if targets and targets[0] < mine:
            raise ValueError(f"{node.name} of stage {mine} is read earlier, by stage {targets[0]}")
        if targets and is_tensor(node):
            crossings.append(Crossing(node.name, mine, tuple(targets), info(node)))
    loss_stage = outputs[0][1] if 0 in outputs else -1
    return StageSplit(len(bounds), stage_of, tuple(crossings), loss_stage, outputs)


def _flat(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)
