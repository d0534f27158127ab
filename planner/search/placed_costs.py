"""Prices as one stage sees them: its ranks are numbered 0, 1, ... in the order of its mesh.

`Columns` prices a stage on its own ranks 0..n-1; here these become ranks of the cluster. A collective of a mesh axis
runs in all groups of that axis at once and the step waits for the slowest, so the price is that of the worst group; on
devices of several kinds an op takes as long as on the slowest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from shardplan.planner.cluster import Cluster
from shardplan.planner.costs.base import Costs, OpCost, OpSaves, Overheads
from shardplan.planner.rules import LocalCall


@dataclass(slots=True)
class PlacedCosts:
    """`Costs` of the stage whose rank i is `ranks[i]` of `costs`; ranks: row-major over (dp, tp)."""

    costs: Costs
    cluster: Cluster
    ranks: tuple[int, ...]
    dp: int
    tp: int
    _first: tuple[int, ...] = field(init=False)
    _groups: dict[tuple[int, ...], tuple[tuple[int, ...], ...]] = field(init=False)

    def __post_init__(self) -> None:
        kinds: dict[str, int] = {}
        for rank in self.ranks:
            kinds.setdefault(self.cluster.devices[rank].kind.name, rank)
        self._first = tuple(kinds.values())
        width, tp = len(self.ranks), self.tp
        tensor = [tuple(range(start, start + tp)) for start in range(0, width, tp)]
        data = [tuple(range(start, width, tp)) for start in range(tp)]
        self._groups = {tensor[0]: self._distinct(tensor), data[0]: self._distinct(data)}

    def _distinct(self, groups: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
        """The groups in ranks of the cluster; of those whose devices are alike (kinds and nodes) one."""
        found: dict[tuple[object, ...], tuple[int, ...]] = {}
        for group in groups:
            ranks = tuple(self.ranks[r] for r in group)
            nodes: dict[int, int] = {}
            places = [nodes.setdefault(self.cluster.devices[r].node, len(nodes)) for r in ranks]
            wires = tuple((self.cluster.wiring[n].link, self.cluster.wiring[n].uplink) for n in nodes)
            exact = ranks if self.cluster.has_overrides() else ()
            found.setdefault((tuple(places), wires, exact), ranks)
        return tuple(found.values())

    def op(self, call: LocalCall, device: int) -> OpCost:
        costs = [self.costs.op(call, rank) for rank in self._first]
        if len(costs) == 1:
            return costs[0]
        slowest = max(costs, key=lambda cost: cost.forward_seconds + cost.backward_seconds)
        return OpCost(
            max(cost.forward_seconds for cost in costs),
            max(cost.backward_seconds for cost in costs),
            slowest.source,
            max(cost.forward_scratch for cost in costs),
            max(cost.backward_scratch for cost in costs),
        )

    def saves(self, node: fx.Node) -> OpSaves:
        return self.costs.saves(node)

    def collective(self, kind: str, nbytes: int, ranks: tuple[int, ...]) -> float:
        if len(ranks) < 2:
            return 0.0
        groups = self._groups.get(ranks) or (tuple(self.ranks[r] for r in ranks),)
        return max(self.costs.collective(kind, nbytes, group) for group in groups)

    def p2p(self, nbytes: int, source: int, target: int) -> float:
        return self.costs.p2p(nbytes, self.ranks[source], self.ranks[target])

    def slowdown(self, kind: str, ranks: tuple[int, ...]) -> tuple[float, float]:
        return self.costs.slowdown(kind, tuple(self.ranks[r] for r in ranks))

    def copy(self, nbytes: int, device: int) -> float:
        return max(self.costs.copy(nbytes, rank) for rank in self._first)

    def optimizer(self, nbytes: int, device: int) -> float:
        return max(self.costs.optimizer(nbytes, rank) for rank in self._first)

    def overheads(self, device: int) -> Overheads:
        return self.costs.overheads(self._first[0])
