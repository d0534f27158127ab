"""Tensors between the stages of a job: what one stage of one rank sends and receives, box by box.

A message of an instruction is every tensor that the two stages share, in the order of their names, and of each the
boxes between two ranks in the order of its `Route`: both sides list the same. Between stages of one rank nothing is
sent: the tensor is handed over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardplan.planner.transfers import Box, Side, Slices, summed
from shardplan.rewrite.program import Program
from shardplan.rewrite.routes import Route, routes
from shardplan.runtime.groups import Channel, Groups

Handed = dict[tuple[int, str, int], torch.Tensor]
"""(receiving stage, name of what arrives, microbatch) -> the sender's local tensor, between stages of one rank."""


class Ways:
    """All routes of a program and the channels of this rank. Collective: every rank makes it alike."""

    def __init__(self, program: Program, rank: int, groups: Groups) -> None:
        self.program = program
        self.routes = routes(program)
        self.handed: Handed = {}
        self._channels: dict[tuple[int, int, int, int], Channel] = {}
        pairs: dict[tuple[int, int], set[tuple[int, int]]] = defaultdict(set)
        for route in self.routes:
            pairs[route.source, route.target] |= _ranks(route.values)
            pairs[route.target, route.source] |= _ranks(route.gradients)
        lanes: dict[tuple[int, int], int] = defaultdict(int)
        for stages in sorted(pairs):
            for ranks in sorted(pairs[stages]):
                # Messages of different pairs of stages between the same ranks may pass each other.
                channel = groups.channel(*ranks, lanes[ranks])
                lanes[ranks] += 1
                if rank in ranks:
                    self._channels[(*stages, *ranks)] = channel

    def channel(self, source: int, target: int, box: Box) -> Channel | None:
        """From a stage to a stage; None where the box stays on its rank."""
        return None if box.source == box.target else self._channels[source, target, box.source, box.target]


def _ranks(boxes: Sequence[Box]) -> set[tuple[int, int]]:
    return {(box.source, box.target) for box in boxes if box.source != box.target}


@dataclass(frozen=True, slots=True)
class _Part:
    """A box that arrives. channel: None where it is handed over, from its place `there`; here: its place."""

    channel: Channel | None
    there: Slices
    here: Slices


@dataclass(frozen=True, slots=True)
class Incoming:
    """A tensor that arrives. name: by which it is asked for. shape: local. channel: where one message is all of it.

    parts: its boxes otherwise; whole: one that is handed over is all of it; zeros: they do not cover it, or are added
    up.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    channel: Channel | None
    parts: tuple[_Part, ...]
    whole: bool
    zeros: bool


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A tensor that leaves. index: of a result or argument of the stage; name: by which the receiver asks for it.

    pieces: (channel, box in it or None for all of it); handed: the other stage is on this rank and takes some of it.
    """

    index: int
    name: str
    pieces: tuple[tuple[Channel, Slices | None], ...]
    handed: bool


class Mail:
    """Of one stage on one rank.

    acts_to, grads_to: by the other stage, what leaves for it. A gradient is asked for as ``NAME<STAGE``, by the stage
    that it comes from.
    """

    def __init__(self, ways: Ways, stage: int, rank: int, device: torch.device) -> None:
        self._stage = stage
        self._device = device
        self._handed = ways.handed
        self._arriving: dict[tuple[str, int], tuple[torch.Tensor | None, Any, Incoming | None]] = {}
        self._acts_from: dict[int, list[Incoming]] = defaultdict(list)
        self._grads_from: dict[int, list[Incoming]] = defaultdict(list)
        self.acts_to: dict[int, list[Outgoing]] = defaultdict(list)
        self.grads_to: dict[int, list[Outgoing]] = defaultdict(list)
        stages = ways.program.stages
        for route in ways.routes:
            if stage not in (route.source, route.target):
                continue
            result, argument = (
                stages[route.source].results[route.result],
                stages[route.target].arguments[route.argument],
            )
            back = f"{route.name}<{route.target}"
            if route.source == stage:
                out = _outgoing(ways, route.values, stage, route.target, rank, route.result, route.name, result.shape)
                self.acts_to[route.target].append(out)
                if argument.requires_grad:
                    added = summed(*reversed(_sides(ways.program, route, gradient=True)))
                    self._grads_from[route.target].append(
                        _incoming(
                            ways, route.gradients, route.target, stage, rank, back, result.shape, result.dtype, added
                        )
                    )
            else:
                added = summed(*_sides(ways.program, route))
                self._acts_from[route.source].append(
                    _incoming(
                        ways, route.values, route.source, stage, rank, route.name, argument.shape, argument.dtype, added
                    )
                )
                if argument.requires_grad:
                    self.grads_to[route.source].append(
                        _outgoing(
                            ways, route.gradients, stage, route.source, rank, route.argument, back, argument.shape
                        )
                    )

    def post_activations(self, peer: int, microbatch: int) -> None:
        """Begin to receive what another stage sends forward."""
        for incoming in self._acts_from.get(peer, ()):
            self._post(incoming, microbatch)

    def post_gradients(self, peer: int, microbatch: int) -> None:
        """Begin to receive the gradients of what was sent to another stage."""
        for incoming in self._grads_from.get(peer, ()):
            self._post(incoming, microbatch)

    def _post(self, incoming: Incoming, microbatch: int) -> None:
        key = incoming.name, microbatch
        if incoming.channel is not None:
            buffer = torch.empty(incoming.shape, dtype=incoming.dtype, device=self._device)
            self._arriving[key] = buffer, incoming.channel.receive(buffer), None
            return
        if incoming.whole:
            self._arriving[key] = None, (), incoming
            return
        make = torch.zeros if incoming.zeros else torch.empty
        buffer = make(incoming.shape, dtype=incoming.dtype, device=self._device)
        works = []
        for part in incoming.parts:
            if part.channel is None:
                continue
            place = buffer[part.here]
            if incoming.zeros or not place.is_contiguous():
                place = torch.empty(place.shape, dtype=incoming.dtype, device=self._device)
            works.append((part.channel.receive(place), place))
        self._arriving[key] = buffer, works, incoming

    def arrived(self, name: str, microbatch: int) -> torch.Tensor:
        """Wait for a tensor that was posted."""
        buffer, work, incoming = self._arriving.pop((name, microbatch))
        if incoming is None:
            work.wait()
            assert buffer is not None
            return buffer
        handed = self._handed.pop((self._stage, name, microbatch), None)
        if incoming.whole:
            assert handed is not None
            return handed
        assert buffer is not None
        arriving = iter(work)
        for part in incoming.parts:
            place = buffer[part.here]
            if part.channel is None:
                assert handed is not None
                value = handed[part.there]
            else:
                works, value = next(arriving)
                works.wait()
            if incoming.zeros:
                place += value
            elif value.data_ptr() != place.data_ptr():
                place.copy_(value)
        return buffer

    def send(
        self, outgoing: Outgoing, value: torch.Tensor, peer: int, microbatch: int
    ) -> list[tuple[Any, torch.Tensor]]:
        """Begin to send a tensor to another stage. -> works, with what has to live until they are done."""
        if outgoing.handed:
            self._handed[peer, outgoing.name, microbatch] = value
        sent = []
        for channel, box in outgoing.pieces:
            part = (value if box is None else value[box]).contiguous()
            sent.append((channel.send(part), part))
        return sent

    def clear(self) -> None:
        """Forget what has not arrived."""
        self._arriving.clear()
        self._handed.clear()


def _sides(program: Program, route: Route, gradient: bool = False) -> tuple[Side, Side]:
    """The source's and the target's side of a route; of the gradient's."""
    result = program.stages[route.source].results[route.result]
    argument = program.stages[route.target].arguments[route.argument]
    here, there = program.placement[route.source], program.placement[route.target]
    sides = Side(result.layout, here.mesh, here.ranks), Side(argument.layout, there.mesh, there.ranks)
    return (sides[0].dual(), sides[1].dual()) if gradient else sides


def _incoming(
    ways: Ways,
    boxes: Sequence[Box],
    source: int,
    target: int,
    rank: int,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    added: bool,
) -> Incoming:
    mine = [box for box in boxes if box.target == rank]
    channels = [ways.channel(source, target, box) for box in mine]
    whole = len(mine) == 1 and _is_all(mine[0].here, shape)
    covered = sum(box.numel for box in mine) == torch.Size(shape).numel()
    handed = whole and channels[0] is None and mine[0].there == mine[0].here
    parts = tuple(_Part(c, box.there, box.here) for c, box in zip(channels, mine, strict=True))
    if whole and channels[0] is not None:
        return Incoming(name, shape, dtype, channels[0], (), False, False)
    return Incoming(name, shape, dtype, None, parts, handed, added or not covered)


def _outgoing(
    ways: Ways, boxes: Sequence[Box], source: int, target: int, rank: int, index: int, name: str, shape: tuple[int, ...]
) -> Outgoing:
    mine = [box for box in boxes if box.source == rank]
    pieces = [(ways.channel(source, target, box), box.there) for box in mine]
    sent = tuple(
        (channel, None if _is_all(there, shape) else there) for channel, there in pieces if channel is not None
    )
    return Outgoing(index, name, sent, len(sent) < len(mine))


def _is_all(box: Slices, shape: tuple[int, ...]) -> bool:
    return tuple(part.stop - part.start for part in box) == shape
