"""What there is to run on: devices, how much they hold and how fast they are, and the links between them.

A cluster is plain data. It is detected on this machine, built from presets, or read from a TOML file; it prints as a
TOML file that reads back to an equal cluster (`planner.cluster_file`). Devices are numbered like ranks: device i is
rank i, the devices of a node are consecutive.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardplan.errors import UsageError
from shardplan.planner.units import format_nbytes, parse_nbytes

if TYPE_CHECKING:
    from typing import TypeAlias

    DevicesLike: TypeAlias = int | str | os.PathLike[str] | Sequence[str] | Mapping[str, int] | "Cluster"

FABRICS = ("plain", "nvls", "nvswitch", "nvlink", "pcie", "rdma", "tcp")
"""Kinds of link. Each has efficiency constants in `planner.costs.links`; "plain" has none: the numbers of the
description are taken as what collectives reach. "nvls": NVSwitch that reduces in the switch; "nvswitch": every pair at
full speed; "nvlink": direct links between some pairs (DGX-1)."""

ASSUMED = "assumed"
"""What the source of a link begins with where nobody described or measured it."""

FLOP_TYPES = ("fp32", "tf32", "bf16", "fp16", "fp8")
_NAME = re.compile(r"^[A-Za-z0-9](?:[\w.\- ]*[\w.\-])?$")
_TORCH_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float8": "fp8", "float64": "fp32"}
_FALLBACK = {"tf32": "fp32", "bf16": "fp16", "fp16": "bf16", "fp8": "bf16"}


@dataclass(frozen=True, slots=True)
class DeviceKind:
    """One model of device.

    torch_device: "cpu" or "cuda". memory_nbytes: what the device has; reserve: share of it that a plan must leave
    alone (driver context, fragmentation). memory_bytes_per_s: peak of device memory. flops: dense peak operations per
    second by type ("fp32", "tf32", "bf16", "fp16", "fp8"); types that the device lacks are missing.
    source: where the numbers come from.
    """

    name: str
    torch_device: str
    memory_nbytes: int
    memory_bytes_per_s: float
    flops: dict[str, float] = field(hash=False)
    reserve: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise ValueError(f"a device cannot be called {self.name!r}")
        if self.torch_device not in ("cpu", "cuda"):
            raise ValueError(f'{self.name}: torch_device is "cpu" or "cuda", not {self.torch_device!r}')
        if self.memory_nbytes <= 0 or not self.memory_bytes_per_s > 0:
            raise ValueError(f"{self.name}: memory and memory_bandwidth must be positive")
        if not self.flops or any(not speed > 0 for speed in self.flops.values()):
            raise ValueError(f"{self.name}: needs at least one positive speed of {', '.join(FLOP_TYPES)}")
        if unknown := sorted(set(self.flops) - set(FLOP_TYPES)):
            raise ValueError(f"{self.name}: unknown number types {unknown}")
        if not 0 <= self.reserve < 1:
            raise ValueError(f"{self.name}: reserve must be in [0, 1), not {self.reserve}")
        object.__setattr__(self, "flops", {name: self.flops[name] for name in FLOP_TYPES if name in self.flops})

    def peak_flops(self, dtype: object) -> float:
        """Dense peak operations per second for a torch dtype or a name such as "bf16" or "float32".

        A type the device lacks runs at the speed of the nearest one it has (bf16 <-> fp16, tf32 -> fp32), else at the
        slowest.
        """
        name = str(dtype).removeprefix("torch.")
        name = "fp8" if name.startswith("float8") else _TORCH_TYPES.get(name, name)
        for candidate in (name, _FALLBACK.get(name, "fp32"), "fp32"):
            if candidate in self.flops:
                return self.flops[candidate]
        return min(self.flops.values())


@dataclass(frozen=True, slots=True)
class Device:
    """A device in a cluster. node: index of its machine; local: its torch device on this machine ("cuda:1", "cpu"),
    empty where the device is only described."""

    kind: DeviceKind
    node: int
    local: str = ""


@dataclass(frozen=True, slots=True)
class Link:
    """A link in one direction. bytes_per_s: peak; latency_seconds: time of the smallest message.

    per: "device" (every device has its own) or "node" (all devices of the node share it).
    fabric: one of `FABRICS`.
    """

    bytes_per_s: float
    latency_seconds: float
    fabric: str = "plain"
    per: str = "device"
    source: str = ""

    def __post_init__(self) -> None:
        if not (self.bytes_per_s > 0 and math.isfinite(self.bytes_per_s)):
            raise ValueError(f"bandwidth must be positive, not {self.bytes_per_s}")
        if not (self.latency_seconds >= 0 and math.isfinite(self.latency_seconds)):
            raise ValueError(f"latency must not be negative, not {self.latency_seconds}")
        if self.fabric not in FABRICS:
            raise ValueError(f"unknown kind of link {self.fabric!r}; known: {', '.join(FABRICS)}")
        if self.per not in ("device", "node"):
            raise ValueError(f'a link is per "device" or per "node", not {self.per!r}')

    def slower(self, factor: float) -> Link:
        """The same link with every message taking `factor` times as long."""
        return replace(
            self,
            bytes_per_s=self.bytes_per_s / factor,
            latency_seconds=self.latency_seconds * factor,
            source=f"{factor:g} times slower than {self.source or 'described'}",
        )


@dataclass(frozen=True, slots=True)
class Wiring:
    """Links of one node. link: between two of its devices; uplink: from its devices towards other nodes."""

    link: Link
    uplink: Link


@dataclass(frozen=True, slots=True)
class PairLink:
    """A link from device `source` to device `target` that differs from what the wiring says (one direction)."""

    source: int
    target: int
    link: Link


@dataclass(frozen=True, slots=True)
class Cluster:
    """Devices and links. See module docstring.

    wiring[n]: links of node n. overrides: exceptions for single ordered pairs. limits: per device the most bytes a
    plan may use where the user said so, None for the device's own (memory less reserve); () means none is set.
    name: for people. Raises ValueError where the parts contradict each other.
    """

    devices: tuple[Device, ...]
    wiring: tuple[Wiring, ...]
    overrides: tuple[PairLink, ...] = ()
    limits: tuple[int | None, ...] = ()
    name: str = ""
    nodes: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False, hash=False)
    _pairs: dict[tuple[int, int], Link] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        if not self.devices:
            raise ValueError("a cluster needs at least one device")
        nodes: list[list[int]] = []
        for index, device in enumerate(self.devices):
            if device.node == len(nodes):
                nodes.append([])
            elif device.node != len(nodes) - 1:
                raise ValueError("devices of a node must be consecutive and nodes numbered 0, 1, ...")
            nodes[-1].append(index)
        kinds: dict[str, DeviceKind] = {}
        for kind in {id(device.kind): device.kind for device in self.devices}.values():
            if kinds.setdefault(kind.name, kind) != kind:
                raise ValueError(f"two different kinds of device are called {kind.name!r}")
        if len(nodes) != len(self.wiring):
            raise ValueError(f"{len(nodes)} nodes but links of {len(self.wiring)}")
        if self.limits and len(self.limits) != len(self.devices):
            raise ValueError(f"{len(self.limits)} memory limits for {len(self.devices)} devices")
        if any(limit is not None and limit <= 0 for limit in self.limits):
            raise ValueError("memory limits must be positive")
        pairs: dict[tuple[int, int], Link] = {}
        for pair in self.overrides:
            if pair.source == pair.target or not all(0 <= d < len(self.devices) for d in (pair.source, pair.target)):
                raise ValueError(f"no link from device {pair.source} to device {pair.target}")
            if (pair.source, pair.target) in pairs:
                raise ValueError(f"two links from device {pair.source} to device {pair.target}")
            pairs[pair.source, pair.target] = pair.link
        object.__setattr__(self, "nodes", tuple(map(tuple, nodes)))
        object.__setattr__(self, "_pairs", pairs)

    def __len__(self) -> int:
        return len(self.devices)

    # -- where it comes from --------------------------------------------------------------------------------------

    @staticmethod
    def detect(count: int | None = None) -> Cluster:
        """The devices of this machine: `count` of them, or all GPUs, or without any one rank per CPU core.

        Under torchrun the default count is the world size. Raises UsageError where there are no `count` devices.
        """
        from shardplan.planner.detect import detect

        return detect(count)

    @staticmethod
    def cpu(count: int, memory: int | str | None = None) -> Cluster:
        """`count` CPU ranks on this machine, each with `memory` bytes (default: an equal part of what is free)."""
        from shardplan.planner.detect import cpu_cluster

        return cpu_cluster(count, None if memory is None else _nbytes(memory))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Cluster:
        """Read a TOML cluster file. Raises ClusterFileError naming file and key."""
        from shardplan.planner.cluster_file import load

        return load(Path(path))

    @staticmethod
    def from_toml(text: str, where: str = "cluster") -> Cluster:
        """Inverse of `to_toml`. Raises ClusterFileError naming `where` and the key."""
        from shardplan.planner.cluster_file import read

        return read(text, where)

    @staticmethod
    def preset(name: str, nodes: int = 1) -> Cluster:
        """`nodes` machines of a shipped node preset ("dgx-h100", "p4d", ...) or one node full of a device preset
        ("h100"). Raises UsageError naming the nearest matches."""
        from shardplan.planner.presets import node_preset

        return node_preset(name, nodes)

    @staticmethod
    def parse(devices: DevicesLike, devices_per_node: int | None = None) -> Cluster:
        """Everything that ``devices=`` takes: a count, torch devices, ``"8xh100"``, ``{"h100": 4}``, ``"dgx-h100:4"``,
        a TOML path, ``"auto"``, or a cluster. devices_per_node: for described devices, how many a node holds (default:
        as its preset). Raises UsageError."""
        if isinstance(devices, Cluster):
            return devices
        from shardplan.planner.device_text import parse

        return parse(devices, devices_per_node)

    # -- what it says ---------------------------------------------------------------------------------------------

    def memory_limit(self, device: int) -> int:
        """Bytes that a plan may use on device number `device`."""
        if self.limits and (limit := self.limits[device]) is not None:
            return limit
        kind = self.devices[device].kind
        return int(kind.memory_nbytes * (1 - kind.reserve))

    def link(self, source: int, target: int) -> Link:
        """The link from one device to another when nothing else uses it. Between nodes: the slower of both uplinks."""
        if override := self._pairs.get((source, target)):
            return override
        a, b = self.devices[source].node, self.devices[target].node
        if a == b:
            return self.wiring[a].link
        return slower_of(self.wiring[a].uplink, self.wiring[b].uplink)

    def has_overrides(self) -> bool:
        """Whether single pairs of devices have links of their own."""
        return bool(self._pairs)

    def kinds(self) -> dict[DeviceKind, int]:
        """Device kinds and how many there are of each, in order of appearance."""
        return dict(Counter(device.kind for device in self.devices))

    @property
    def is_local(self) -> bool:
        """Whether every device is on this machine."""
        return all(device.local for device in self.devices)

    @property
    def links_assumed(self) -> bool:
        """Whether the links are what detection assumes, so that measured times should replace them; false where they
        were described (a file, `with_links`, `slower_links`): a description is meant."""
        used = [wires.link for wires, node in zip(self.wiring, self.nodes, strict=True) if len(node) > 1]
        used += [wires.uplink for wires in self.wiring if len(self.nodes) > 1]
        return not self.overrides and all(link.source.startswith(ASSUMED) for link in used)

    # -- variations -----------------------------------------------------------------------------------------------

    def with_memory(self, limit: int | str | Sequence[int | str | None] | None) -> Cluster:
        """The same cluster with a memory limit: one for every device ("20 GiB"), or a list with one per device in
        which None means the device's own. Raises UsageError where a limit makes no sense or is more than a GPU has."""
        if limit is None or isinstance(limit, (int, str)):
            limits = [None if limit is None else _nbytes(limit)] * len(self.devices)
        else:
            limits = [None if item is None else _nbytes(item) for item in limit]
        if len(limits) != len(self.devices):
            raise UsageError(f"{len(limits)} memory limits for {len(self.devices)} devices")
        for index, (device, nbytes) in enumerate(zip(self.devices, limits, strict=True)):
            if nbytes is not None and device.kind.torch_device == "cuda" and nbytes > device.kind.memory_nbytes:
                raise UsageError(
                    f"memory limit {format_nbytes(nbytes)} of device {index} is more than "
                    f"{device.kind.name} has ({format_nbytes(device.kind.memory_nbytes)})"
                )
        return replace(self, limits=() if all(item is None for item in limits) else tuple(limits))

    def with_links(self, node: Link | None = None, cluster: Link | None = None) -> Cluster:
        """The same devices with these links in every node (`node`) and between nodes (`cluster`); None keeps what
        there is. Overrides of single pairs are dropped."""
        wiring = tuple(Wiring(node or wires.link, cluster or wires.uplink) for wires in self.wiring)
        return replace(self, wiring=wiring, overrides=())

    def slower_links(self, factor: float) -> Cluster:
        """The same cluster with every message taking `factor` times as long (bandwidths divided, latencies
        multiplied)."""
        if not factor > 0:
            raise UsageError(f"links cannot be {factor} times slower")
        wiring = tuple(Wiring(wires.link.slower(factor), wires.uplink.slower(factor)) for wires in self.wiring)
        overrides = tuple(replace(pair, link=pair.link.slower(factor)) for pair in self.overrides)
        return replace(self, wiring=wiring, overrides=overrides)

    def first(self, count: int) -> Cluster:
        """The first `count` devices with their links."""
        if not 1 <= count <= len(self.devices):
            raise UsageError(f"cannot take {count} of {len(self.devices)} devices")
        devices = self.devices[:count]
        return replace(
            self,
            devices=devices,
            wiring=self.wiring[: devices[-1].node + 1],
            overrides=tuple(pair for pair in self.overrides if max(pair.source, pair.target) < count),
            limits=self.limits[:count],
            name=self.name and f"first {count} of {self.name}",
        )

    # -- text -----------------------------------------------------------------------------------------------------

    def to_toml(self) -> str:
        """The cluster file that reads back to an equal cluster."""
        from shardplan.planner.cluster_file import write

        return write(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cluster file; it is whole or untouched."""
        from shardplan.planner.plan import write_atomically

        write_atomically(Path(path), self.to_toml().encode())

    def summary(self) -> str:
        """One line: ``16 x h100 in 2 nodes, 450 GB/s in a node, 50 GB/s per device between nodes``."""
        from shardplan.planner.cluster_file import link_text

        parts = [f"{count} x {kind.name}" for kind, count in self.kinds().items()]
        text = " + ".join(parts) + (f" in {len(self.nodes)} nodes" if len(self.nodes) > 1 else "")
        if any(len(node) > 1 for node in self.nodes):
            links = list(dict.fromkeys(link_text(wires.link, "device") for wires in self.wiring))
            text += f", {' | '.join(links)} in a node"
        if len(self.nodes) > 1:
            links = list(dict.fromkeys(link_text(wires.uplink, "") for wires in self.wiring))
            text += f", {' | '.join(links)} between nodes"
        return text

    def __str__(self) -> str:
        return self.summary()


def slower_of(a: Link, b: Link) -> Link:
    """What two links in a row give: the smaller bandwidth (with its fabric) and the larger latency."""
    slower = min(a, b, key=lambda link: (link.bytes_per_s, link.per, link.fabric))
    latency = max(a.latency_seconds, b.latency_seconds)
    return slower if latency == slower.latency_seconds else replace(slower, latency_seconds=latency)


def _nbytes(value: int | str) -> int:
    try:
        nbytes = parse_nbytes(value)
    except ValueError as error:
        raise UsageError(f"memory limit: {error}", hints=['write for example "20 GiB" or 21474836480']) from None
    if nbytes == 0:
        raise UsageError("a memory limit of 0 bytes leaves room for nothing")
    return nbytes


__all__ = [
    "Cluster",
    "Device",
    "DeviceKind",
    "FABRICS",
    "FLOP_TYPES",
    "Link",
    "PairLink",
    "Wiring",
    "parse_nbytes",
    "slower_of",
]
