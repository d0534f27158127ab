"""Groups of unequal devices on which a stage may run.

Devices of one node, kind and limit form a unit; units that look alike are of one kind. A group is some devices of one
unit, several whole units of a kind, a whole node of several kinds, or everything, with a mesh (dp, tp) on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardplan.planner.cluster import Cluster
from shardplan.planner.search.mixed_problem import Take

if TYPE_CHECKING:
    from shardplan.planner.search.search import Search

_MOST_STATES = 3000


def is_unequal(cluster: Cluster) -> bool:
    """Whether devices or nodes differ so that stages should, too."""
    sizes = {len(node) for node in cluster.nodes}
    return len(cluster.kinds()) > 1 or len(sizes) > 1 or cluster.has_overrides()


@dataclass(frozen=True, slots=True)
class Unit:
    """Devices of one node, kind and limit."""

    node: int
    devices: tuple[int, ...]
    limit: int


@dataclass(slots=True)
class Group:
    """A way before it is priced: what it takes, and its mesh. dp_inside: replicas, not parts of tensors, are
    neighbours."""

    takes: Take
    dp: int
    tp: int
    dp_inside: bool = False

    def __str__(self) -> str:
        return f"dp{self.dp} tp{self.tp}" + (" (dp inside)" if self.dp_inside else "")


class DeviceGroups:
    """units: per kind of unit the devices of each. groups: all, or where these lead to too many sets of used devices,
    those of larger steps (the search's notes say so)."""

    def __init__(self, search: Search) -> None:
        self.search, self.cluster, self.decided = search, search.cluster, search.decided
        self.kinds = self._unit_kinds()
        self.units = tuple(tuple(len(unit.devices) for unit in units) for units in self.kinds)
        self.groups = self._groups()

    def _unit_kinds(self) -> list[list[Unit]]:
        found: dict[object, list[Unit]] = {}
        for node, devices in enumerate(self.cluster.nodes):
            parts: dict[object, list[int]] = {}
            for device in devices:
                key = self.cluster.devices[device].kind.name, self.cluster.memory_limit(device)
                parts.setdefault(key, []).append(device)
            for (kind, limit), held in parts.items():  # type: ignore[misc]
                own = node if self.cluster.has_overrides() else -1
                wires = self.cluster.wiring[node]
                key = kind, limit, len(held), len(parts), wires.link, wires.uplink, own
                found.setdefault(key, []).append(Unit(node, tuple(held), limit))
        return list(found.values())

    def name_of(self, kind: int) -> tuple[str, int]:
        """Kind and limit of the devices of a kind of unit."""
        unit = self.kinds[kind][0]
        return self.cluster.devices[unit.devices[0]].kind.name, unit.limit

    def _groups(self) -> list[Group]:
        """All groups, or where these lead to too many states, groups of larger steps."""
        largest = max(units[0] for units in self.units)
        step = 1
        while True:
            takes = self._takes(step)
            if self._states(takes) <= _MOST_STATES or step >= largest:
                break
            step *= 2
        if step > 1:
            self.search.tally.notes.append(f"groups of unequal devices were searched in steps of {step} devices")
        found = []
        for take in takes:
            width = sum(count for _, count in take)
            nodes = {self.kinds[k][0].node for k, _ in take} if len({k for k, _ in take}) > 1 else set(range(len(take)))
            for tp in (d for d in range(1, width + 1) if width % d == 0 and d <= self.search.most_tensor):
                dp = width // tp
                for dp_inside in (False, True) if len(nodes) > 1 and tp > 1 and dp > 1 else (False,):
                    group = Group(take, dp, tp, dp_inside)
                    if self._allowed(group):
                        found.append(group)
        return found

    def _takes(self, step: int) -> list[Take]:
        """step: devices of a unit are used so many at a time, or all."""
        found: dict[Take, None] = {}
        for kind, units in enumerate(self.kinds):
            size = len(units[0].devices)
            for used in dict.fromkeys((*range(step, size + 1, step), size)):
                found[((kind, used),)] = None
            for several in range(2, len(units) + 1):
                found[((kind, size),) * several] = None
        for node in range(len(self.cluster.nodes)):
            inside = tuple((k, len(u.devices)) for k, units in enumerate(self.kinds) for u in units if u.node == node)
            found[inside] = None
        found[tuple((k, len(u.devices)) for k, units in enumerate(self.kinds) for u in units)] = None
        return list(found)

    def _states(self, takes: Sequence[Take]) -> int:
        """At most so many sets of used devices."""
        total = 1
        for kind, units in enumerate(self.units):
            counts = {count for take in takes for k, count in take if k == kind}
            reached = {0}
            for _ in range(units[0]):
                reached |= {r + count for r in reached for count in counts if r + count <= units[0]}
            total *= math.comb(len(units) + len(reached) - 1, len(units))
        return total

    def _allowed(self, group: Group) -> bool:
        degrees = self.decided.degrees
        if degrees.get("dp", group.dp) != group.dp or degrees.get("tp", group.tp) != group.tp:
            return False
        ranks = self.ranks([group])[0]
        for axis, groups in (("tp", _tensor_groups(ranks, group.tp)), ("dp", _data_groups(ranks, group.tp))):
            apart = any(len({self.cluster.devices[r].node for r in members}) > 1 for members in groups)
            if axis in self.decided.within and apart:
                return False
        return True

    def ranks(self, groups: Sequence[Group]) -> list[tuple[int, ...]]:
        """Devices for groups that run side by side; [] where there are not enough. Fuller units come first, so that
        neighbours share nodes."""
        placed = self._place([list(g.takes) for g in groups], {}, [[]])
        if placed is None:
            return []
        found = []
        for group, devices in zip(groups, placed, strict=True):
            if group.dp_inside:
                devices = [devices[t * group.dp + d] for d in range(group.dp) for t in range(group.tp)]
            found.append(tuple(devices))
        return found

    def _place(
        self, rest: list[list[tuple[int, int]]], used: dict[tuple[int, int], int], placed: list[list[int]]
    ) -> list[list[int]] | None:
        if not rest:
            return placed[:-1]
        takes, *others = rest
        if not takes:
            return self._place(others, used, [*placed, []])
        (kind, count), *left = takes
        units = self.kinds[kind]
        order = sorted(range(len(units)), key=lambda u: (-used.get((kind, u), 0), u))
        tried: set[int] = set()
        for unit in order:
            begin = used.get((kind, unit), 0)
            if begin in tried or begin + count > len(units[unit].devices):
                continue
            tried.add(begin)
            devices = [*placed[-1], *units[unit].devices[begin : begin + count]]
            found = self._place([left, *others], {**used, (kind, unit): begin + count}, [*placed[:-1], devices])
            if found is not None:
                return found
        return None


def _tensor_groups(ranks: Sequence[int], tp: int) -> list[Sequence[int]]:
    return [ranks[start : start + tp] for start in range(0, len(ranks), tp)]


def _data_groups(ranks: Sequence[int], tp: int) -> list[Sequence[int]]:
    return [ranks[start::tp] for start in range(tp)]
