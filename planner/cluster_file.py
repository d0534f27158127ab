"""Cluster files: a cluster as TOML, read and written.

::

    schema = 1
    name = "two machines"                  # optional
    [device.h100]                          # not needed for a shipped kind
    memory = "80 GB"
    memory_bandwidth = "3350 GB/s"
    bf16 = "989 TFLOP/s"                   # also fp32, tf32, fp16, fp8
    reserve = "6 %"
    [[node]]
    count = 2                              # so many nodes alike
    devices = "4 x h100, 4 x a10g"         # or preset = "dgx-h100"
    memory = "20 GiB"                      # optional limit of what a plan may use; or a list, "" for the device's own
    [link.node]                            # between devices of a node; a node may have its own: link = { ... }
    bandwidth = "450 GB/s"
    latency = "8 us"
    kind = "nvls"                          # optional, see `planner.cluster.FABRICS`
    [link.cluster]                         # between nodes; a node may have its own: uplink = { ... }
    bandwidth = "50 GB/s per device"       # or "10 Gbit/s", "10 Gbit/s per node": shared by the node's devices
    latency = "15 us"
    [[link.pair]]                          # exceptions
    devices = [0, 3]                       # both ways, unless one_way = true: from the first to the second
    bandwidth = "1 GB/s"
    latency = "1 ms"

Every mistake raises ClusterFileError that names the file and the key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import groupby, pairwise
from pathlib import Path

from shardplan.errors import ClusterFileError
from shardplan.planner import units
from shardplan.planner.cluster import Cluster, Device, DeviceKind, Link, PairLink, Wiring
from shardplan.planner.cluster_tables import (
    SCHEMA,
    Table,
    in_file,
    limits_of,
    named_tables,
    pair_of,
    read_bool,
    read_count,
    read_kind,
    read_link,
    read_text,
    texts_of,
    top_table,
    usual_torch_device,
)
from shardplan.planner.presets import device_list, machine

_UNUSED = Link(1e10, 1e-5, source="not used: there is nothing to link")


# -- reading ------------------------------------------------------------------------------------------------------


def load(path: Path) -> Cluster:
    """Read a cluster file. Raises ClusterFileError."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterFileError(f"cannot read {path}", [str(error)]) from None
    return read(text, str(path))


def read(text: str, where: str) -> Cluster:
    """Cluster of a file's text. Raises ClusterFileError that names `where` and the key."""
    top = top_table(text, where)
    own = {name: read_kind(name, top_device) for name, top_device in named_tables(top.table("device"))}
    name = top.take("name", read_text, "")
    links = top.table("link")
    between = {
        level: read_link(links.table(level), level, own.values()) for level in ("node", "cluster") if links.has(level)
    }
    pairs = links.tables("pair")
    links.finish(("node", "cluster", "pair"))
    nodes = top.tables("node")
    top.finish(("schema", "name", "device", "node", "link"))
    if not nodes:
        raise top.error("node", "is missing: add a [[node]] with devices")
    devices: list[Device] = []
    wiring: list[Wiring] = []
    limits: list[int | None] = []
    for table in nodes:
        count = table.take("count", read_count, 1)
        kinds, wires = _node(table, own, between)
        local = table.take("local", texts_of(len(kinds)), [""] * len(kinds))
        own_limits = table.take("memory", limits_of(kinds), [None] * len(kinds))
        table.finish(("count", "devices", "preset", "link", "uplink", "memory", "local"))
        for _ in range(count):
            devices += [Device(kind, len(wiring), place) for kind, place in zip(kinds, local, strict=True)]
            wiring.append(wires)
            limits += own_limits
    several = {device.node for device, after in pairwise(devices) if device.node == after.node}
    if any(wiring[node].link is _UNUSED for node in several):
        raise top.error("link.node", "is missing: how fast is the link between devices of a node?")
    if len(wiring) > 1 and any(wires.uplink is _UNUSED for wires in wiring):
        raise top.error("link.cluster", "is missing: how fast is the link between nodes?")
    overrides = [pair for table in pairs for pair in _pair(table, len(devices))]
    some = any(limit is not None for limit in limits)
    try:
        return Cluster(tuple(devices), tuple(wiring), tuple(overrides), tuple(limits) if some else (), name)
    except ValueError as error:
        raise ClusterFileError(f"{where}: {error}") from None


def _node(table: Table, own: Mapping[str, DeviceKind], links: Mapping[str, Link]) -> tuple[list[DeviceKind], Wiring]:
    """Devices and links of a node: its own, else the file's, else those of the preset."""
    known: Wiring | None = None
    if table.has("preset"):
        if table.has("devices"):
            raise table.error("preset", "gives the devices; drop one of devices and preset")
        found = table.take("preset", in_file(machine))
        kinds, known = list(found.devices), found.wiring
    else:
        kinds = table.take("devices", in_file(lambda text: device_list(text, own)))
        if kinds[0].name not in own:
            known = machine(kinds[0].name).wiring
    link = links.get("node") or (known.link if known else None)
    uplink = links.get("cluster") or (known.uplink if known else None)
    if table.has("link"):
        link = read_link(table.table("link"), "node", kinds)
    if table.has("uplink"):
        uplink = read_link(table.table("uplink"), "cluster", kinds)
    return kinds, Wiring(link or _UNUSED, uplink or _UNUSED)


def _pair(table: Table, count: int) -> list[PairLink]:
    ends = table.take("devices", pair_of(count))
    one_way = table.take("one_way", read_bool, False)
    link = read_link(table, "pair")
    pairs = [PairLink(ends[0], ends[1], link)]
    return pairs if one_way else [*pairs, PairLink(ends[1], ends[0], link)]


# -- writing ------------------------------------------------------------------------------------------------------


def link_text(link: Link, default_per: str) -> str:
    """Bandwidth as in a file; "per device" or "per node" is added where it is not `default_per`."""
    text = units.format_bytes_per_s(link.bytes_per_s)
    return text if link.per == default_per else f"{text} per {link.per}"


def write(cluster: Cluster) -> str:
    """Text of the cluster file that reads back to an equal cluster."""
    lines = [f"schema = {SCHEMA}"]
    if cluster.name:
        lines.append(f"name = {_quote(cluster.name)}")
    for kind in cluster.kinds():
        lines += ["", f"[device.{_key(kind.name)}]", *_kind_lines(kind)]
    same_link = len({wires.link for wires in cluster.wiring}) == 1
    same_uplink = len({wires.uplink for wires in cluster.wiring}) == 1
    bodies = [_node_lines(cluster, index, same_link, same_uplink) for index in range(len(cluster.nodes))]
    for body, run in groupby(bodies):
        count = len(list(run))
        lines += ["", "[[node]]", *([f"count = {count}"] if count > 1 else []), *body]
    for level, link, same in (
        ("node", cluster.wiring[0].link, same_link),
        ("cluster", cluster.wiring[0].uplink, same_uplink),
    ):
        if same:
            lines += ["", f"[link.{level}]", *_link_lines(link)]
    for pair in cluster.overrides:
        ends = f"devices = [{pair.source}, {pair.target}]"
        lines += ["", "[[link.pair]]", ends, "one_way = true", *_link_lines(pair.link)]
    return "\n".join(lines) + "\n"


def _kind_lines(kind: DeviceKind) -> list[str]:
    lines = [f'torch_device = "{kind.torch_device}"'] if kind.torch_device != usual_torch_device(kind.name) else []
    lines.append(f'memory = "{units.format_nbytes(kind.memory_nbytes)}"')
    lines.append(f'memory_bandwidth = "{units.format_bytes_per_s(kind.memory_bytes_per_s)}"')
    lines += [f'{name} = "{units.format_flops_per_s(speed)}"' for name, speed in kind.flops.items()]
    if kind.reserve:
        lines.append(f'reserve = "{units.format_share(kind.reserve)}"')
    return lines + ([f"source = {_quote(kind.source)}"] if kind.source else [])


def _link_lines(link: Link) -> list[str]:
    lines = [f'bandwidth = "{link_text(link, "")}"', f'latency = "{units.format_seconds(link.latency_seconds)}"']
    lines.append(f'kind = "{link.fabric}"')
    return lines + ([f"source = {_quote(link.source)}"] if link.source else [])


def _node_lines(cluster: Cluster, node: int, same_link: bool, same_uplink: bool) -> list[str]:
    members = cluster.nodes[node]
    devices = [cluster.devices[index] for index in members]
    runs = [(name, len(list(run))) for name, run in groupby(device.kind.name for device in devices)]
    lines = [f"devices = {_quote(', '.join(f'{count} x {name}' for name, count in runs))}"]
    limits = [cluster.limits[index] for index in members] if cluster.limits else []
    if any(limit is not None for limit in limits):
        texts = ["" if limit is None else units.format_nbytes(limit) for limit in limits]
        same = len(set(texts)) == 1
        lines.append(f"memory = {_quote(texts[0]) if same else '[' + ', '.join(map(_quote, texts)) + ']'}")
    if any(device.local for device in devices):
        lines.append(f"local = [{', '.join(_quote(device.local) for device in devices)}]")
    if not same_link:
        lines.append(f"link = {{ {', '.join(_link_lines(cluster.wiring[node].link))} }}")
    if not same_uplink:
        lines.append(f"uplink = {{ {', '.join(_link_lines(cluster.wiring[node].uplink))} }}")
    return lines


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if re.match(r"^[A-Za-z0-9_-]+$", name) else _quote(name)


__all__ = ["link_text", "load", "read", "write"]
