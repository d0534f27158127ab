"""Link tables measured between live gloo ranks, and used by the model."""

from __future__ import annotations

import pytest

from shardplan.planner.cluster import Cluster
from shardplan.planner.costs.links import COLLECTIVE_KINDS, LinkModel
from shardplan.planner.costs.tables import LinkTables
from shardplan.runtime.measure_links import cache_key, pack, plan_groups, plan_pairs
from tests.ranks import pool


def _measure(rank: int, groups: list[tuple[int, ...]], sizes: list[int], budget_seconds: float) -> tuple[str, float]:
    import time

    from shardplan.runtime.measure_links import measure_links

    begin = time.perf_counter()
    tables = measure_links(groups, sizes=sizes, budget_seconds=budget_seconds)
    return tables.to_json(), time.perf_counter() - begin


def test_two_ranks_measure_the_same_tables() -> None:
    answers = pool(2).run(_measure, [(0, 1)], [1 << 10, 1 << 14, 1 << 18], 0.5)
    texts = [text for text, _ in answers]
    assert texts[0] == texts[1]
    tables = LinkTables.from_json(texts[0])
    assert tables.backend == "gloo"
    assert set(tables.entries) == {("p2p", (0, 1)), ("p2p", (1, 0)), *((kind, (0, 1)) for kind in COLLECTIVE_KINDS)}
    for points in tables.entries.values():
        assert len(points) >= 2 and points[0][0] == 1 << 10
        assert all(1e-6 < seconds < 5 for _, seconds in points)
    assert set(tables.slowdowns) == {("p2p", (0, 1)), ("p2p", (1, 0)), ("all_reduce", (0, 1))}
    model = LinkModel(Cluster.cpu(2, "1 GiB"), tables)
    assert model.slowdown("p2p", (1, 0)) == tables.slowdowns["p2p", (1, 0)]
    for kind in COLLECTIVE_KINDS:
        assert model.source(kind, (0, 1)) == "measured"
        assert model.collective(kind, 1 << 12, (0, 1)) > 0
    assert max(seconds for _, seconds in answers) < 20


def test_three_ranks_with_a_group_that_leaves_one_out() -> None:
    answers = pool(3).run(_measure, [(0, 2), (0, 1, 2)], [1000, 1 << 14], 0.2)
    assert len({text for text, _ in answers}) == 1
    tables = LinkTables.from_json(answers[0][0])
    assert set(tables.groups("all_reduce")) == {(0, 2), (0, 1, 2)}
    assert set(tables.groups("p2p")) == {(a, b) for a in range(3) for b in range(3) if a != b}
    # Sizes are those that were really moved: whole fp32 numbers for every rank.
    assert tables.entries["all_gather", (0, 1, 2)][0][0] == 996


def test_groups_that_a_plan_may_use() -> None:
    assert plan_groups(1) == []
    assert plan_groups(2) == [(0, 1)]
    assert plan_groups(4) == [(0, 1), (2, 3), (0, 2), (1, 3), (0, 1, 2, 3)]
    assert (0, 1, 2, 3, 4, 5) in plan_groups(6) and (0, 2, 4) in plan_groups(6)
    assert len(plan_pairs(4)) == 6
    assert (0, 8) in plan_pairs(16) and (0, 7) not in plan_pairs(16)


def test_rounds_hold_groups_without_a_common_rank() -> None:
    groups = plan_groups(8)
    rounds = pack(groups)
    assert sorted(group for members in rounds for group in members) == sorted(groups)
    for members in rounds:
        ranks = [rank for group in members for rank in group]
        assert len(set(ranks)) == len(ranks) and len({len(group) for group in members}) == 1
    assert [(0, 1), (2, 3), (4, 5), (6, 7)] in rounds


def test_cache_keys_tell_machines_and_groups_apart() -> None:
    machine = Cluster.cpu(2, "1 GiB")
    key = cache_key(machine, [(0, 1)], "gloo", ["a"])
    assert key == cache_key(machine.slower_links(2).with_memory("1 MB"), [(0, 1)], "gloo", ["a"])
    others = [
        cache_key(machine, [(0, 1)], "gloo", ["b"]),
        cache_key(machine, [], "gloo", ["a"]),
        cache_key(machine, [(0, 1)], "nccl", ["a"]),
        cache_key(machine, [(0, 1)], "gloo", ["a"], environment="GLOO_SOCKET_IFNAME=eth1"),
        cache_key(Cluster.cpu(3, "1 GiB"), [(0, 1)], "gloo", ["a"]),
    ]
    assert len({key, *others}) == 6
    with pytest.raises(ValueError, match="2 host names for 1 nodes"):
        cache_key(machine, [], "gloo", ["a", "b"])
