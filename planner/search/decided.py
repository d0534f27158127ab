"""The user's constraints as what the search works with."""

from __future__ import annotations

from dataclasses import dataclass, field

from shardplan.errors import ConflictingConstraints, UsageError
from shardplan.planner.cluster import Cluster
from shardplan.planner.constraints import (
    Constraint,
    Degrees,
    Leaf,
    MemoryLimit,
    Pin,
    Replicated,
    Split,
    Together,
    WithinNode,
    Zero,
    matches,
)
from shardplan.planner.placement import D, Placement, R, S
from shardplan.planner.search.case import Case
from shardplan.planner.trace import Trace, info, module_path, needs_grad


@dataclass(slots=True)
class Decided:
    """degrees: fixed ones by axis ("dp", "tp", "pp"). pinned: segment index -> stage. together: groups of segment
    indices. placements: parameter node -> tp placement. within: axes whose groups stay in a node. levels: parameter
    node -> levels at which it may be stored."""

    degrees: dict[str, int] = field(default_factory=dict)
    pinned: dict[int, int] = field(default_factory=dict)
    together: list[tuple[int, ...]] = field(default_factory=list)
    placements: dict[str, Placement] = field(default_factory=dict)
    within: set[str] = field(default_factory=set)
    levels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    cluster: Cluster | None = None

    def allows(self, case: Case, trace: Trace, cluster: Cluster) -> bool:
        """Whether a case has the fixed degrees, can split what is to be split, and keeps groups where they belong."""
        given = {"dp": case.dp, "tp": case.tp, "pp": case.stages}
        if any(given[name] != value for name, value in self.degrees.items()):
            return False
        for name, placement in self.placements.items():
            extent = info(trace.node(name)).shape[placement.dim] if placement.is_shard else 0
            if placement.is_shard and (case.tp == 1 or extent % case.tp):
                return False
        if self.pinned and max(self.pinned.values()) >= case.stages:
            return False
        return all(_inside(cluster, case, axis) for axis in self.within)


def _inside(cluster: Cluster, case: Case, axis: str) -> bool:
    for stage in range(case.stages):
        ranks = case.ranks(stage)
        rows = [ranks[first : first + case.tp] for first in range(0, len(ranks), case.tp)]
        groups = rows if axis == "tp" else [ranks[first :: case.tp] for first in range(case.tp)]
        if any(len({cluster.devices[rank].node for rank in group}) > 1 for group in groups):
            return False
    return True


def decide(trace: Trace, cluster: Cluster, constraints: tuple[Constraint, ...]) -> Decided:
    """Raises NoMatch, UsageError, ConflictingConstraints or NotSupported."""
    found = Decided(cluster=cluster)
    parameters = {source.name: name for name, source in trace.sources.items() if source.kind == "param"}
    parameters |= {
        alias: name for name, source in trace.sources.items() if source.kind == "param" for alias in source.aliases
    }
    homes = _homes(trace, parameters)
    for constraint in constraints:
        if isinstance(constraint, Degrees):
            for name in ("dp", "tp", "pp"):
                value = getattr(constraint, name)
                if value is not None and found.degrees.setdefault(name, value) != value:
                    raise ConflictingConstraints(f"{name} is fixed twice: {found.degrees[name]} and {value}")
        elif isinstance(constraint, MemoryLimit):
            assert found.cluster is not None
            if constraint.device is not None and constraint.device >= len(cluster):
                raise UsageError(f"{constraint}: there are {len(cluster)} devices")
            limits = list(found.cluster.limits) or [None] * len(cluster)
            at = range(len(cluster)) if constraint.device is None else [constraint.device]
            for device in at:
                limits[device] = constraint.nbytes
            found.cluster = found.cluster.with_memory(limits)
        elif isinstance(constraint, WithinNode):
            found.within.add(constraint.axis)
        elif isinstance(constraint, Pin):
            for segment in sorted({i for name in matches(constraint.glob, homes) for i in homes[name]}):
                if found.pinned.setdefault(segment, constraint.stage) != constraint.stage:
                    raise ConflictingConstraints(
                        f"{trace.segments[segment].name} is pinned to stages {found.pinned[segment]} and "
                        f"{constraint.stage}"
                    )
        elif isinstance(constraint, Together):
            group = {i for glob in constraint.globs for name in matches(glob, homes) for i in homes[name]}
            found.together.append(tuple(sorted(group)))
        elif isinstance(constraint, (Split, Replicated)):
            for name in matches(constraint.glob, parameters):
                node = trace.node(parameters[name])
                rank = len(info(node).shape)
                if isinstance(constraint, Split) and not -rank <= constraint.dim < rank:
                    raise UsageError(f"{constraint}: {name} has {rank} dims")
                whole = D if needs_grad(node) else R
                placement = S(constraint.dim % rank) if isinstance(constraint, Split) else whole
                if found.placements.setdefault(node.name, placement) != placement:
                    raise ConflictingConstraints(f"{name} is to be {found.placements[node.name]} and {placement}")
        elif isinstance(constraint, Zero):
            for name in matches(constraint.glob, parameters):
                level = (constraint.level,)
                if found.levels.setdefault(parameters[name], level) != level:
                    earlier = found.levels[parameters[name]][0]
                    raise ConflictingConstraints(f"{name} is to be stored at levels {earlier} and {constraint.level}")
        elif isinstance(constraint, Leaf):
            continue  # honoured when tracing
        else:
            raise UsageError(f"not a constraint: {constraint!r}")
    return found


def _homes(trace: Trace, parameters: dict[str, str]) -> dict[str, list[int]]:
    """Name of a segment, module or parameter -> segments in which it is used."""
    found: dict[str, dict[int, None]] = {}
    by_node = {node: name for name, node in parameters.items()}
    for index, segment in enumerate(trace.segments):
        found.setdefault(segment.name, {})[index] = None
        for name in segment.nodes:
            node = trace.node(name)
            path = module_path(node)
            while path:
                found.setdefault(path, {})[index] = None
                path = path.rpartition(".")[0]
            for argument in node.all_input_nodes:
                if argument.name in by_node:
                    found.setdefault(by_node[argument.name], {})[index] = None
    return {name: list(indices) for name, indices in found.items()}
