"""Shipped device kinds and machines (presets.toml), by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from shardplan.errors import UsageError
from shardplan.planner.cluster import Cluster, Device, DeviceKind, Wiring
from shardplan.planner.cluster_tables import named_tables, read_kind, read_link, read_text, top_table

_PATH = Path(__file__).with_name("presets.toml")
_GROUP = re.compile(r"^\s*(?:(\d+)\s*[xX*]\s*)?([A-Za-z0-9][\w.\- ]*?)\s*$")


@dataclass(frozen=True, slots=True)
class Machine:
    """One node: its devices in order and its links."""

    devices: tuple[DeviceKind, ...]
    wiring: Wiring


@dataclass(frozen=True, slots=True)
class Shipped:
    """The presets. aliases: other names of kinds and machines; usual: device kind -> name of the machine it is assumed
    to be in."""

    kinds: dict[str, DeviceKind]
    machines: dict[str, Machine]
    aliases: dict[str, str]
    usual: dict[str, str]


@cache
def shipped() -> Shipped:
    """What the package ships, read once."""
    top = top_table(_PATH.read_text(), _PATH.name)
    aliases = {name: str(target) for name, target in top.table("alias").data.items()}
    usual: dict[str, str] = {}
    kinds: dict[str, DeviceKind] = {}
    for name, table in named_tables(top.table("device")):
        usual[name] = table.take("node", read_text)
        kinds[name] = read_kind(name, table)
    machines: dict[str, Machine] = {}
    for name, table in named_tables(top.table("node")):
        members = table.take("devices", lambda text: device_list(text, kinds))
        links = [
            read_link(table.table(key), level, members) for key, level in (("link", "node"), ("uplink", "cluster"))
        ]
        table.finish(("devices", "link", "uplink"))
        machines[name] = Machine(tuple(members), Wiring(*links))
    return Shipped(kinds, machines, aliases, usual)


def preset_kinds() -> dict[str, DeviceKind]:
    """Shipped device kinds by name."""
    return dict(shipped().kinds)


def preset_nodes() -> dict[str, Cluster]:
    """Shipped machines by name, each as a cluster of one node."""
    return {name: node_preset(name, 1) for name in shipped().machines}


def device_kind(name: str) -> DeviceKind:
    """A shipped device kind by name or alias ("h100", "A100-80GB"). Raises UsageError naming the nearest matches."""
    known = shipped()
    key = normal(name)
    key = known.aliases.get(key, key)
    if key in known.kinds:
        return known.kinds[key]
    raise unknown("device", name)


def preset_node_of(kind: str) -> str | None:
    """Name of the machine that a shipped device kind usually stands in; None for kinds that are not shipped."""
    return shipped().usual.get(kind)


def node_preset(name: str, nodes: int) -> Cluster:
    """`nodes` machines of a node preset, or of the usual machine of a device preset. Raises UsageError."""
    if nodes < 1:
        raise UsageError(f"a cluster needs at least one node, not {nodes}")
    found = machine(name)
    devices = tuple(Device(kind, node) for node in range(nodes) for kind in found.devices)
    return Cluster(devices, (found.wiring,) * nodes, name=f"{name}:{nodes}" if nodes > 1 else name)


def machine(name: str) -> Machine:
    """A shipped machine by its name or by that of a device kind it is usual for. Raises UsageError."""
    known = shipped()
    key = normal(name)
    key = known.aliases.get(key, key)
    key = known.usual.get(key, key)
    if key not in known.machines:
        raise unknown("machine or device", name)
    return known.machines[key]


def normal(name: str) -> str:
    """A name as the presets spell it: "NVIDIA A100_80GB" -> "a100-80g"."""
    key = re.sub(r"[\s_]+", "-", name.strip().lower())
    return re.sub(r"(\d+)gi?b\b", r"\1g", key.removeprefix("nvidia-"))


def unknown(what: str, name: str) -> UsageError:
    """The error for a name that is not shipped; hints name the nearest."""
    known = shipped()
    names = [*known.kinds, *known.machines, *known.aliases]
    near = difflib.get_close_matches(normal(name), names, n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}" if near else "`shardplan cluster list` lists what is shipped"
    return UsageError(f"unknown {what} {name!r}", hints=[hint, "other hardware: describe it in a cluster file"])


def device_list(text: str, own: Mapping[str, DeviceKind]) -> list[DeviceKind]:
    """``"4 x h100, 4 x a10g"`` -> eight kinds. `own` comes before what is shipped. Raises UsageError."""
    kinds: list[DeviceKind] = []
    for part in re.split(r"[,+]", text):
        found = _GROUP.match(part)
        if not found or (found[1] and int(found[1]) == 0):
            raise UsageError(f"cannot read {part.strip()!r} in devices {text!r}", hints=['write "8 x h100"'])
        kinds += [own.get(found[2]) or device_kind(found[2])] * int(found[1] or 1)
    return kinds
