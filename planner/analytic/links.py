"""Communication of a row: which ranks talk, over which links, for how long.

Ranks are numbered as Megatron-LM does: tensor parallel fastest, then context, data, and pipeline parallel slowest, so
that the group that talks most sits on the fewest nodes. Stage s stands on the ranks s n .. (s+1) n - 1.

A bandwidth that the row gives replaces that of the preset: between nodes the link is then taken to be RDMA; inside a
node it is still the preset's kind, and no faster than one direction of the device's own links (tables like to quote
both directions together; the prediction notes it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from shardplan.errors import UsageError
from shardplan.planner.analytic.row import Row
from shardplan.planner.cluster import Cluster, DeviceKind, Wiring
from shardplan.planner.costs.links import LinkModel

CONTEXT_NBYTES = 1 << 30
"""What the driver's context, the libraries' workspaces and the buffers of collectives take on a GPU, about."""
_OWN_LINKS = ("nvls", "nvswitch", "nvlink")
_FASTEST_PCIE = 128e9


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """A row's ranks on a cluster. uniform: the only kind of device there is, None where there are several."""

    cluster: Cluster
    model: LinkModel
    uniform: DeviceKind | None
    row: Row

    def kinds(self, stage: int) -> tuple[DeviceKind, ...]:
        """Kinds of device that a stage stands on."""
        size = self.row.ranks // self.row.pp
        if self.uniform is not None:
            return (self.uniform,)
        members = self.cluster.devices[stage * size : (stage + 1) * size]
        return tuple({device.kind.name: device.kind for device in members}.values())

    def _group(self, stage: int, stride: int, size: int) -> tuple[int, ...]:
        first = stage * (self.row.ranks // self.row.pp)
        return tuple(range(first, first + stride * size, stride))

    def _slowest(self, kind: str, nbytes: float, groups: Sequence[tuple[int, ...]]) -> float:
        return max(self.model.collective(kind, round(nbytes), ranks) for ranks in groups)

    def tensor(self, kind: str, nbytes: float, stage: int) -> float:
        """Seconds of a collective among the tensor-parallel ranks."""
        return self._slowest(kind, nbytes, [self._group(stage, 1, self.row.tp)]) if self.row.tp > 1 else 0.0

    def data(self, kind: str, nbytes: float, stage: int) -> float:
        """Among the ranks that hold the same parameters: data and context parallel."""
        return self._slowest(kind, nbytes, [self._group(stage, self.row.tp, self.row.dp * self.row.cp)])

    def expert_data(self, kind: str, nbytes: float, stage: int) -> float:
        """Among the ranks that hold the same experts."""
        row = self.row
        size = max(1, row.dp * row.cp * row.tp // (row.ep * expert_tp(row)))
        return self._slowest(kind, nbytes, [self._group(stage, row.ep * expert_tp(row), size)])

    def expert(self, nbytes: float, stage: int, copies: int) -> float:
        """All-to-all among the ranks that share out the experts. nbytes: a rank's tokens, each `copies` times.

        A token whose experts are on the same node travels there once: of `copies` experts drawn from N nodes,
        N (1 - (1 - 1/N)^copies) nodes are different ones (dispatch by node, as in DeepSeek-V3's DeepEP).
        """
        row = self.row
        if row.ep == 1:
            return 0.0
        ranks = self._group(stage, expert_tp(row), row.ep)
        nodes = len({self.cluster.devices[rank].node for rank in ranks})
        if nodes > 1:
            nbytes *= nodes * (1 - (1 - 1 / nodes) ** copies) / copies
        return self._slowest("all_to_all", nbytes, [ranks])

    def context(self, nbytes: float, stage: int) -> float:
        """All-gather of keys and values among the context-parallel ranks."""
        row = self.row
        return self._slowest("all_gather", nbytes, [self._group(stage, row.tp, row.cp)]) if row.cp > 1 else 0.0

    def send(self, nbytes: float, stage: int) -> float:
        """From a stage to the next one (the last: back to the first, between chunks)."""
        size = self.row.ranks // self.row.pp
        source, target = stage * size, (stage + 1) % self.row.pp * size
        return self.model.p2p(round(nbytes), source, target)


def expert_tp(row: Row) -> int:
    """How many ranks split one expert: the tensor-parallel ones, unless expert parallelism needs them too."""
    return row.tp if (row.dp * row.cp) % row.ep == 0 else 1


def network(row: Row, cluster: Cluster | None) -> tuple[Network, tuple[str, ...]]:
    """The row's ranks on the row's devices or on the given cluster, and notes on what was understood.

    Raises UsageError where devices are unknown or too few.
    """
    notes: list[str] = []
    if cluster is None:
        assert row.devices is not None
        listed = tuple(row.devices.items()) if isinstance(row.devices, dict) else row.devices
        site, notes = _described(
            listed,
            row.gpus_per_node,
            row.intra_node_bytes_per_s,
            row.inter_node_bytes_per_s,
            row.inter_node_per,
        )
    else:
        site = _given(cluster)
    cluster = site.cluster
    if row.ranks > len(cluster):
        raise UsageError(
            f"devices: tp x pp x dp x cp = {row.tp} x {row.pp} x {row.dp} x {row.cp} = {row.ranks} ranks, but there "
            f"are {len(cluster)} devices"
        )
    if row.ranks < len(cluster):
        notes = [*notes, f"uses {row.ranks} of {len(cluster)} devices"]
    return Network(cluster, site.model, site.uniform, row), tuple(notes)


@dataclass(frozen=True, slots=True, eq=False)
class _Site:
    """A cluster with its prices and the only kind of its devices."""

    cluster: Cluster
    model: LinkModel
    uniform: DeviceKind | None


@lru_cache(maxsize=64)
def _described(
    devices: str | tuple[tuple[str, int], ...],
    per_node: int | None,
    intra: float | None,
    inter: float | None,
    inter_per: str,
) -> tuple[_Site, list[str]]:
    cluster = Cluster.parse(dict(devices) if isinstance(devices, tuple) else devices, per_node)
    notes: list[str] = []
    wiring: list[Wiring] = []
    changed: dict[Wiring, Wiring] = {}
    for wires in cluster.wiring:
        if wires not in changed:
            link, uplink = wires.link, wires.uplink
            if intra is not None:
                rate = intra
                if link.fabric in _OWN_LINKS and rate > link.bytes_per_s:
                    notes.append(
                        f"intra_node_bandwidth: {rate / 1e9:g} GB/s is more than one direction of the device's links "
                        f"({link.bytes_per_s / 1e9:g} GB/s), which is used"
                    )
                    rate = link.bytes_per_s
                # More than PCI Express can do: bridges or switches of NVLink, where the preset has none.
                fabric = "nvswitch" if link.fabric == "pcie" and rate > _FASTEST_PCIE else link.fabric
                link = replace(link, bytes_per_s=rate, fabric=fabric, source="row")
            if inter is not None:
                uplink = replace(uplink, bytes_per_s=inter, per=inter_per, fabric="rdma", source="row")
            changed[wires] = Wiring(link, uplink)
        wiring.append(changed[wires])
    # A table tells what ran: no margin for the unforeseen is held back, as the planner does.
    limits = tuple(device.kind.memory_nbytes - CONTEXT_NBYTES for device in cluster.devices)
    cluster = replace(cluster, wiring=tuple(wiring), limits=limits)
    return _site(cluster), sorted(set(notes))


@lru_cache(maxsize=8)
def _given(cluster: Cluster) -> _Site:
    """The site of a cluster that is given for many rows."""
    return _site(cluster)


def _site(cluster: Cluster) -> _Site:
    kinds = cluster.kinds()
    return _Site(cluster, LinkModel(cluster), next(iter(kinds)) if len(kinds) == 1 else None)
