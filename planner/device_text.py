"""What ``devices=`` and ``--devices`` take: counts, torch devices, names of hardware, files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from shardplan.errors import UsageError
from shardplan.planner.cluster import Cluster, Device, DeviceKind, Wiring
from shardplan.planner.cluster_file import load
from shardplan.planner.detect import cpu_cluster, detect, local_cluster
from shardplan.planner.presets import device_kind, device_list, machine, node_preset, normal, shipped

_COUNTED = re.compile(r"^\s*\d+\s*[xX*]\s*[A-Za-z0-9]")
_LOCAL = re.compile(r"^(cpu|cuda)(?::(\d+))?$")


def parse(devices: int | str | os.PathLike[str] | Sequence[str] | Mapping[str, int], per_node: int | None) -> Cluster:
    """See `Cluster.parse`. Raises UsageError."""
    if isinstance(devices, bool):
        raise UsageError(f"devices={devices!r} says nothing about devices")
    if isinstance(devices, int):
        return detect(devices)
    if isinstance(devices, os.PathLike):
        return load(Path(devices))
    if isinstance(devices, Mapping):
        counts = devices.items()
        return _described([(device_kind(name), _positive(count, name)) for name, count in counts], per_node)
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
        return _described([(kind, len(list(run))) for kind, run in groupby(device_list(text, {}))], per_node)
    name, _, count = text.partition(":")
    if count and not count.isdecimal():
        raise UsageError(f"cannot read devices {text!r}", hints=['write "dgx-h100:4" for four machines'])
    if not count and normal(name) not in shipped().machines:
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
        usual = machine(kind.name)
        size = per_node or len(usual.devices)
        for start in range(0, count, size):
            devices += [Device(kind, len(wiring))] * min(size, count - start)
            wiring.append(usual.wiring)
    name = "+".join(f"{count}x{kind.name}" for kind, count in groups)
    return Cluster(tuple(devices), tuple(wiring), name=name)
