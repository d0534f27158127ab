"""Clusters: what `devices=` accepts, cluster files and their errors, presets, limits, and the round trip to TOML."""

from __future__ import annotations

import os
import pickle
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.errors import ClusterFileError, UsageError
from shardplan.planner import detect, units
from shardplan.planner.cluster import (
    FABRICS,
    FLOP_TYPES,
    Cluster,
    Device,
    DeviceKind,
    Link,
    PairLink,
    Wiring,
)
from shardplan.planner.presets import device_kind, preset_kinds, preset_nodes

FILE = """
schema = 1
[device.h100]
memory = "80 GB"
memory_bandwidth = "3350 GB/s"
bf16 = "989 TFLOP/s"
reserve = "6 %"
[[node]]
count = 2
devices = "8 x h100"
[link.node]
bandwidth = "450 GB/s"
latency = "8 us"
[link.cluster]
bandwidth = "50 GB/s per device"
latency = "15 us"
"""


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


# -- units ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (units.parse_nbytes, "80 GB", 80 * 10**9),
        (units.parse_nbytes, "20 GiB", 20 * 2**30),
        (units.parse_nbytes, "1.5MiB", 3 * 2**19),
        (units.parse_nbytes, "512", 512),
        (units.parse_nbytes, 7, 7),
        (units.parse_bytes_per_s, "450 GB/s", 450e9),
        (units.parse_bytes_per_s, "10 Gbit/s", 1.25e9),
        (units.parse_bytes_per_s, "10 Gbps", 1.25e9),
        (units.parse_bytes_per_s, "2 TB / s", 2e12),
        (units.parse_seconds, "8 us", 8e-6),
        (units.parse_seconds, "0.1 ms", 1e-4),
        (units.parse_flops_per_s, "989 TFLOP/s", 989e12),
        (units.parse_share, "6 %", 0.06),
        (units.parse_share, 0.5, 0.5),
    ],
)
def test_units_are_read(parse, text, value) -> None:
    assert parse(text) == value


@pytest.mark.parametrize("text", ["-3 GB", "nan GB", "3 XB", "GB", "1e999 GB", True, "3 GB/s", "", "3 GB GB", None])
def test_sizes_that_are_none_are_refused(text) -> None:
    with pytest.raises(ValueError, match=r"."):
        units.parse_nbytes(text)


def test_shares_end_at_one() -> None:
    with pytest.raises(ValueError, match="more than 100 %"):
        units.parse_share("101 %")


@settings(deadline=None)
@given(st.integers(0, 2**60))
def test_sizes_round_trip(nbytes: int) -> None:
    if nbytes < 2**53:
        assert units.parse_nbytes(units.format_nbytes(nbytes)) == nbytes


@settings(deadline=None)
@given(st.floats(1e-3, 1e18))
def test_rates_round_trip(rate: float) -> None:
    assert units.parse_bytes_per_s(units.format_bytes_per_s(rate)) == rate
    assert units.parse_flops_per_s(units.format_flops_per_s(rate)) == rate


@settings(deadline=None)
@given(st.floats(0, 100))
def test_times_and_shares_round_trip(value: float) -> None:
    assert units.parse_seconds(units.format_seconds(value)) == value
    assert units.parse_share(units.format_share(value / 100)) == value / 100


def test_formats_are_short() -> None:
    assert units.format_nbytes(80 * 10**9) == "80 GB"
    assert units.format_nbytes(81559 * 2**20) == "81559 MiB"
    assert units.format_bytes_per_s(1.25e9) == "1.25 GB/s"
    assert units.format_seconds(8e-6) == "8 us"


# -- files ----------------------------------------------------------------------------------------------------------


def test_the_file_of_the_documentation() -> None:
    cluster = Cluster.from_toml(FILE, "cluster.toml")
    assert len(cluster) == 16 and [len(node) for node in cluster.nodes] == [8, 8]
    kind = cluster.devices[0].kind
    assert (kind.name, kind.torch_device, kind.memory_nbytes) == ("h100", "cuda", 80 * 10**9)
    assert cluster.memory_limit(3) == int(80e9 * 0.94)
    inside, between = cluster.link(0, 7), cluster.link(0, 8)
    assert inside == Link(450e9, 8e-6, "nvls", "device")
    assert between == Link(50e9, 15e-6, "rdma", "device")


def test_shipped_kinds_and_machines_need_no_description(tmp_path: Path) -> None:
    path = tmp_path / "mixed.toml"
    path.write_text(
        'schema = 1\n[[node]]\ndevices = "4 x h100, 4 x a10g"\n[[node]]\npreset = "dgx-h100"\ncount = 2\n'
        '[link.cluster]\nbandwidth = "10 Gbit/s"\nlatency = "30 us"\n'
        '[[link.pair]]\ndevices = [0, 9]\nbandwidth = "1 GB/s"\nlatency = "1 ms"\n'
    )
    cluster = Cluster.load(path)
    assert [device.kind.name for device in cluster.devices] == ["h100"] * 4 + ["a10g"] * 4 + ["h100"] * 16
    assert cluster.link(1, 9) == Link(1.25e9, 30e-6, "tcp", "node")
    assert cluster.link(0, 9) == cluster.link(9, 0) == Link(1e9, 1e-3)
    assert cluster.link(0, 1).bytes_per_s == cluster.link(8, 9).bytes_per_s == 450e9


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (('"80 GB"', '"80 XB"'), "device.h100.memory"),
        (('"80 GB"', '"-80 GB"'), "device.h100.memory"),
        (('memory = "80 GB"\n', ""), "device.h100.memory"),
        (('bf16 = "989 TFLOP/s"', 'bf17 = "989 TFLOP/s"'), "device.h100.bf17"),
        (('bf16 = "989 TFLOP/s"\n', ""), "device.h100"),
        (('"6 %"', '"106 %"'), "device.h100.reserve"),
        (("schema = 1", "schema = 2"), "schema"),
        (("schema = 1", "shema = 1"), "schema"),
        (("count = 2", "count = 0"), "node[0].count"),
        (("count = 2", "size = 2"), "node[0].size"),
        (('"8 x h100"', '"8 x h1000x"'), "node[0].devices"),
        (('"8 x h100"', '"0 x h100"'), "node[0].devices"),
        (('devices = "8 x h100"', 'preset = "dgx-h1000000"'), "node[0].preset"),
        (('"450 GB/s"', '"0 GB/s"'), "link.node.bandwidth"),
        (('"450 GB/s"', '"450 GB"'), "link.node.bandwidth"),
        (('"8 us"', '"-8 us"'), "link.node.latency"),
        (('"50 GB/s per device"', '"50 GB/s per rack"'), "link.cluster.bandwidth"),
        (("[link.cluster]", "[link.clusters]"), "link.clusters"),
        (("[link.node]", "[link.pair]"), "link.pair"),
        (('latency = "15 us"', 'latency = "15 us"\nkind = "carrier pigeon"'), "link.cluster.kind"),
        (('latency = "15 us"', 'latency = "15 us"\n[[link.pair]]\ndevices = [0, 99]'), "link.pair[0].devices"),
        (("count = 2", 'count = 2\nmemory = ["1 GB"]'), "node[0].memory"),
        (("count = 2", 'count = 2\nmemory = "0 GB"'), "node[0].memory"),
        (("count = 2", 'count = 2\nmemory = "81 GB"'), "node[0].memory"),
        (("[[node]]", "[node]"), "node"),
    ],
)
def test_mistakes_name_the_key_and_the_file(change: tuple[str, str], named: str) -> None:
    text = FILE.replace(*change)
    assert text != FILE
    with pytest.raises(ClusterFileError) as caught:
        Cluster.from_toml(text, "my.toml")
    assert caught.value.title.startswith(f"my.toml: {named}:"), caught.value


def test_links_that_are_needed_must_be_described() -> None:
    for level in ("node", "cluster"):
        data = FILE.split(f"[link.{level}]")
        text = data[0] + ("[link." + data[1].split("[link.", 1)[1] if "[link." in data[1] else "")
        with pytest.raises(ClusterFileError, match=rf"link\.{level}: is missing"):
            Cluster.from_toml(text, "my.toml")
    alone = FILE[: FILE.index("[link.node]")].replace("count = 2", "").replace("8 x", "1 x")
    assert len(Cluster.from_toml(alone)) == 1


def test_not_toml_and_not_there(tmp_path: Path) -> None:
    with pytest.raises(ClusterFileError, match=r"my\.toml: not TOML"):
        Cluster.from_toml("schema = ", "my.toml")
    with pytest.raises(ClusterFileError, match="cannot read"):
        Cluster.load(tmp_path / "none.toml")


_names = st.from_regex(r"\A[A-Za-z0-9](?:[\w.\- ]{0,10}[\w.\-])?\Z")
_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_rates = st.floats(1e3, 1e15)
_links = st.builds(Link, _rates, st.floats(0, 1), st.sampled_from(FABRICS), st.sampled_from(["device", "node"]), _texts)


@st.composite
def _clusters(draw: st.DrawFn) -> Cluster:
    kinds = [
        DeviceKind(
            name,
            draw(st.sampled_from(["cpu", "cuda"])),
            draw(st.integers(1, 2**50)),
            draw(_rates),
            draw(st.dictionaries(st.sampled_from(FLOP_TYPES), _rates, min_size=1)),
            draw(st.floats(0, 0.9)),
            draw(_texts),
        )
        for name in draw(st.lists(_names, min_size=1, max_size=3, unique=True))
    ]
    nodes = draw(st.lists(st.lists(st.sampled_from(kinds), min_size=1, max_size=3), min_size=1, max_size=4))
    devices = tuple(
        Device(kind, node, draw(st.sampled_from(["", "cpu", "cuda:1"])))
        for node, row in enumerate(nodes)
        for kind in row
    )
    pool = draw(st.lists(st.builds(Wiring, _links, _links), min_size=1, max_size=2))
    wiring = tuple(draw(st.sampled_from(pool)) for _ in nodes)
    ends = [(a, b) for a in range(len(devices)) for b in range(len(devices)) if a != b]
    pairs = draw(st.lists(st.sampled_from(ends), max_size=3, unique=True)) if ends else []
    overrides = tuple(PairLink(a, b, draw(_links)) for a, b in pairs)
    limits = [draw(st.none() | st.integers(1, device.kind.memory_nbytes)) for device in devices]
    some = any(limit is not None for limit in limits)
    return Cluster(devices, wiring, overrides, tuple(limits) if some else (), draw(_texts))


@settings(max_examples=60, deadline=None)
@given(_clusters())
def test_any_cluster_reads_back_from_its_text(cluster: Cluster) -> None:
    text = cluster.to_toml()
    again = Cluster.from_toml(text)
    assert again == cluster
    assert hash(again) == hash(cluster)
    assert again.to_toml() == text
    assert tomllib.loads(text)["schema"] == 1
    assert pickle.loads(pickle.dumps(cluster)) == cluster


def test_saved_and_loaded(tmp_path: Path) -> None:
    cluster = Cluster.parse({"h100": 4, "a10g": 4}).with_memory("20 GiB")
    cluster.save(tmp_path / "c.toml")
    assert Cluster.parse(str(tmp_path / "c.toml")) == cluster
    assert os.listdir(tmp_path) == ["c.toml"]


# -- devices= -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "kinds", "per_node"),
    [
        ("8xh100", {"h100": 8}, [8]),
        ("8 x H100", {"h100": 8}, [8]),
        ("64xa100-80g", {"a100-80g": 64}, [8] * 8),
        ("12xh100", {"h100": 12}, [8, 4]),
        ({"h100": 4, "a10g": 4}, {"h100": 4, "a10g": 4}, [4, 4]),
        ("4xh100+4xa10g", {"h100": 4, "a10g": 4}, [4, 4]),
        (["h100", "h100"], {"h100": 2}, [2]),
        ("dgx-h100:4", {"h100": 32}, [8] * 4),
        ("dgx-a100", {"a100-80g": 8}, [8]),
        ("p4d:2", {"a100-40g": 16}, [8, 8]),
        ("A100-SXM4-40GB", {"a100-40g": 1}, [1]),
        ("t4", {"t4": 1}, [1]),
        (["cpu"] * 3, {"cpu": 3}, [3]),
        ("2xcpu", {"cpu": 2}, [2]),
        ("cpu:2", {"cpu": 2}, [2]),
        ("cpu", {"cpu": 1}, [1]),
    ],
)
def test_what_devices_accepts(devices, kinds: dict[str, int], per_node: list[int]) -> None:
    cluster = Cluster.parse(devices)
    assert {kind.name: count for kind, count in cluster.kinds().items()} == kinds
    assert [len(node) for node in cluster.nodes] == per_node
    assert Cluster.from_toml(cluster.to_toml()) == cluster
    assert Cluster.parse(cluster) is cluster


def test_devices_per_node() -> None:
    assert [len(node) for node in Cluster.parse("8xh100", 4).nodes] == [4, 4]


@pytest.mark.parametrize(
    "devices", ["8xh1000", "0xh100", "dgx-h100:x", "", [], 0, -1, True, {"h100": 0}, "none.tom", None]
)
def test_what_devices_refuses(devices) -> None:
    with pytest.raises(UsageError):
        Cluster.parse(devices)


def test_unknown_names_name_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        Cluster.parse("8xh10")
    assert any("h100" in hint for hint in caught.value.hints)


# -- presets --------------------------------------------------------------------------------------------------------


def test_presets_are_complete() -> None:
    kinds = preset_kinds()
    data_center = {"v100-32g", "a100-40g", "a100-80g", "h100", "h100-pcie", "h200", "b200", "l4", "l40s", "a10g", "t4"}
    assert data_center | {"rtx4090"} <= set(kinds)
    for kind in kinds.values():
        assert kind.source and 0 < kind.reserve < 0.2 and "fp32" in kind.flops and "fp16" in kind.flops
        assert 8 * 2**30 < kind.memory_nbytes < 2**40 and 100e9 < kind.memory_bytes_per_s < 10e12
        assert Cluster.preset(kind.name).devices[0].kind == kind
    nodes = preset_nodes()
    assert {"dgx-a100", "dgx-h100", "hgx-b200", "p4d", "p5"} <= set(nodes)
    for cluster in nodes.values():
        for link in (cluster.wiring[0].link, cluster.wiring[0].uplink):
            assert link.source and link.fabric != "plain"
        assert cluster.wiring[0].link.bytes_per_s * 8 > cluster.wiring[0].uplink.bytes_per_s


def test_peak_flops_by_type() -> None:
    h100, v100 = device_kind("h100"), device_kind("v100")
    assert h100.peak_flops("bf16") == h100.peak_flops("torch.bfloat16") == 989e12
    assert h100.peak_flops("float32") == 67e12
    assert v100.peak_flops("bfloat16") == v100.peak_flops("float16") == 125e12
    assert v100.peak_flops("tf32") == v100.peak_flops("int64") == 15.7e12
    assert h100.peak_flops("float8_e4m3fn") == 1979e12


# -- variations -----------------------------------------------------------------------------------------------------


def test_memory_limits() -> None:
    cluster = Cluster.parse("2xh100")
    assert [cluster.with_memory("20 GiB").memory_limit(i) for i in (0, 1)] == [20 * 2**30] * 2
    mixed = cluster.with_memory(["20 GiB", None])
    assert mixed.memory_limit(0) == 20 * 2**30 and mixed.memory_limit(1) == cluster.memory_limit(1)
    assert mixed.with_memory(None) == cluster
    for wrong in ("20 XB", "-1 GB", 0, ["1 GB"], "100 GiB"):
        with pytest.raises(UsageError):
            cluster.with_memory(wrong)


def test_slower_links_and_other_links() -> None:
    cluster = Cluster.parse("16xh100")
    slow = cluster.slower_links(100)
    assert slow.link(0, 1).bytes_per_s == 4.5e9 and slow.link(0, 1).latency_seconds == pytest.approx(1e-3)
    assert slow.link(0, 8).bytes_per_s == 0.5e9
    assert slow.devices == cluster.devices
    other = cluster.with_links(node=Link(1e9, 1e-3))
    assert other.link(0, 1) == Link(1e9, 1e-3) and other.link(0, 8) == cluster.link(0, 8)
    with pytest.raises(UsageError):
        cluster.slower_links(0)


def test_described_links_are_told_from_assumed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Cluster.cpu(2, "1 GiB")
    assert found.links_assumed and Cluster.from_toml(found.to_toml()).links_assumed
    assert found.with_memory("1 MiB").links_assumed
    assert not found.slower_links(100).links_assumed
    assert not found.with_links(node=Link(1e9, 1e-3)).links_assumed
    assert found.with_links(cluster=Link(1e9, 1e-3)).links_assumed  # there is one node
    assert not Cluster.from_toml(FILE).links_assumed and not Cluster.parse("8xh100").links_assumed
    monkeypatch.setattr(detect, "_gpu_count", lambda: 2)
    monkeypatch.setattr(detect, "_gpu_kind", lambda index: device_kind("h100"))
    monkeypatch.setattr(detect, "_gpu_links", lambda index: None)
    assert Cluster.parse(2).links_assumed


def test_first_devices() -> None:
    cluster = Cluster.parse("16xh100").with_memory("20 GiB").first(9)
    assert [len(node) for node in cluster.nodes] == [8, 1] and len(cluster.limits) == 9
    with pytest.raises(UsageError):
        cluster.first(10)


def test_parts_that_contradict_each_other() -> None:
    kind = device_kind("h100")
    wires = Wiring(Link(1e9, 0), Link(1e9, 0))
    with pytest.raises(ValueError, match="at least one device"):
        Cluster((), ())
    with pytest.raises(ValueError, match="consecutive"):
        Cluster((Device(kind, 0), Device(kind, 1), Device(kind, 0)), (wires, wires))
    with pytest.raises(ValueError, match="links of 2"):
        Cluster((Device(kind, 0),), (wires, wires))
    with pytest.raises(ValueError, match="memory limits for"):
        Cluster((Device(kind, 0),), (wires,), limits=(1, 2))
    with pytest.raises(ValueError, match="no link from device 0 to device 0"):
        Cluster((Device(kind, 0),), (wires,), (PairLink(0, 0, wires.link),))
    other = DeviceKind("h100", "cuda", 1, 1.0, {"fp32": 1.0})
    with pytest.raises(ValueError, match="two different kinds"):
        Cluster((Device(kind, 0), Device(other, 0)), (wires,))


def test_large_clusters_are_cheap() -> None:
    cluster = Cluster.preset("dgx-h100", nodes=2048)
    assert len(cluster) == 16384 and len(cluster.nodes) == 2048
    text = cluster.to_toml()
    assert len(text) < 2000 and Cluster.from_toml(text) == cluster


def test_summary() -> None:
    text = str(Cluster.parse("16xh100"))
    assert text == "16 x h100 in 2 nodes, 450 GB/s in a node, 50 GB/s per device between nodes"
