"""What is found on this machine: devices, their links, and which preset a driver's name stands for."""

from __future__ import annotations

import ctypes
import os

import pytest

from shardplan.errors import UsageError
from shardplan.planner import detect, nvml
from shardplan.planner.cluster import Cluster
from shardplan.planner.presets import device_kind


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


def test_counts_are_local_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "_gpu_count", lambda: 0)
    two = Cluster.parse(2)
    assert [device.local for device in two.devices] == ["cpu", "cpu"] and two.is_local
    assert Cluster.parse("2") == two
    assert len(Cluster.parse("auto")) == len(os.sched_getaffinity(0))
    assert not Cluster.parse("2xh100").is_local


def test_gpus_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "_gpu_count", lambda: 2)
    monkeypatch.setattr(detect, "_gpu_kind", lambda index: device_kind("h100"))
    monkeypatch.setattr(detect, "_gpu_links", lambda index: None)
    assert [device.local for device in Cluster.parse("auto").devices] == ["cuda:0", "cuda:1"]
    assert [device.local for device in Cluster.parse(["cuda:1", "cuda:0"]).devices] == ["cuda:1", "cuda:0"]
    assert Cluster.parse(2).link(0, 1).bytes_per_s == 450e9
    with pytest.raises(UsageError, match="named twice"):
        Cluster.parse(["cuda:1", "cuda:1"])
    with pytest.raises(UsageError, match="3 devices asked for, 2 GPUs"):
        Cluster.parse(3)


class FakeDriver:
    """NVML with one GPU: `nvlinks` of its links are up, PCI Express 4.0 x16."""

    def __init__(self, nvlinks: int, uuid: bytes = b"GPU-12") -> None:
        self.nvlinks, self.uuid, self.open = nvlinks, uuid, 0

    def nvmlInit_v2(self) -> int:
        self.open += 1
        return 0

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: object) -> int:
        return 0 if uuid == self.uuid else 6

    def nvmlDeviceGetNvLinkState(self, handle: object, link: ctypes.c_uint, state) -> int:
        state._obj.value = int(link.value < self.nvlinks)
        return 0 if self.nvlinks else 3

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: object, value) -> int:
        value._obj.value = 4
        return 0

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: object, value) -> int:
        value._obj.value = 16
        return 0


@pytest.mark.parametrize(("nvlinks", "rate", "fabric"), [(18, 450e9, "nvls"), (0, 32e9, "pcie")])
def test_the_driver_says_whether_there_is_nvlink(
    monkeypatch: pytest.MonkeyPatch, nvlinks: int, rate: float, fabric: str
) -> None:
    driver = FakeDriver(nvlinks)
    assert nvml.gpu_links("13", driver) is None
    monkeypatch.setattr(detect, "_gpu_count", lambda: 2)
    monkeypatch.setattr(detect, "_gpu_kind", lambda index: device_kind("h100"))
    monkeypatch.setattr(detect, "_gpu_links", lambda index: nvml.gpu_links("12", driver))
    link = Cluster.parse(2).link(0, 1)
    assert (link.bytes_per_s, link.fabric) == (rate, fabric)
    assert driver.open == 0
    assert Cluster.parse(2).links_assumed  # so they are measured where they can be


def test_torchrun_decides_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "_gpu_count", lambda: 0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert [len(node) for node in Cluster.parse("auto").nodes] == [2, 2]
    assert [len(node) for node in Cluster.parse(4).nodes] == [2, 2]


def test_detecting_twice_gives_the_same() -> None:
    first, second = Cluster.cpu(2, "1 GiB"), Cluster.cpu(2, "1 GiB")
    assert first == second
    assert first.devices[0].kind.memory_nbytes == 2**30


@pytest.mark.parametrize(
    ("driver", "gigabytes", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", 85, "h100"),
        ("NVIDIA H100 PCIe", 85, "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", 42.4, "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", 85, "a100-80g"),
        ("NVIDIA H200", 150, "h200"),
        ("NVIDIA L4", 23.6, "l4"),
        ("NVIDIA L40S", 47.7, "l40s"),
        ("NVIDIA A10G", 23.7, "a10g"),
        ("Tesla T4", 15.8, "t4"),
        ("NVIDIA GeForce RTX 4090", 25.3, "rtx4090"),
        ("NVIDIA GeForce RTX 3090", 25.3, "rtx3090"),
        ("NVIDIA GeForce RTX 2080 Ti", 11.5, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10.2, None),
    ],
)
def test_driver_names_find_their_preset(driver: str, gigabytes: float, kind: str | None) -> None:
    found = detect._preset_of(driver, int(gigabytes * 1e9))
    assert (found.name if found else None) == kind
