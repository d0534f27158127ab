"""Seconds of messages and collectives: measured tables where there are any, else a model of the described links.

The model. A collective among n ranks, c of them on each of N nodes, moves through two levels: the links inside a node
and the nodes' uplinks. For a tensor of S bytes (as `Costs.collective` counts them) the busiest device of a node moves

    ==============  ===================  =======================  =====================
    kind            inside one node      inside, N > 1            uplink of a node
    ==============  ===================  =======================  =====================
    all_reduce      2 (n-1)/n S          2 (c-1)/c S              2 (N-1)/N S
    all_gather      (n-1)/n S            (c-1)/c S                (N-1)/N S
    reduce_scatter  (n-1)/n S            (c-1)/c S                (N-1)/N S
    all_to_all      (n-1)/n S            (c-1)/n S                c (n-c)/n S
    p2p             S                    -                        S
    ==============  ===================  =======================  =====================

(Thakur, Rabenseifner, Gropp 2005 for one level; hierarchical rings as in NCCL for two.) A switch that reduces ("nvls")
moves S instead of 2 (n-1)/n S. Levels work in a pipeline, so the slower one counts: with X the larger of the levels'
bytes / (bandwidth x efficiency) and A the latency,

    seconds = A + k sqrt(A X) + X.

k = 0 without overlap costs; the best choice of chunk size for a pipeline of A-seconds steps gives k = 2,
(sqrt(A) + sqrt(X))^2; fitted values lie between. A = sum over levels of latency x (1 + step x steps), where steps is
the number of hops. `FABRICS` holds the fitted constants. CPU ranks use gloo: one flat ring over all ranks, and
reduce_scatter costs an all_reduce.

Contention. "per device" uplinks are each device's own: a group with c devices on a node has c of them. A "per node"
uplink is shared by what uses it at the same time: unless `concurrent` lists the groups, all devices of the node are
taken to run the same collective in sibling groups, or to send at the same time (SPMD). One pair of GPUs alone rarely
gets more than its share of a node's adapters anyway (measured p2p between nodes with 8 GPUs: 7.3 of 50 GB/s, A100;
1.4 of 12.5 GB/s, A10G).
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shardplan.planner.cluster import Cluster, Link
from shardplan.planner.costs.tables import LinkTables, Points, clean, interpolate

_NOISE = 1.25

COLLECTIVE_KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


@dataclass(frozen=True, slots=True)
class Fabric:
    """What a kind of link makes of its data-sheet numbers.

    efficiency: share of the bandwidth that a large message reaches, by kind of collective. step: latency of one more
    hop, as a share of the link's latency. overlap: k of the module docstring. reduces: share of the bandwidth that
    in-switch reduction reaches, None where the switch cannot; direct: links per device of a fabric without a switch
    (a group of n devices can use n of them), 0 with one.
    """

    efficiency: Mapping[str, float]
    step: float
    overlap: float
    reduces: float | None = None
    direct: int = 0


def _even(value: float) -> dict[str, float]:
    return dict.fromkeys((*COLLECTIVE_KINDS, "p2p"), value)


def _by_kind(
    all_reduce: float, all_gather: float, reduce_scatter: float, all_to_all: float, p2p: float
) -> dict[str, float]:
    return dict(zip((*COLLECTIVE_KINDS, "p2p"), (all_reduce, all_gather, reduce_scatter, all_to_all, p2p), strict=True))


# Fitted by benchmarks/fit_links.py to published nccl-tests and torch.distributed timings: NVIDIA DGX Cloud
# Benchmarking (8 H100), nccl-tests issue 309, OCI and AWS documentation (16-64 H100), ml-engineering (A100, H200,
# B200), vTrain (A100, V100), SuperScaler/Aceso (V100), Mist (A100-40G, L4, A10G). No table separates all_gather and
# reduce_scatter from copies on "nvswitch" and "nvlink": they are given all_reduce's efficiency, whose ring they share
# (H200: 361 and 363 against 366 GB/s). tcp and the other kinds of rdma: assumed.
FABRICS: dict[str, Fabric] = {
    "plain": Fabric(_even(1.0), step=1.0, overlap=0.0),
    "nvls": Fabric(_by_kind(0.80, 0.84, 0.84, 0.80, 0.80), step=0.25, overlap=1.1, reduces=0.61),
    "nvswitch": Fabric(_by_kind(0.80, 0.80, 0.80, 0.62, 0.98), step=0.23, overlap=0.56),
    "nvlink": Fabric(_by_kind(0.84, 0.84, 0.84, 0.51, 0.97), step=0.52, overlap=0.46, direct=6),
    "pcie": Fabric(_by_kind(0.163, 0.136, 0.134, 0.125, 0.186), step=0.0, overlap=1.07),
    "rdma": Fabric(_even(0.82), step=0.8, overlap=1.84),
    "tcp": Fabric(_even(0.6), step=0.8, overlap=1.0),
}


@dataclass(frozen=True, slots=True)
class _Part:
    """The members of a group on one node, `count` of them. inside: their link among themselves; between: towards the
    other nodes of the group. devices: of the whole node."""

    node: int
    count: int
    devices: int
    inside: Link
    between: Link


@dataclass(frozen=True, slots=True)
class _Group:
    """What the model needs to know of a group. parts: one per node; alike: one of every kind of part (large groups
    have few kinds)."""

    size: int
    gloo: bool
    parts: tuple[_Part, ...]
    alike: tuple[_Part, ...]


class LinkModel:
    """Prices of messages on a cluster. tables: what was measured on it, and then used wherever it applies.

    constants: fabric constants by name, for fitting.
    """

    def __init__(
        self, cluster: Cluster, tables: LinkTables | None = None, constants: Mapping[str, Fabric] | None = None
    ) -> None:
        self.cluster = cluster
        self.tables = tables
        self.constants = FABRICS if constants is None else constants
        self._groups: dict[tuple[int, ...], _Group] = {}
        self._measured: dict[tuple[str, tuple[int, ...]], tuple[str, Points | None, tuple[int, ...] | None]] = {}

    # -- prices ---------------------------------------------------------------------------------------------------

    def collective(
        self, kind: str, nbytes: int, ranks: Sequence[int], concurrent: Sequence[Sequence[int]] | None = None
    ) -> float:
        """Seconds of one collective among `ranks`. kind, nbytes: as in `Costs.collective`.

        concurrent: the groups that run it at the same time (`ranks` among them); see Contention in the module
        docstring. Measured tables hold what they hold: it does not change them. Raises ValueError on unknown kinds.
        """
        if kind not in COLLECTIVE_KINDS:
            raise ValueError(f"unknown collective {kind!r}")
        if nbytes <= 0 or len(ranks) < 2:
            return 0.0
        group = tuple(ranks)
        how, points, stand_in = self._lookup(kind, group)
        if how == "modelled":
            return self._model(kind, nbytes, group, concurrent)
        assert points is not None
        seconds = interpolate(points, nbytes)
        if stand_in is None:
            return seconds
        # A group of another size: what the model says, corrected by what it gets wrong on the nearest measured one.
        return self._model(kind, nbytes, group, concurrent) * seconds / self._model(kind, nbytes, stand_in, None)

    def p2p(self, nbytes: int, source: int, target: int, concurrent: Sequence[tuple[int, int]] | None = None) -> float:
        """Seconds until `nbytes` sent by one rank have arrived at another.

        concurrent: the (source, target) pairs that send at the same time, this one among them; default: every device
        of the node sends.
        """
        if nbytes <= 0 or source == target:
            return 0.0
        how, points, stand_in = self._lookup("p2p", (source, target))
        if how == "modelled":
            return self._model_p2p(nbytes, source, target, concurrent)
        assert points is not None
        seconds = interpolate(points, nbytes)
        if stand_in is None:
            return seconds
        ratio = seconds / self._model_p2p(nbytes, *stand_in, None)  # type: ignore[arg-type]
        return self._model_p2p(nbytes, source, target, concurrent) * ratio

    def source(self, kind: str, ranks: Sequence[int]) -> str:
        """Where a price comes from: "measured" (this group or one just like it), "interpolated" (the model, corrected
        by a measured group of another shape), or "modelled"."""
        return self._lookup(kind, tuple(ranks))[0]

    def slowdown(self, kind: str, ranks: Sequence[int]) -> tuple[float, float]:
        """See `Costs.slowdown`. The median of the groups of that size where this one was not measured; none where
        nothing was: a GPU's adapters move bytes by themselves."""
        known = self.tables.slowdowns if self.tables is not None else {}
        own = known.get((kind, tuple(ranks)))
        if own is not None:
            return own
        shares = [pair for (name, group), pair in known.items() if name == kind and len(group) == len(ranks)]
        if not shares:
            return 0.0, 0.0
        return statistics.median(pair[0] for pair in shares), statistics.median(pair[1] for pair in shares)

    # -- measured -------------------------------------------------------------------------------------------------

    def _lookup(self, kind: str, ranks: tuple[int, ...]) -> tuple[str, Points | None, tuple[int, ...] | None]:
        """(source, points, group that stands in).

        Groups alike (devices and nodes, no links of their own) share the median of their tables, so that noise does not
        make one of them look faster; only those within `_NOISE` of a group's own table count, since links may differ
        that nobody described. Without a table for it or its like, the nearest measured group stands in.
        """
        key = (kind, ranks)
        if key not in self._measured:
            self._measured[key] = self._find(kind, ranks)
        return self._measured[key]

    def _find(self, kind: str, ranks: tuple[int, ...]) -> tuple[str, Points | None, tuple[int, ...] | None]:
        if self.tables is None:
            return "modelled", None, None
        exact = self.tables.entries.get((kind, ranks))
        if exact is None and kind != "p2p":
            exact = self.tables.entries.get((kind, tuple(sorted(ranks))))
        known = [g for g in self.tables.groups(kind) if max(g) < len(self.cluster.devices)]
        wanted = self._signature(ranks)
        alike = [] if self.cluster.has_overrides() else [g for g in known if self._signature(g) == wanted]
        if exact is not None:
            near = [g for g in alike if _close(exact, self.tables.entries[kind, g])]
            return "measured", self._median(kind, near) if near else exact, None
        if alike:
            return "measured", self._median(kind, alike), None
        if not known:
            return "modelled", None, None
        crosses = self._node_count(ranks) > 1
        nearest = min(known, key=lambda g: ((self._node_count(g) > 1) != crosses, abs(len(g) - len(ranks)), len(g), g))
        return "interpolated", self.tables.entries[kind, nearest], nearest

    def _signature(self, ranks: Iterable[int]) -> tuple[tuple[str, int], ...]:
        """Device kinds and counts per node, without saying which nodes."""
        per_node: Counter[tuple[int, str]] = Counter()
        for rank in ranks:
            device = self.cluster.devices[rank]
            per_node[device.node, device.kind.name] += 1
        return tuple(sorted((name, count) for (_, name), count in per_node.items()))

    def _node_count(self, ranks: Iterable[int]) -> int:
        return len({self.cluster.devices[rank].node for rank in ranks})

    def _median(self, kind: str, groups: Sequence[tuple[int, ...]]) -> Points:
        assert self.tables is not None
        tables = [self.tables.entries[kind, group] for group in groups]
        if len(tables) == 1:
            return tables[0]
        sizes = sorted({nbytes for points in tables for nbytes, _ in points})
        reaching = {n: [points for points in tables if points[-1][0] >= n] for n in sizes}
        return clean((n, statistics.median(interpolate(points, n) for points in reaching[n])) for n in sizes)

    # -- modelled -------------------------------------------------------------------------------------------------

    def _group(self, ranks: tuple[int, ...]) -> _Group:
        if ranks not in self._groups:
            members: dict[int, list[int]] = {}
            for rank in sorted(ranks):
                members.setdefault(self.cluster.devices[rank].node, []).append(rank)
            rows = list(members.values())
            parts = tuple(
                _Part(
                    node,
                    len(row),
                    len(self.cluster.nodes[node]),
                    self._inside_link(node, row),
                    self._between_link(node, row, after),
                )
                for (node, row), after in zip(members.items(), [*rows[1:], rows[0]], strict=True)
            )
            alike = {(part.count, part.devices, part.inside, part.between): part for part in reversed(parts)}
            gloo = any(self.cluster.devices[row[0]].kind.torch_device == "cpu" for row in rows)
            self._groups[ranks] = _Group(len(ranks), gloo, parts, tuple(alike.values()))
        return self._groups[ranks]

    def _inside_link(self, node: int, members: Sequence[int]) -> Link:
        """The link that members of one node use among themselves: with overrides, the slowest edge of the ring through
        them in rank order."""
        if not self.cluster.has_overrides() or len(members) < 2:
            return self.cluster.wiring[node].link
        return _worst([self.cluster.link(a, b) for a, b in zip(members, [*members[1:], members[0]], strict=True)])

    def _between_link(self, node: int, members: Sequence[int], following: Sequence[int]) -> Link:
        """Their uplink: with overrides, the slowest edge to the members on the next node of the ring."""
        if not self.cluster.has_overrides() or members is following:
            return self.cluster.wiring[node].uplink
        return _worst([self.cluster.link(a, following[i % len(following)]) for i, a in enumerate(members)])

    def _model(
        self, kind: str, nbytes: int, ranks: tuple[int, ...], concurrent: Sequence[Sequence[int]] | None
    ) -> float:
        group = self._group(ranks)
        if group.gloo and kind == "reduce_scatter":
            kind = "all_reduce"
        seconds = self._levels(kind, nbytes, group, concurrent, in_switch=False)
        if kind == "all_reduce" and any(self.constants[part.inside.fabric].reduces for part in group.alike):
            seconds = min(seconds, self._levels(kind, nbytes, group, concurrent, in_switch=True))
        return seconds

    def _levels(
        self, kind: str, nbytes: int, group: _Group, concurrent: Sequence[Sequence[int]] | None, in_switch: bool
    ) -> float:
        """A + k sqrt(A X) + X over both levels."""
        parts = group.alike if concurrent is None else group.parts
        nodes, most = len(group.parts), max(part.count for part in parts)
        inside_steps = _hops(kind, group.size if group.gloo else most, group.gloo)
        between_steps = inside_steps if group.gloo else _hops(kind, nodes, False)
        inside = between = transfer = overlap = 0.0
        for part in parts:
            if part.count > 1:
                fabric, link = self.constants[part.inside.fabric], part.inside
                moved = _inside_bytes(kind, nbytes, group.size, part.count, group.gloo or nodes == 1)
                rate, steps = link.bytes_per_s * fabric.efficiency[kind], inside_steps
                if in_switch and fabric.reduces:
                    moved, rate, steps = nbytes, link.bytes_per_s * fabric.reduces, math.log2(part.count)
                if fabric.direct:
                    rate *= min(1.0, part.count / fabric.direct)
                if link.per == "node":
                    rate /= self._active_devices(part, concurrent)
                transfer = max(transfer, moved / rate)
                inside = max(inside, link.latency_seconds * (1 + fabric.step * (steps - 1)))
                overlap = max(overlap, fabric.overlap)
            if nodes > 1:
                fabric, link = self.constants[part.between.fabric], part.between
                moved = _between_bytes(kind, nbytes, group, part.count)
                # gloo keeps one flow per ring edge; NCCL spreads over every device's adapter.
                one_flow = group.gloo and kind != "all_to_all"
                rate = link.bytes_per_s * fabric.efficiency[kind] * self._uplink_share(part, concurrent, one_flow)
                transfer = max(transfer, moved / rate)
                between = max(between, link.latency_seconds * (1 + fabric.step * (between_steps - 1)))
                overlap = max(overlap, fabric.overlap)
        latency = max(inside, between) if group.gloo else inside + between
        return latency + overlap * math.sqrt(latency * transfer) + transfer

    def _active_devices(self, part: _Part, concurrent: Sequence[Sequence[int]] | None) -> int:
        """Devices of the part's node that talk at the same time."""
        if concurrent is None:
            return part.devices
        active = {r for ranks in concurrent for r in ranks if self.cluster.devices[r].node == part.node}
        return max(len(active), part.count)

    def _uplink_share(self, part: _Part, concurrent: Sequence[Sequence[int]] | None, one_flow: bool) -> float:
        """Multiple of the uplink's bandwidth that the group's members on a node have together."""
        if part.between.per == "device":
            return 1 if one_flow else part.count
        if concurrent is None:
            return 1 / max(1, part.devices // part.count)
        return 1 / max(1, sum(self._crosses(ranks, part.node) for ranks in concurrent))

    def _crosses(self, ranks: Iterable[int], node: int) -> bool:
        places = {self.cluster.devices[rank].node for rank in ranks}
        return node in places and len(places) > 1

    def _model_p2p(self, nbytes: int, source: int, target: int, concurrent: Sequence[tuple[int, int]] | None) -> float:
        link = self.cluster.link(source, target)
        fabric = self.constants[link.fabric]
        rate = link.bytes_per_s * fabric.efficiency["p2p"]
        if fabric.direct:
            rate *= 2 / fabric.direct
        if link.per == "node":
            rate /= self._senders(source, target, concurrent)
        transfer = nbytes / rate
        return link.latency_seconds + fabric.overlap * math.sqrt(link.latency_seconds * transfer) + transfer

    def _senders(self, source: int, target: int, pairs: Sequence[tuple[int, int]] | None) -> int:
        """How many messages share the busier end of the way between two devices."""
        ends = [self.cluster.devices[rank].node for rank in (source, target)]
        if pairs is None:
            return max(len(self.cluster.nodes[node]) for node in ends) if ends[0] != ends[1] else 1
        places = [tuple(self.cluster.devices[rank].node for rank in pair) for pair in pairs]
        if ends[0] == ends[1]:
            return max(1, sum(place == (ends[0], ends[0]) for place in places))
        crossing = [place for place in places if place[0] != place[1]]
        return max(1, *(sum(place[end] == ends[end] for place in crossing) for end in (0, 1)))


def _close(points: Points, others: Points) -> bool:
    """Whether two tables differ by less than `_NOISE` on average over the sizes of the first."""
    logs = [math.log(seconds / interpolate(others, nbytes)) for nbytes, seconds in points]
    return abs(statistics.fmean(logs)) < math.log(_NOISE)


def _worst(edges: Sequence[Link]) -> Link:
    slowest = min(edges, key=lambda link: link.bytes_per_s)
    latency = max(edge.latency_seconds for edge in edges)
    return Link(slowest.bytes_per_s, latency, slowest.fabric, slowest.per)


def _hops(kind: str, size: int, gloo: bool) -> float:
    """Hops that a small message makes one after the other: rings on gloo, trees for NCCL's all_reduce."""
    if size < 2:
        return 1.0
    if kind == "all_reduce":
        return 2 * (size - 1) if gloo else 2 * math.log2(size)
    return size - 1


def _inside_bytes(kind: str, nbytes: int, size: int, count: int, flat: bool) -> float:
    """Bytes that a device sends to others of its node; flat: one ring (or direct exchange) over all ranks."""
    if kind == "all_to_all":
        return (count - 1) / size * nbytes
    once = (size - 1) / size if flat else (count - 1) / count
    return (2 if kind == "all_reduce" else 1) * once * nbytes


def _between_bytes(kind: str, nbytes: int, group: _Group, count: int) -> float:
    """Bytes that leave a node with `count` members of the group."""
    if kind == "all_to_all":
        return count * (group.size - count) / group.size * nbytes
    nodes = len(group.parts)
    once = (group.size - 1) / group.size if group.gloo else (nodes - 1) / nodes
    return (2 if kind == "all_reduce" else 1) * once * nbytes


__all__ = ["COLLECTIVE_KINDS", "FABRICS", "Fabric", "LinkModel", "LinkTables"]
