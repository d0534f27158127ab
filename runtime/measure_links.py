"""Measured link tables: times messages and collectives between the live ranks of a process group.

What is timed is what a step does: receives are posted before sends, collectives are those of `runtime.comm.DistComm`,
and groups of one size that have no rank in common run at the same time, as sibling groups of a plan do. All ranks walk
through the same list of rounds in lockstep; after every size they agree on what the slowest saw, so that all stop or go
on together. The list is walked twice and the better median counts: other load on a machine comes and goes. Works on
gloo and NCCL.

On the CPU a thread of the process moves the bytes, beside compute on the same core. How much compute loses while a
message or an all_reduce goes on is measured too (`runtime.contention`).
"""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

import torch
import torch.distributed as dist

from shardplan.planner.cluster import Cluster
from shardplan.planner.costs.tables import LinkTables, Points
from shardplan.planner.placement import Mesh
from shardplan.rewrite.program import StageRanks
from shardplan.runtime.comm import DistComm, Groups
from shardplan.runtime.contention import Contention

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
SIZES = (1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20, 1 << 23)
_LEAST_REPEATS, _MOST_REPEATS = 3, 15
_ENOUGH = 1 << 20
_STRAIGHT = 0.7
_PASSES = 2
_AXIS = "tp"
_ACK = 1

Group = tuple[int, ...]
_Measured = dict[tuple[str, Group], list[tuple[int, float]]]


def plan_groups(count: int) -> list[Group]:
    """Groups that a plan on `count` ranks may use: for every k x s that divides count, k ranks in steps of s."""
    found: list[Group] = []
    for size in range(2, count + 1):
        for stride in range(1, count // size + 1):
            if count % (size * stride):
                continue
            for base in range(0, count, size * stride):
                found += [tuple(base + offset + i * stride for i in range(size)) for offset in range(stride)]
    return found


def plan_pairs(count: int) -> list[Group]:
    """Pairs between which a plan may send: all of them up to 8 ranks, else those a power of two apart."""
    return [(a, b) for a, b in combinations(range(count), 2) if count <= 8 or (b - a).bit_count() == 1]


def cache_key(
    cluster: Cluster, groups: Sequence[Group], backend: str, hosts: Sequence[str] | None = None, environment: str = ""
) -> str:
    """Key under which tables measured on these machines may be found again.

    hosts: machine name per node; default: this machine for all. environment: what else decides the way between them
    (network interface, settings of NCCL). The described links do not count: they are what measuring replaces.
    """
    names = list(hosts) if hosts is not None else [platform.node()] * len(cluster.nodes)
    if len(names) != len(cluster.nodes):
        raise ValueError(f"{len(names)} host names for {len(cluster.nodes)} nodes")
    facts = {
        "devices": [[device.kind.name, device.node, device.local] for device in cluster.devices],
        "hosts": names,
        "groups": sorted(map(list, groups)),
        "environment": environment,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    return f"links/2/{backend}/torch-{torch.__version__}/{len(cluster.devices)}/{digest}"


def measure_links(
    groups: Iterable[Group],
    *,
    pairs: Iterable[Group] | None = None,
    kinds: Sequence[str] = COLLECTIVES,
    sizes: Sequence[int] = SIZES,
    budget_seconds: float = 2.5,
    device: torch.device | None = None,
    process_groups: Groups | None = None,
) -> LinkTables:
    """Time `kinds` in every group and messages both ways between `pairs`. Every rank of the default process group
    calls it with the same arguments, and every rank returns the same tables.

    groups: tuples of global ranks. pairs: default `plan_pairs`. sizes: bytes of the whole tensor, as `Costs.collective`
    counts them, rising. budget_seconds: about what the whole takes; on slow links the larger sizes are left out (at
    least two are timed). process_groups: where process groups are taken from and kept; default: made here and
    destroyed afterwards.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    groups = [tuple(group) for group in dict.fromkeys(map(tuple, groups)) if len(group) > 1]
    pairs = plan_pairs(world) if pairs is None else [tuple(pair) for pair in pairs]
    device = device or _usual_device()
    handles = process_groups or Groups()
    comms: dict[Group, DistComm] = {}
    for group in groups:
        handles.get(group)
        if rank in group:
            comms[group] = DistComm(StageRanks(Mesh((_AXIS,), (len(group),)), group), rank, handles)
    rounds: list[tuple[str, list[Group]]] = [("p2p", together) for together in pack(pairs)]
    rounds += [(kind, together) for kind in kinds for together in pack(groups)]
    walks = _PASSES * sum(2 if kind == "p2p" else 1 for kind, _ in rounds)
    session = _Session(device, sorted(sizes), budget_seconds, walks)
    mine: list[_Measured] = [{} for _ in range(_PASSES)]
    lost: dict[tuple[str, Group], tuple[float, float]] = {}
    try:
        for found in mine:
            for kind, together in rounds:
                group = next((group for group in together if rank in group), None)
                if kind == "p2p":
                    for key, points in session.messages(group).items():
                        found["p2p", key] = points
                else:
                    points = session.collective(kind, comms[group] if group is not None else None)
                    if group is not None:
                        found[kind, group] = points
        if device.type == "cpu":
            contention = Contention(sizes, budget_seconds)
            for kind, together in rounds:
                if kind in ("p2p", "all_reduce"):
                    group = next((group for group in together if rank in group), None)
                    lost |= contention.pair(group) if kind == "p2p" else contention.group(group, handles)
    finally:
        if process_groups is None:
            handles.close()
    everyone: list[tuple[list[_Measured], dict[tuple[str, Group], tuple[float, float]]]] = [([], {})] * world
    dist.all_gather_object(everyone, (mine, lost))
    slowdowns: dict[tuple[str, Group], tuple[float, float]] = {}
    for key in {key for _, found in everyone for key in found}:
        first, others = zip(*(found[key] for _, found in everyone if key in found), strict=True)
        slowdowns[key] = max(first), max(others)
    return LinkTables(_merged([found for found, _ in everyone]), dist.get_backend(), slowdowns)


def pack(groups: Sequence[Group]) -> list[list[Group]]:
    """Rounds of groups of one size without a common rank, in order of appearance."""
    rounds: list[tuple[int, set[int], list[Group]]] = []
    for group in groups:
        for size, busy, members in rounds:
            if size == len(group) and not busy & set(group):
                busy |= set(group)
                members.append(group)
                break
        else:
            rounds.append((len(group), set(group), [group]))
    return [members for _, _, members in rounds]


def _usual_device() -> torch.device:
    if "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _merged(everyone: list[list[_Measured]]) -> dict[tuple[str, Group], Points]:
    """The best pass of the slowest rank, for every size."""
    best: dict[tuple[str, Group], dict[int, float]] = {}
    for ranks in zip(*everyone, strict=True):
        slowest: dict[tuple[str, Group], dict[int, float]] = {}
        for part in ranks:
            for key, points in part.items():
                times = slowest.setdefault(key, {})
                for nbytes, seconds in points:
                    times[nbytes] = max(times.get(nbytes, 0.0), seconds)
        for key, times in slowest.items():
            least = best.setdefault(key, {})
            for nbytes, seconds in times.items():
                least[nbytes] = min(least.get(nbytes, seconds), seconds)
    return {key: tuple(sorted(times.items())) for key, times in best.items()}


class _Session:
    """Lockstep of all ranks through sizes and repeats within a time budget."""

    def __init__(self, device: torch.device, sizes: Sequence[int], budget_seconds: float, walks: int) -> None:
        self.device, self.sizes, self.budget_seconds, self.walks = device, sizes, budget_seconds, walks
        self.begin = time.perf_counter()

    def collective(self, kind: str, comm: DistComm | None) -> list[tuple[int, float]]:
        """(nbytes, median seconds) of one collective, in lockstep with the ranks that are in no group this round."""
        if comm is None:
            self._walk(lambda nbytes: None)
            return []
        size = comm.size(_AXIS)

        def prepare(nbytes: int) -> Callable[[], float]:
            action = _collective(kind, _whole(nbytes, size), comm, self.device)
            return lambda: self._timed(action)

        return [(_whole(nbytes, size), seconds) for nbytes, seconds in self._walk(prepare)]

    def messages(self, pair: Group | None) -> dict[Group, list[tuple[int, float]]]:
        """(nbytes, median seconds of one way) for both directions of this rank's pair; filled in on the sender.

        A message is answered by one byte as soon as it has arrived. Half of a round of single bytes, which is the way
        of the answer, is taken off.
        """
        if pair is None:
            for _ in range(2):
                self._walk(lambda nbytes: None)
            return {}
        me = dist.get_rank()
        result: dict[Group, list[tuple[int, float]]] = {}
        for source, target in (pair, pair[::-1]):

            def prepare(nbytes: int, source: int = source, target: int = target) -> Callable[[], float]:
                return _PingPong(nbytes, source, target, self.device).once

            single = _PingPong(_ACK, source, target, self.device)
            answer = [single.once() for _ in range(_MOST_REPEATS)]
            found = self._walk(prepare)
            if me == source:
                back = statistics.median(answer) / 2
                # Never less than half of what was seen: a noisy answer must not eat the message.
                result[source, target] = [(nbytes, max(t - back, t / 2)) for nbytes, t in found]
        return result

    def _walk(self, prepare: Callable[[int], Callable[[], float] | None]) -> list[tuple[int, float]]:
        """Sizes in rising order, each with as many repeats as an even share of the time left allows.

        Sizes that would take too long are left out: what is beyond the last one is extrapolated. While there is mostly
        latency to extrapolate (below `_ENOUGH`, times rising slower than bytes) more time is allowed.
        """
        found: list[tuple[int, float]] = []
        before, walk_end = (0, 0.0), 0.0
        for index, nbytes in enumerate(self.sizes):
            action = prepare(nbytes)
            first = [action() for _ in range(2)] if action else [0.0]
            slowest, elapsed = self._agree(min(first), time.perf_counter() - self.begin)
            if index == 0:
                walk_end = elapsed + max(self.budget_seconds - elapsed, 0.0) / max(self.walks, 1)
            share = max(walk_end - elapsed, 0.0) / (len(self.sizes) - index)
            repeats = max(_LEAST_REPEATS, min(_MOST_REPEATS, int(share / max(slowest, 1e-6))))
            times = [action() for _ in range(repeats)] if action else [0.0]
            found.append((nbytes, statistics.median(times)))
            if index + 1 == len(self.sizes):
                break
            following = self.sizes[index + 1]
            per_byte = max(slowest - before[1], 0.0) / (nbytes - before[0])
            expected = (2 + _LEAST_REPEATS) * (slowest + per_byte * (following - nbytes))
            left = walk_end - elapsed - repeats * slowest
            straight = slowest > _STRAIGHT * before[1] * nbytes / max(before[0], 1)
            more = 0.0 if straight or following > _ENOUGH else self.budget_seconds / len(self.sizes)
            if index > 0 and expected > max(left, more):
                break
            before = nbytes, slowest
        self.walks -= 1
        return found

    def _agree(self, *values: float) -> list[float]:
        """The largest of all ranks' values; also a barrier."""
        agreed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return agreed.tolist()

    def _timed(self, action: Callable[[], object]) -> float:
        begin = time.perf_counter()
        action()
        _finish(self.device)
        return time.perf_counter() - begin


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _PingPong:
    """One message of `nbytes` and its one-byte answer.

    On the CPU receives are posted before sends (an unposted receive costs gloo a second latency). NCCL runs what two
    ranks send each other in one queue: there the receive of the answer must come after the message.
    """

    def __init__(self, nbytes: int, source: int, target: int, device: torch.device) -> None:
        self.source, self.target, self.device = source, target, device
        self.message = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self.answer = torch.zeros(_ACK, dtype=torch.uint8, device=device)

    def once(self) -> float:
        """Seconds from sending to the answer's arrival, on the source; on the target from posting to answering."""
        begin = time.perf_counter()
        if dist.get_rank() == self.source:
            waiting = dist.irecv(self.answer, self.target) if self.device.type == "cpu" else None
            sending = dist.isend(self.message, self.target)
            _wait(waiting or dist.irecv(self.answer, self.target))
            _finish(self.device)
            seconds = time.perf_counter() - begin
            _wait(sending)
            return seconds
        _wait(dist.irecv(self.message, self.source))
        _finish(self.device)
        _wait(dist.isend(self.answer, self.source))
        return time.perf_counter() - begin


def _wait(work: dist.Work | None) -> None:
    assert work is not None
    work.wait()


def _whole(nbytes: int, size: int) -> int:
    """Bytes really moved: whole fp32 numbers that divide among the ranks."""
    return max(nbytes // 4 // size, 1) * 4 * size


def _collective(kind: str, nbytes: int, comm: DistComm, device: torch.device) -> Callable[[], object]:
    """One collective on a tensor of `nbytes` in all, as `Costs.collective` counts them."""
    size = comm.size(_AXIS)
    whole = torch.zeros(size, nbytes // 4 // size, device=device)
    part = whole[:1].clone()
    launch: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: comm.all_reduce(whole, _AXIS),
        "all_gather": lambda: comm.all_gather(part, 0, _AXIS),
        "reduce_scatter": lambda: comm.reduce_scatter(whole, 0, _AXIS),
        "all_to_all": lambda: comm.all_to_all(whole, 0, 1, _AXIS),
    }
    if kind not in launch:
        raise ValueError(f"unknown collective {kind!r}")
    return launch[kind]


__all__ = ["COLLECTIVES", "SIZES", "cache_key", "measure_links", "pack", "plan_groups", "plan_pairs"]
