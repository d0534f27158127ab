"""Process groups of a job, and the channels on which stages send to each other."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shardplan.rewrite.program import StageRanks


class Groups:
    """Process groups by their ranks. Every rank of the job asks for the same groups in the same order, also for those
    it is not in: creating one is collective. They keep the time limit of the default group.

    separate_channels: give every direction between two ranks a group of its own. NCCL needs it: there the messages of
    a group run one after another, so a send that waits for its receiver would hold up the receive that the receiver
    waits for. None: where the default group is NCCL's.
    """

    def __init__(self, separate_channels: bool | None = None) -> None:
        if separate_channels is None:
            separate_channels = dist.get_backend() == "nccl"
        self._separate = separate_channels
        self._timeout = default_timeout()
        self._groups: dict[tuple[int, ...], Any] = {}
        self._channels: dict[tuple[int, int, int], Any] = {}

    def get(self, ranks: Iterable[int]) -> Any:
        """The group of these ranks, in rising order, created at the first call (ranks outside it get a token)."""
        key = tuple(sorted(ranks))
        if key not in self._groups:
            whole = len(key) == dist.get_world_size()
            self._groups[key] = dist.group.WORLD if whole else dist.new_group(list(key), timeout=self._timeout)
        return self._groups[key]

    def of_stage(self, placement: StageRanks, axes: tuple[str, ...]) -> None:
        """Create all groups of a stage along `axes`."""
        for group in sorted({placement.group(rank, axes) for rank in placement.ranks}):
            if len(group) > 1:
                self.get(group)

    def channel(self, source: int, target: int, lane: int = 0) -> Channel:
        """A way from one rank to another; messages of a lane arrive in the order in which they were sent."""
        if not self._separate:
            return Channel(dist.group.WORLD, source, target, lane)
        key = source, target, lane
        if key not in self._channels:
            self._channels[key] = dist.new_group(sorted((source, target)), timeout=self._timeout)
        first = min(source, target)
        return Channel(self._channels[key], int(source > first), int(target > first))

    def close(self) -> None:
        """Destroy the groups that were created here."""
        for group in (*self._groups.values(), *self._channels.values()):
            if group is not dist.group.WORLD and group is not dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(group)
        self._groups.clear()
        self._channels.clear()


class Traffic:
    """Bytes that this rank gave to its process groups so far: in messages between stages, in collectives of stage code.
    Sums of gradients are not counted: they are the bytes of the parameters."""

    __slots__ = ("collective_nbytes", "message_nbytes")

    def __init__(self) -> None:
        self.message_nbytes = 0
        self.collective_nbytes = 0


traffic = Traffic()


class Channel:
    """One direction between two ranks. source, target: their ranks in the group; tag: of its messages."""

    __slots__ = ("_group", "_source", "_tag", "_target")

    def __init__(self, group: Any, source: int, target: int, tag: int = 0) -> None:
        self._group = group
        self._source = source
        self._target = target
        self._tag = tag

    def send(self, value: torch.Tensor) -> Any:
        """Start sending a contiguous tensor, which has to live until the work that is returned is done."""
        traffic.message_nbytes += value.nbytes
        return self._group.send([value], self._target, self._tag)

    def receive(self, into: torch.Tensor) -> Any:
        """Start receiving into a contiguous tensor."""
        return self._group.recv([into], self._source, self._tag)


def default_timeout() -> timedelta | None:
    """The time limit of the default group; a new group would otherwise wait for half an hour."""
    group = dist.distributed_c10d._get_default_group()
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    return getattr(group._get_backend(device).options, "_timeout", None)
