"""The link model against known formulas, contention, measured tables and what they take over from the model."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.planner.cluster import Cluster, Device, DeviceKind, Link, PairLink, Wiring
from shardplan.planner.costs.links import COLLECTIVE_KINDS, FABRICS, LinkModel
from shardplan.planner.costs.tables import LinkTables, clean, interpolate, median_points

GPU = DeviceKind("gpu", "cuda", 10**10, 1e12, {"fp32": 1e13})
CPU = DeviceKind("cpu", "cpu", 10**10, 1e10, {"fp32": 1e10})
MIB = 1 << 20


def cluster(
    kind: DeviceKind, nodes: int, per_node: int, link: Link, uplink: Link, overrides: tuple[PairLink, ...] = ()
) -> Cluster:
    devices = tuple(Device(kind, node) for node in range(nodes) for _ in range(per_node))
    return Cluster(devices, (Wiring(link, uplink),) * nodes, overrides)


FREE = Link(1e15, 0)
SOME = Link(1e9, 0)


# -- formulas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", [GPU, CPU], ids=["nccl", "gloo"])
def test_one_node_moves_what_rings_move(size: int, kind: DeviceKind) -> None:
    model = LinkModel(cluster(kind, 1, size, SOME, SOME))
    ranks = tuple(range(size))
    share = (size - 1) / size
    assert model.collective("all_reduce", 10**9, ranks) == pytest.approx(2 * share)
    assert model.collective("all_gather", 10**9, ranks) == pytest.approx(share)
    assert model.collective("all_to_all", 10**9, ranks) == pytest.approx(share)
    # gloo reduces everything everywhere and keeps a slice.
    scatter = 2 * share if kind is CPU else share
    assert model.collective("reduce_scatter", 10**9, ranks) == pytest.approx(scatter)
    assert model.p2p(10**9, 0, 1) == pytest.approx(1.0)


def test_latency_of_a_ring() -> None:
    model = LinkModel(cluster(CPU, 1, 4, Link(1e15, 1e-3), SOME))
    assert model.collective("all_reduce", 4, (0, 1, 2, 3)) == pytest.approx(6e-3)
    assert model.collective("all_gather", 4, (0, 1, 2, 3)) == pytest.approx(3e-3)
    assert model.p2p(4, 0, 1) == pytest.approx(1e-3)


@pytest.mark.parametrize(("nodes", "per_node"), [(2, 4), (4, 2), (3, 8)])
def test_between_nodes_each_node_moves_what_a_ring_of_nodes_moves(nodes: int, per_node: int) -> None:
    model = LinkModel(cluster(GPU, nodes, per_node, FREE, Link(1e9, 0, per="node")))
    ranks = tuple(range(nodes * per_node))
    share = (nodes - 1) / nodes
    assert model.collective("all_reduce", 10**9, ranks) == pytest.approx(2 * share)
    assert model.collective("all_gather", 10**9, ranks) == pytest.approx(share)
    assert model.collective("reduce_scatter", 10**9, ranks) == pytest.approx(share)
    assert model.collective("all_to_all", 10**9, ranks) == pytest.approx(per_node * share)


def test_every_device_brings_its_own_uplink() -> None:
    model = LinkModel(cluster(GPU, 2, 4, FREE, Link(1e9, 0, per="device")))
    assert model.collective("all_reduce", 10**9, tuple(range(8))) == pytest.approx(1 / 4)
    assert model.collective("all_reduce", 10**9, (0, 4)) == pytest.approx(1.0)
    # gloo's flat ring leaves the node through one device.
    flat = LinkModel(cluster(CPU, 2, 4, FREE, Link(1e9, 0, per="device")))
    assert flat.collective("all_reduce", 10**9, tuple(range(8))) == pytest.approx(2 * 7 / 8)


def test_the_slower_level_counts() -> None:
    for inside, between in ((1e9, 1e15), (1e15, 1e9)):
        model = LinkModel(cluster(GPU, 2, 2, Link(inside, 0), Link(between, 0, per="node")))
        assert model.collective("all_reduce", 10**9, (0, 1, 2, 3)) == pytest.approx(1.0)


def test_switches_that_reduce_move_each_byte_once() -> None:
    switch = LinkModel(cluster(GPU, 1, 8, Link(450e9, 0, "nvls"), SOME))
    seconds = switch.collective("all_reduce", 10**9, tuple(range(8)))
    assert seconds == pytest.approx(10**9 / (450e9 * FABRICS["nvls"].reduces))  # type: ignore[operator]
    # With two members a ring moves no more than the switch.
    ring = 10**9 / (450e9 * FABRICS["nvls"].efficiency["all_reduce"])
    assert switch.collective("all_reduce", 10**9, (0, 1)) == pytest.approx(ring)


@settings(deadline=None)
@given(
    kind=st.sampled_from(COLLECTIVE_KINDS),
    name=st.sampled_from(sorted(FABRICS)),
    uplink=st.sampled_from(["device", "node"]),
    device=st.sampled_from([GPU, CPU]),
    small=st.integers(1, 2**34),
    more=st.integers(1, 2**34),
)
def test_prices_rise_with_bytes_nodes_and_latency(kind, name, uplink, device, small, more) -> None:
    link, up = Link(100e9, 1e-5, name), Link(10e9, 2e-5, "rdma", uplink)
    model = LinkModel(cluster(device, 4, 4, link, up))
    for ranks in ((0, 1), (0, 1, 2, 3), (0, 4), tuple(range(8)), tuple(range(16))):
        first = model.collective(kind, small, ranks)
        assert 0 < first < model.collective(kind, small + more, ranks)
        slow = LinkModel(model.cluster.slower_links(3))
        assert slow.collective(kind, small, ranks) == pytest.approx(3 * first)
    one_node = [model.collective(kind, small, tuple(range(n))) for n in (2, 3, 4)]
    if name != "nvlink":  # more members of a fabric without a switch have more links
        assert one_node == sorted(one_node)
    whole_nodes = [model.collective(kind, small, tuple(range(4 * n))) for n in (2, 3, 4)]
    assert whole_nodes == sorted(whole_nodes)


@settings(deadline=None)
@given(st.sampled_from(COLLECTIVE_KINDS), st.permutations(range(8)), st.integers(1, 2**30))
def test_the_order_of_ranks_does_not_matter(kind: str, order: list[int], nbytes: int) -> None:
    model = LinkModel(Cluster.parse("16xh100"))
    assert model.collective(kind, nbytes, tuple(order)) == model.collective(kind, nbytes, tuple(range(8)))


def test_nothing_costs_nothing_and_unknown_kinds_are_refused() -> None:
    model = LinkModel(Cluster.parse("2xh100"))
    assert model.collective("all_reduce", 0, (0, 1)) == model.collective("all_reduce", 5, (0,)) == 0
    assert model.p2p(0, 0, 1) == model.p2p(5, 1, 1) == 0
    with pytest.raises(ValueError, match="unknown collective"):
        model.collective("broadcast", 4, (0, 1))


def test_published_times() -> None:
    """A few rows of NVIDIA's and the cloud vendors' documentation; all of them: benchmarks/fit_links.py."""
    published = [
        ("dgx-h100", 1, 8, 1 << 30, 4016.4e-6),
        ("dgx-h100", 2, 8, 1 << 30, 4511.2e-6),
        ("dgx-h100", 4, 8, 1 << 33, 45573e-6),
        ("p5", 2, 8, 1 << 26, 591.6e-6),
        ("dgx-a100", 1, 8, 1 << 30, 8203.9e-6),
        ("dgx-a100", 1, 4, 1 << 30, 7259.4e-6),
    ]
    for name, nodes, each, nbytes, seconds in published:
        machine = Cluster.preset(name, nodes)
        ranks = tuple(node[index] for node in machine.nodes for index in range(each))
        assert LinkModel(machine).collective("all_reduce", nbytes, ranks) == pytest.approx(seconds, rel=0.2)


# -- contention -----------------------------------------------------------------------------------------------------


def test_sibling_groups_share_a_node_s_uplink() -> None:
    """Data parallel groups across two nodes with tensor parallelism inside: four rings through one uplink."""
    machine = cluster(GPU, 2, 4, FREE, Link(4e9, 0, per="node"))
    model = LinkModel(machine)
    siblings = [(i, i + 4) for i in range(4)]
    assert model.collective("all_reduce", 10**9, (0, 4)) == pytest.approx(1.0)
    assert model.collective("all_reduce", 10**9, (0, 4), siblings) == pytest.approx(1.0)
    assert model.collective("all_reduce", 10**9, (0, 4), [(0, 4)]) == pytest.approx(0.25)
    assert model.collective("all_reduce", 10**9, (0, 4), siblings[:2]) == pytest.approx(0.5)
    # Groups inside a node do not use the uplink.
    assert model.collective("all_reduce", 10**9, (0, 4), [(0, 4), (1, 2)]) == pytest.approx(0.25)
    # Own uplinks are not shared.
    own = LinkModel(cluster(GPU, 2, 4, FREE, Link(1e9, 0, per="device")))
    assert own.collective("all_reduce", 10**9, (0, 4), siblings) == pytest.approx(1.0)


def test_messages_share_a_node_s_uplink() -> None:
    model = LinkModel(cluster(GPU, 2, 4, FREE, Link(4e9, 0, per="node")))
    assert model.p2p(10**9, 0, 4) == pytest.approx(1.0)
    assert model.p2p(10**9, 0, 4, [(0, 4)]) == pytest.approx(0.25)
    assert model.p2p(10**9, 0, 4, [(0, 4), (1, 5)]) == pytest.approx(0.5)
    assert model.p2p(10**9, 0, 4, [(0, 4), (1, 2)]) == pytest.approx(0.25)


def test_a_shared_bus_inside_the_node() -> None:
    model = LinkModel(cluster(GPU, 1, 4, Link(4e9, 0, per="node"), FREE))
    assert model.collective("all_gather", 10**9, (0, 1)) == pytest.approx(0.5)
    assert model.collective("all_gather", 10**9, (0, 1), [(0, 1)]) == pytest.approx(0.25)


def test_single_links_can_differ() -> None:
    slow = PairLink(1, 2, Link(1e8, 0))
    model = LinkModel(cluster(CPU, 1, 4, SOME, SOME, (slow,)))
    assert model.p2p(10**9, 1, 2) == pytest.approx(10.0)
    assert model.p2p(10**9, 2, 1) == pytest.approx(1.0)
    assert model.collective("all_gather", 10**9, (0, 1)) == pytest.approx(0.5)
    assert model.collective("all_gather", 10**9, (0, 1, 2)) == pytest.approx(10 * 2 / 3)
    between = LinkModel(cluster(CPU, 2, 1, SOME, Link(1e9, 0), (PairLink(0, 1, Link(1e8, 0)),)))
    assert between.collective("all_gather", 10**9, (0, 1)) == pytest.approx(5.0)


# -- tables ---------------------------------------------------------------------------------------------------------

_points = st.lists(st.tuples(st.integers(1, 2**30), st.floats(1e-6, 1e3)), min_size=1, max_size=12)


@settings(deadline=None)
@given(_points, st.lists(st.integers(1, 2**34), min_size=2, max_size=6))
def test_clean_tables_rise_and_so_do_their_interpolations(points, sizes: list[int]) -> None:
    table = clean(points)
    assert [n for n, _ in table] == sorted({n for n, _ in points})
    times = [seconds for _, seconds in table]
    assert all(0 < a <= b * (1 + 1e-12) for a, b in pairwise(times))
    found = [interpolate(table, n) for n in sorted(sizes)]
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(found))
    low, high = min(s for _, s in points), max(s for _, s in points)
    assert low * (1 - 1e-9) <= times[0] and times[-1] <= high * (1 + 1e-9)
    for nbytes, seconds in table:
        assert interpolate(table, nbytes) == pytest.approx(seconds)
    assert clean(table) == table


@settings(deadline=None)
@given(st.floats(1e-6, 1e-2), st.floats(1e6, 1e12), st.integers(1, 2**32))
def test_a_straight_line_is_followed_within_a_few_percent(latency: float, rate: float, nbytes: int) -> None:
    points = tuple((4**k, latency + 4**k / rate) for k in range(5, 13))
    expected = latency + min(max(nbytes, points[0][0]), 2**40) / rate
    # log-log interpolation of a + b x over a factor of four in size is at most 1/9 above it, beyond the end it is exact
    # until latency dominates the last point.
    found = interpolate(clean(points), nbytes)
    if nbytes <= points[-1][0] or latency < 3 * points[-1][0] / rate:
        assert expected * (1 - 1e-9) <= found + 1e-12 or found == pytest.approx(expected, rel=0.12)
        assert found <= expected * 1.12


def test_spikes_and_dips_are_repaired() -> None:
    points = [(2**k, 1e-5 * 2**k) for k in range(8)]
    spiked = [(n, s * (100 if n == 8 else 1)) for n, s in points]
    assert dict(clean(spiked))[8] <= 16e-5
    dipped = [(n, s * (0.001 if n == 8 else 1)) for n, s in points]
    assert dict(clean(dipped))[8] == 4e-5
    assert clean([(4, 1.0), (4, 3.0), (4, 2.0)]) == ((4, 2.0),)
    assert clean([(1, 1.0), (2, -1.0), (4, 4.0)]) == ((1, 1.0), (4, 4.0))


@pytest.mark.parametrize("points", [[], [(0, 1.0)], [(4, -1.0)], [(1, math.nan), (2, 1.0)], [(1, math.inf)]])
def test_tables_that_say_nothing_are_refused(points) -> None:
    with pytest.raises(ValueError, match=r"."):
        clean(points)
    with pytest.raises(ValueError, match="all_reduce among"):
        LinkTables({("all_reduce", (0, 1)): tuple(points)})


def test_median_points() -> None:
    assert median_points({8: [3.0, 1.0, 2.0], 4: [1.0], 2: []}) == [(4, 1.0), (8, 2.0)]


_entries = st.dictionaries(
    st.tuples(
        st.sampled_from(["p2p", *COLLECTIVE_KINDS]),
        st.lists(st.integers(0, 9), min_size=2, max_size=2, unique=True).map(tuple),
    ),
    _points.map(tuple),
    max_size=4,
)


@settings(deadline=None)
@given(_entries)
def test_tables_round_trip(entries) -> None:
    tables = LinkTables(entries, "gloo")
    again = LinkTables.from_json(tables.to_json())
    assert again == tables
    assert LinkTables.from_json(again.to_json()).to_json() == again.to_json()
    assert str(tables).count("\n") == len(tables.entries)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": 2}', '{"schema": 1, "backend": "", "tables": [1]}'])
def test_other_texts_are_no_tables(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        LinkTables.from_json(text)


@pytest.mark.parametrize("key", [("all_reduce", (0,)), ("p2p", (0, 1, 2)), ("gossip", (0, 1)), ("p2p", (1, 1))])
def test_tables_of_no_group_are_refused(key) -> None:
    with pytest.raises(ValueError, match=r"."):
        LinkTables({key: ((4, 1.0),)})


# -- measured and modelled together ---------------------------------------------------------------------------------


def line(latency: float, rate: float) -> tuple[tuple[int, float], ...]:
    return tuple((4**k, latency + 4**k / rate) for k in range(4, 14))


def test_what_was_measured_replaces_the_model() -> None:
    machine = cluster(CPU, 1, 4, Link(1e9, 1e-4), SOME)
    tables = LinkTables({("all_reduce", (0, 1)): line(1e-2, 1e6), ("p2p", (0, 1)): line(1e-3, 1e7)})
    model, plain = LinkModel(machine, tables), LinkModel(machine)
    assert model.source("all_reduce", (0, 1)) == "measured"
    assert model.collective("all_reduce", MIB, (0, 1)) == pytest.approx(1e-2 + MIB / 1e6)
    assert model.collective("all_reduce", MIB, (1, 0)) == model.collective("all_reduce", MIB, (0, 1))
    # A group just like it.
    assert model.collective("all_reduce", MIB, (2, 3)) == model.collective("all_reduce", MIB, (0, 1))
    assert model.p2p(MIB, 3, 2) == model.p2p(MIB, 0, 1) == pytest.approx(1e-3 + MIB / 1e7)
    # A larger group: the model, corrected by what it got wrong on the measured one.
    wrong = model.collective("all_reduce", MIB, (0, 1)) / plain.collective("all_reduce", MIB, (0, 1))
    whole = plain.collective("all_reduce", MIB, (0, 1, 2, 3)) * wrong
    assert model.collective("all_reduce", MIB, (0, 1, 2, 3)) == pytest.approx(whole)
    assert model.source("all_reduce", (0, 1, 2, 3)) == "interpolated"
    # Nothing known.
    assert model.source("all_gather", (0, 1)) == "modelled"
    assert model.collective("all_gather", MIB, (0, 1)) == plain.collective("all_gather", MIB, (0, 1))


def test_noise_between_like_groups_is_shared_and_real_differences_are_kept() -> None:
    machine = cluster(CPU, 1, 6, SOME, SOME)
    pairs = [(0, 1), (2, 3), (4, 5)]
    noisy = {("all_reduce", pair): line(1e-4, rate) for pair, rate in zip(pairs, (1e8, 1.1e8, 1.2e8), strict=True)}
    model = LinkModel(machine, LinkTables(noisy))
    assert len({model.collective("all_reduce", MIB, pair) for pair in pairs}) == 1
    assert model.collective("all_reduce", MIB, (1, 2)) == pytest.approx(1e-4 + MIB / 1.1e8)
    different = LinkModel(machine, LinkTables({**noisy, ("all_reduce", (4, 5)): line(1e-4, 1e7)}))
    assert different.collective("all_reduce", MIB, (4, 5)) == pytest.approx(1e-4 + MIB / 1e7)


def test_groups_across_nodes_are_not_like_groups_inside() -> None:
    machine = cluster(GPU, 2, 2, SOME, Link(1e8, 0, per="node"))
    tables = LinkTables({("all_reduce", (0, 1)): line(1e-5, 1e9), ("all_reduce", (0, 2)): line(1e-4, 1e7)})
    model = LinkModel(machine, tables)
    assert model.collective("all_reduce", MIB, (2, 3)) == model.collective("all_reduce", MIB, (0, 1))
    assert model.collective("all_reduce", MIB, (1, 3)) == model.collective("all_reduce", MIB, (0, 2))
    assert model.source("all_reduce", (0, 1, 2, 3)) == "interpolated"


def test_compute_beside_messages_is_slowed_as_measured() -> None:
    lines = {("p2p", pair): line(1e-5, 1e9) for pair in ((0, 1), (1, 0), (2, 3))}
    tables = LinkTables(lines, "gloo", {("p2p", (0, 1)): (0.4, 0.1), ("p2p", (1, 0)): (0.6, 0.3)})
    assert LinkTables.from_json(tables.to_json()) == tables and tables.scaled(2).slowdowns == tables.slowdowns
    model = LinkModel(cluster(CPU, 1, 4, SOME, SOME), tables)
    assert model.slowdown("p2p", (0, 1)) == (0.4, 0.1)
    assert model.slowdown("p2p", (3, 2)) == pytest.approx((0.5, 0.2))
    assert model.slowdown("all_reduce", (0, 1)) == (0.0, 0.0) == LinkModel(model.cluster).slowdown("p2p", (0, 1))
    for shares in ((1.5, 0.0), (-0.1, 0.0)):
        with pytest.raises(ValueError, match="slowdowns"):
            LinkTables(lines, "gloo", {("p2p", (0, 1)): shares})
    with pytest.raises(ValueError, match="slowdowns"):
        LinkTables(lines, "gloo", {("all_reduce", (0, 1)): (0.1, 0.1)})


def test_scaled_and_merged() -> None:
    tables = LinkTables({("p2p", (0, 1)): line(1e-3, 1e7)}, "gloo")
    slow = tables.scaled(100)
    assert slow.seconds("p2p", MIB, (0, 1)) == pytest.approx(100 * tables.seconds("p2p", MIB, (0, 1)))  # type: ignore[operator]
    both = tables.merged(LinkTables({("p2p", (1, 0)): line(1e-3, 1e6)}))
    assert both.groups("p2p") == [(0, 1), (1, 0)] and both.backend == "gloo"
    assert both.seconds("p2p", MIB, (2, 0)) is None
    with pytest.raises(ValueError, match="multiplied"):
        tables.scaled(-1)
    assert replace(tables, backend="nccl").entries == tables.entries
