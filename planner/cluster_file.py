"""Cluster files (TOML), presets, and every text that names devices.

A file::

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

import difflib
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, TypeVar

from shardplan.errors import ClusterFileError, UsageError
from shardplan.planner import units
from shardplan.planner.cluster import FABRICS, FLOP_TYPES, Cluster, Device, DeviceKind, Link, PairLink, Wiring

SCHEMA = 1
_PRESETS = Path(__file__).with_name("presets.toml")
_UNUSED = Link(1e10, 1e-5, source="not used: there is nothing to link")
_GROUP = re.compile(r"^\s*(?:(\d+)\s*[xX*]\s*)?([A-Za-z0-9][\w.\- ]*?)\s*$")
_COUNTED = re.compile(r"^\s*\d+\s*[xX*]\s*[A-Za-z0-9]")
_PER = re.compile(r"^(.*?)\s+per\s+(device|gpu|node)\s*$")
_LOCAL = re.compile(r"^(cpu|cuda)(?::(\d+))?$")

T = TypeVar("T")


class _Table:
    """One TOML table being read; knows its place for error messages and which keys nobody asked for."""

    def __init__(self, data: object, path: str, where: str) -> None:
        self.path, self.where = path, where
        if not isinstance(data, dict):
            raise self.error("", f"is a table, not {data!r}")
        self.data: dict[str, Any] = dict(data)

    def error(self, key: str, problem: str, hints: Sequence[str] = ()) -> ClusterFileError:
        place = ".".join(part for part in (self.path, key) if part) or "file"
        return ClusterFileError(f"{self.where}: {place}: {problem}", hints=hints)

    def has(self, key: str) -> bool:
        return key in self.data

    def take(self, key: str, parse: Callable[[Any], T], default: T | None = None) -> T:
        """The value of a key through `parse`; without a default the key must be there."""
        if key not in self.data:
            if default is None:
                raise self.error(key, "is missing")
            return default
        try:
            return parse(self.data.pop(key))
        except ValueError as error:
            raise self.error(key, str(error)) from None

    def table(self, key: str) -> _Table:
        return _Table(self.data.pop(key, {}), f"{self.path}.{key}" if self.path else key, self.where)

    def tables(self, key: str) -> list[_Table]:
        items = self.data.pop(key, [])
        path = f"{self.path}.{key}" if self.path else key
        if not isinstance(items, list):
            raise self.error(key, f"is a list of tables: write [[{path}]]")
        return [_Table(item, f"{path}[{index}]", self.where) for index, item in enumerate(items)]

    def finish(self, known: Iterable[str]) -> None:
        for key in self.data:
            near = difflib.get_close_matches(key, list(known), n=1)
            raise self.error(key, "unknown key", [f"did you mean {near[0]!r}?"] if near else [])


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
    top = _top(text, where)
    own = {name: _device_kind(name, top_device) for name, top_device in _named(top.table("device"))}
    name = top.take("name", _text, "")
    links = top.table("link")
    between = {
        level: _link(links.table(level), level, own.values()) for level in ("node", "cluster") if links.has(level)
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
        count = table.take("count", _count, 1)
        kinds, wires = _node(table, own, between)
        local = table.take("local", _texts(len(kinds)), [""] * len(kinds))
        own_limits = table.take("memory", _limits(len(kinds)), [None] * len(kinds))
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


def _top(text: str, where: str) -> _Table:
    try:
        top = _Table(tomllib.loads(text), "", where)
    except tomllib.TOMLDecodeError as error:
        raise ClusterFileError(f"{where}: not TOML: {error}") from None
    schema = top.take("schema", _count, 0)
    if schema != SCHEMA:
        found = f"is {schema}" if schema else "is missing"
        raise top.error("schema", f"{found}; this version reads schema = {SCHEMA}")
    return top


def _named(table: _Table) -> list[tuple[str, _Table]]:
    return [(name, table.table(name)) for name in list(table.data)]


def _usual_torch_device(name: str) -> str:
    return "cpu" if name == "cpu" else "cuda"


def _device_kind(name: str, table: _Table) -> DeviceKind:
    torch_device = table.take("torch_device", _one_of("cpu", "cuda"), _usual_torch_device(name))
    flops = {kind: table.take(kind, units.parse_flops_per_s) for kind in FLOP_TYPES if table.has(kind)}
    memory = table.take("memory", units.parse_nbytes)
    bandwidth = table.take("memory_bandwidth", units.parse_bytes_per_s)
    reserve = table.take("reserve", units.parse_share, 0.0)
    source = table.take("source", _text, "")
    table.finish(("torch_device", "memory", "memory_bandwidth", "reserve", "source", *FLOP_TYPES))
    try:
        return DeviceKind(name, torch_device, memory, bandwidth, flops, reserve, source)
    except ValueError as error:
        raise table.error("", str(error)) from None


def _link(table: _Table, level: str, kinds: Iterable[DeviceKind] = ()) -> Link:
    """level: "node", "cluster" or "pair". A bandwidth without "per" is per node for "cluster", else per device."""
    text = table.data.get("bandwidth")
    per = "node" if level == "cluster" else "device"
    if isinstance(text, str) and (found := _PER.match(text)):
        table.data["bandwidth"], per = found[1], "node" if found[2] == "node" else "device"
    bandwidth = table.take("bandwidth", units.parse_bytes_per_s)
    latency = table.take("latency", units.parse_seconds)
    fabric = table.take("kind", _one_of(*FABRICS), _guess_fabric(bandwidth, level, kinds))
    source = table.take("source", _text, "")
    table.finish(("bandwidth", "latency", "kind", "source"))
    try:
        return Link(bandwidth, latency, fabric, per, source)
    except ValueError as error:
        raise table.error("bandwidth", str(error)) from None


def _guess_fabric(bandwidth: float, level: str, kinds: Iterable[DeviceKind]) -> str:
    """Kind of a link that does not say. NVLink begins where PCI Express ends (64 GB/s)."""
    if level == "pair" or any(kind.torch_device == "cpu" for kind in kinds):
        return "plain"
    if level == "node":
        return "nvswitch" if bandwidth > 100e9 else "pcie"
    return "rdma" if bandwidth >= 10e9 else "tcp"


def _node(table: _Table, own: Mapping[str, DeviceKind], links: Mapping[str, Link]) -> tuple[list[DeviceKind], Wiring]:
    """Devices and links of a node: its own, else the file's, else those of the preset."""
    known: Wiring | None = None
    if table.has("preset"):
        if table.has("devices"):
            raise table.error("preset", "gives the devices; drop one of devices and preset")
        kinds, known = table.take("preset", _in_file(_node_preset))
    else:
        kinds = table.take("devices", _in_file(lambda text: _device_list(text, own)))
        first = preset_node_of(kinds[0].name) if kinds[0].name not in own else None
        known = _presets()[1][first][1] if first else None
    link = links.get("node") or (known.link if known else None)
    uplink = links.get("cluster") or (known.uplink if known else None)
    if table.has("link"):
        link = _link(table.table("link"), "node", kinds)
    if table.has("uplink"):
        uplink = _link(table.table("uplink"), "cluster", kinds)
    return kinds, Wiring(link or _UNUSED, uplink or _UNUSED)


def _pair(table: _Table, count: int) -> list[PairLink]:
    ends = table.take("devices", _pair_of(count))
    one_way = table.take("one_way", _bool, False)
    link = _link(table, "pair")
    pairs = [PairLink(ends[0], ends[1], link)]
    return pairs if one_way else [*pairs, PairLink(ends[1], ends[0], link)]


def _in_file(parse: Callable[[str], T]) -> Callable[[object], T]:
    """The parser of a text value whose UsageError becomes part of the file's error."""

    def read_text(value: object) -> T:
        try:
            return parse(_text(value))
        except UsageError as error:
            raise ValueError("; ".join((error.title, *error.hints))) from None

    return read_text


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value


def _bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is not a positive whole number")
    return value


def _one_of(*words: str) -> Callable[[object], str]:
    def read_word(value: object) -> str:
        if value not in words:
            raise ValueError(f"{value!r} is not one of {', '.join(words)}")
        return str(value)

    return read_word


def _texts(count: int) -> Callable[[object], list[str]]:
    def read_list(value: object) -> list[str]:
        items = value if isinstance(value, list) else [value] * count
        if len(items) != count:
            raise ValueError(f"lists {len(items)} of {count} devices")
        return [_text(item) for item in items]

    return read_list


def _limits(count: int) -> Callable[[object], list[int | None]]:
    def read_limits(value: Any) -> list[int | None]:
        items = value if isinstance(value, list) else [value] * count
        if len(items) != count:
            raise ValueError(f"lists {len(items)} of {count} devices")
        return [None if item == "" else units.parse_nbytes(item) for item in items]

    return read_limits


def _pair_of(count: int) -> Callable[[object], tuple[int, int]]:
    def read_pair(value: Any) -> tuple[int, int]:
        ok = isinstance(value, list) and len(value) == 2 and all(type(item) is int for item in value)
        if not ok or not all(0 <= item < count for item in value) or value[0] == value[1]:
            raise ValueError(f"{value!r} is not two different devices of 0 .. {count - 1}")
        return value[0], value[1]

    return read_pair


# -- presets ------------------------------------------------------------------------------------------------------


@cache
def _presets() -> tuple[
    dict[str, DeviceKind], dict[str, tuple[list[DeviceKind], Wiring]], dict[str, str], dict[str, str]
]:
    """Device kinds, nodes, alias -> device kind, device kind -> its usual node."""
    top = _top(_PRESETS.read_text(), _PRESETS.name)
    aliases = {name: str(target) for name, target in top.table("alias").data.items()}
    usual: dict[str, str] = {}
    kinds: dict[str, DeviceKind] = {}
    for name, table in _named(top.table("device")):
        usual[name] = table.take("node", _text)
        kinds[name] = _device_kind(name, table)
    nodes: dict[str, tuple[list[DeviceKind], Wiring]] = {}
    for name, table in _named(top.table("node")):
        members = table.take("devices", lambda text: _device_list(text, kinds))
        links = [_link(table.table(key), level, members) for key, level in (("link", "node"), ("uplink", "cluster"))]
        table.finish(("devices", "link", "uplink"))
        nodes[name] = members, Wiring(*links)
    return kinds, nodes, aliases, usual


def preset_kinds() -> dict[str, DeviceKind]:
    """Shipped device kinds by name."""
    return dict(_presets()[0])


def preset_nodes() -> dict[str, Cluster]:
    """Shipped machines by name, each as a cluster of one node."""
    return {name: node_preset(name, 1) for name in _presets()[1]}


def device_kind(name: str) -> DeviceKind:
    """A shipped device kind by name or alias ("h100", "A100-80GB"). Raises UsageError naming the nearest matches."""
    kinds, nodes, aliases, _ = _presets()
    key = _normal(name)
    key = aliases.get(key, key)
    if key in kinds:
        return kinds[key]
    raise _unknown("device", name, [*kinds, *aliases, *nodes])


def preset_node_of(kind: str) -> str | None:
    """Name of the machine that a shipped device kind usually stands in; None for kinds that are not shipped."""
    return _presets()[3].get(kind)


def node_preset(name: str, nodes: int) -> Cluster:
    """`nodes` machines of a node preset, or of the usual machine of a device preset. Raises UsageError."""
    if nodes < 1:
        raise UsageError(f"a cluster needs at least one node, not {nodes}")
    members, wires = _node_preset(name)
    devices = tuple(Device(kind, node) for node in range(nodes) for kind in members)
    return Cluster(devices, (wires,) * nodes, name=f"{name}:{nodes}" if nodes > 1 else name)


def _node_preset(name: str) -> tuple[list[DeviceKind], Wiring]:
    kinds, nodes, aliases, usual = _presets()
    key = _normal(name)
    key = aliases.get(key, key)
    key = usual.get(key, key)
    if key not in nodes:
        raise _unknown("machine or device", name, [*nodes, *kinds, *aliases])
    return nodes[key]


def _normal(name: str) -> str:
    key = re.sub(r"[\s_]+", "-", name.strip().lower())
    return re.sub(r"(\d+)gi?b\b", r"\1g", key.removeprefix("nvidia-"))


def _unknown(what: str, name: str, known: list[str]) -> UsageError:
    near = difflib.get_close_matches(_normal(name), known, n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}" if near else "`shardplan cluster list` lists what is shipped"
    return UsageError(f"unknown {what} {name!r}", hints=[hint, "other hardware: describe it in a cluster file"])


# -- texts that name devices --------------------------------------------------------------------------------------


def _device_list(text: str, own: Mapping[str, DeviceKind]) -> list[DeviceKind]:
    """``"4 x h100, 4 x a10g"`` -> eight kinds. `own` comes before what is shipped. Raises UsageError."""
    kinds: list[DeviceKind] = []
    for part in re.split(r"[,+]", text):
        found = _GROUP.match(part)
        if not found or found[1] == "0" or (found[1] and int(found[1]) == 0):
            raise UsageError(f"cannot read {part.strip()!r} in devices {text!r}", hints=['write "8 x h100"'])
        kinds += [own.get(found[2]) or device_kind(found[2])] * int(found[1] or 1)
    return kinds


def parse(devices: int | str | os.PathLike[str] | Sequence[str] | Mapping[str, int], per_node: int | None) -> Cluster:
    """See `Cluster.parse`. Raises UsageError."""
    from shardplan.planner.detect import detect, local_cluster

    if isinstance(devices, bool):
        raise UsageError(f"devices={devices!r} says nothing about devices")
    if isinstance(devices, int):
        return detect(devices)
    if isinstance(devices, os.PathLike):
        return load(Path(devices))
    if isinstance(devices, Mapping):
        return _described([(device_kind(name), _positive(count, name)) for name, count in devices.items()], per_node)
    if isinstance(devices, str):
        return _parse_text(devices.strip(), per_node)
    if isinstance(devices, Sequence) and devices:
        names = [str(item) for item in devices]
        if all(_LOCAL.match(name) for name in names):
            return local_cluster(names)
        return _described([(device_kind(name), len(list(run))) for name, run in groupby(names)], per_node)
    raise UsageError(
        f"cannot read devices={devices!r}",
        hints=['write 2, ["cuda:0", "cuda:1"], "8xh100", {"h100": 4, "a10g": 4}, "cluster.toml" or "auto"'],
    )


def _parse_text(text: str, per_node: int | None) -> Cluster:
    from shardplan.planner.detect import cpu_cluster, detect, local_cluster

    if text == "auto":
        return detect(None)
    if text.isdecimal():
        return detect(_positive(int(text), "devices"))
    if text.endswith(".toml") or (os.sep in text and os.path.exists(text)):
        return load(Path(text))
    if found := re.match(r"^(?:cpu\s*[:x]\s*([1-9]\d*)|(\d+)\s*[xX*]\s*cpu)$", text):
        return cpu_cluster(_positive(int(found[1] or found[2]), "cpu"))
    if _LOCAL.match(text):
        return local_cluster([text])
    if _COUNTED.match(text) or "," in text or "+" in text:
        return _described([(kind, len(list(run))) for kind, run in groupby(_device_list(text, {}))], per_node)
    name, _, count = text.partition(":")
    if count and not count.isdecimal():
        raise UsageError(f"cannot read devices {text!r}", hints=['write "dgx-h100:4" for four machines'])
    if not count and _normal(name) not in _presets()[1]:
        return _described([(device_kind(name), 1)], per_node)
    return node_preset(name, _positive(int(count or 1), name))


def _positive(count: object, what: str) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UsageError(f"{what}: {count!r} is not a positive number of devices")
    return count


def _described(groups: Sequence[tuple[DeviceKind, int]], per_node: int | None) -> Cluster:
    """Devices of shipped kinds, each kind in machines of its usual size, the last one possibly not full."""
    devices: list[Device] = []
    wiring: list[Wiring] = []
    if per_node is not None:
        _positive(per_node, "devices_per_node")
    for kind, count in groups:
        members, wires = _presets()[1][_presets()[3][kind.name]]
        size = per_node or len(members)
        for start in range(0, count, size):
            devices += [Device(kind, len(wiring))] * min(size, count - start)
            wiring.append(wires)
    name = "+".join(f"{count}x{kind.name}" for kind, count in groups)
    return Cluster(tuple(devices), tuple(wiring), name=name)


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
    lines = [f'torch_device = "{kind.torch_device}"'] if kind.torch_device != _usual_torch_device(kind.name) else []
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


__all__ = ["device_kind", "link_text", "load", "node_preset", "parse", "preset_kinds", "preset_nodes", "read", "write"]
