"""The devices of this machine. Looks at torch only when asked; imports nothing else that takes long."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from shardplan.errors import UsageError
from shardplan.planner import presets
from shardplan.planner.cluster import ASSUMED, Cluster, Device, DeviceKind, Link, Wiring
from shardplan.planner.nvml import GpuLinks, gpu_links

_LOOPBACK = Link(2e9, 60e-6, "plain", source="assumed for gloo on one machine; measured before planning where it runs")
_BETWEEN = Link(1.25e9, 60e-6, "plain", "node", source="assumed: 10 Gbit/s Ethernet")
_CORE_FLOPS = 32e9
_CORE_MEMORY_BYTES_PER_S = 8e9
_CPU_SOURCE = "memory: free on this machine; speeds: typical of one server core, measured where profiling runs"


def detect(count: int | None) -> Cluster:
    """`count` devices of this machine: GPUs where there are enough, else CPU ranks. See `Cluster.detect`."""
    if count is not None and count < 1:
        raise UsageError(f"a cluster needs at least one device, not {count}")
    gpus = _gpu_count()
    world = os.environ.get("WORLD_SIZE", "")
    world_size = int(world) if world.isdecimal() else 0
    if world_size and count in (None, world_size):
        return _under_torchrun(world_size, gpus)
    if gpus and count is not None and count > gpus:
        raise UsageError(f"{count} devices asked for, {gpus} GPUs are here", hints=[f'CPU ranks: ["cpu"] * {count}'])
    if gpus:
        return local_cluster([f"cuda:{index}" for index in range(count or gpus)])
    return cpu_cluster(count or _core_count())


def _core_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _under_torchrun(world: int, gpus: int) -> Cluster:
    """As many devices as there are processes; each node has as many as this one."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    per_node = int(local) if local.isdecimal() and int(local) > 0 else world
    if world % per_node:
        per_node = world
    names = [f"cuda:{index}" if gpus >= per_node else "cpu" for index in range(per_node)]
    node = local_cluster(names)
    return Cluster(
        tuple(Device(device.kind, n, device.local) for n in range(world // per_node) for device in node.devices),
        node.wiring * (world // per_node),
        name=node.name,
    )


def cpu_cluster(count: int, memory_nbytes: int | None = None) -> Cluster:
    """`count` CPU ranks of this machine. memory_nbytes: of each rank; default: an equal part of what is free."""
    if count < 1:
        raise UsageError(f"a cluster needs at least one device, not {count}")
    kind = _cpu_kind(memory_nbytes or max(_free_memory_nbytes() // count, 1 << 20))
    devices = tuple(Device(kind, 0, "cpu") for _ in range(count))
    return Cluster(devices, (Wiring(_LOOPBACK, _BETWEEN),), name=f"{count} x cpu")


def local_cluster(names: Sequence[str]) -> Cluster:
    """The named torch devices of this machine ("cpu", "cuda", "cuda:1"), in order. Raises UsageError where one is
    not there or a GPU is named twice."""
    cpus = sum(name.startswith("cpu") for name in names)
    cpu = _cpu_kind(max(_free_memory_nbytes() // cpus, 1 << 20)) if cpus else None
    devices: list[Device] = []
    for position, name in enumerate(names):
        if cpu is not None and name.startswith("cpu"):
            devices.append(Device(cpu, 0, "cpu"))
            continue
        index = int(name.partition(":")[2] or position)
        if any(device.local == f"cuda:{index}" for device in devices):
            raise UsageError(f"device cuda:{index} is named twice")
        devices.append(Device(_gpu_kind(index), 0, f"cuda:{index}"))
    gpus = [device.kind for device in devices if device.kind.torch_device == "cuda"]
    first = next((int(device.local[5:]) for device in devices if device.local.startswith("cuda:")), 0)
    wires = _gpu_wiring(gpus[0], _gpu_links(first)) if gpus and not cpus else Wiring(_LOOPBACK, _BETWEEN)
    return Cluster(tuple(devices), (wires,), name=", ".join(dict.fromkeys(names)))


def _cpu_kind(memory_nbytes: int) -> DeviceKind:
    source = f"{_processor()}; {_CPU_SOURCE}"
    return DeviceKind("cpu", "cpu", memory_nbytes, _CORE_MEMORY_BYTES_PER_S, {"fp32": _CORE_FLOPS}, 0.1, source)


@cache
def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _free_memory_nbytes() -> int:
    """Memory that new processes can take here, rounded down to 1/32 of all there is: two calls on a quiet machine give
    the same plan."""
    total = available = 4 << 30
    try:
        facts = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
        total, available = int(facts["MemTotal"]) * 1024, int(facts["MemAvailable"]) * 1024
    except (OSError, KeyError):
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            available = total // 2
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            most = int(Path(limit).read_text())
            available = min(available, max(most - int(Path(used).read_text()), most // 32))
            total = min(total, most)
        except (OSError, ValueError):
            continue
    step = max(total // 32, 1)
    return max(available // step * step, step)


@cache
def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@cache
def _gpu_kind(index: int) -> DeviceKind:
    """What torch says about a GPU, completed by the shipped preset with its name. Raises UsageError."""
    count = _gpu_count()
    if index >= count:
        raise UsageError(f"there is no device cuda:{index} here ({count or 'no'} GPUs)")
    import torch

    facts = torch.cuda.get_device_properties(index)
    known = _preset_of(facts.name, facts.total_memory)
    if known is not None:
        source = f"memory: torch.cuda; {known.source}"
        speeds, bandwidth, name = known.flops, known.memory_bytes_per_s, known.name
    else:
        # Peaks from what every GPU reports: two operations per core and cycle; 128 fp32 cores a multiprocessor since
        # 2016. Profiling replaces them.
        clock = getattr(facts, "clock_rate", 0) * 1e3 or 1.5e9
        fp32 = facts.multi_processor_count * 128 * 2 * clock
        speeds, name = {"fp32": fp32, "fp16": 4 * fp32}, re.sub(r"[^\w.\- ]+", "-", facts.name).strip(" -")
        bandwidth = (
            getattr(facts, "memory_clock_rate", 0) * 1e3 * 2 * getattr(facts, "memory_bus_width", 0) / 8 or 300e9
        )
        source = "torch.cuda; speeds estimated from its clock and cores"
    return DeviceKind(name, "cuda", facts.total_memory, bandwidth, speeds, 0.06, source)


@cache
def _gpu_links(index: int) -> GpuLinks | None:
    """What the driver says about a GPU's links, None where it says nothing."""
    if index >= _gpu_count():
        return None
    import torch

    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return gpu_links(str(uuid)) if uuid is not None else None


def _preset_of(name: str, memory_nbytes: int) -> DeviceKind | None:
    """The shipped kind for a driver's device name such as "NVIDIA H100 80GB HBM3": most words in common, and within
    5 % of its memory."""
    words = set(re.split(r"[\s\-]+", name.lower()))
    best: tuple[int, str] | None = None
    for kind in presets.preset_kinds().values():
        family, *rest = kind.name.split("-")
        found = family in words or (family.startswith("rtx") and {"rtx", family[3:]} <= words)
        if not found or abs(kind.memory_nbytes - memory_nbytes) > 0.05 * kind.memory_nbytes:
            continue
        score = sum(part in words for part in rest) - sum(part not in words for part in rest if part == "pcie")
        if best is None or (score, kind.name) > best:
            best = score, kind.name
    return presets.preset_kinds()[best[1]] if best else None


def _assumed(link: Link, machine: str) -> Link:
    return replace(link, source=f"{ASSUMED} as in {machine}: {link.source}")


def _gpu_wiring(kind: DeviceKind, seen: GpuLinks | None) -> Wiring:
    """Links of the machine that such GPUs usually stand in; PCI Express where the kind is not shipped, or where its
    machine has NVLink and the driver sees none. seen: what the driver says."""
    pcie = Link(16e9, 15e-6, "pcie", source="assumed: PCI Express 3.0 x16")
    if seen is not None and seen.pcie_bytes_per_s:
        slot = f"PCI Express {seen.pcie_generation}.0 x{seen.pcie_lanes}"
        pcie = Link(seen.pcie_bytes_per_s, 17e-6, "pcie", source=f"{ASSUMED} of {slot}, which the driver reports")
    usual = presets.preset_node_of(kind.name)
    if not usual:
        return Wiring(pcie, Link(1.25e9, 50e-6, "tcp", "node", source="assumed: 10 Gbit/s Ethernet"))
    wires = presets.node_preset(usual, 1).wiring[0]
    bare = seen is not None and seen.nvlinks == 0 and wires.link.fabric != "pcie"
    return Wiring(pcie if bare else _assumed(wires.link, usual), _assumed(wires.uplink, usual))
