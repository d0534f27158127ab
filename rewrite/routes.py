"""The way of every tensor between stages: its boxes there, and those of its gradient back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from shardplan.planner.transfers import Box, Side, transfers
from shardplan.rewrite.program import Program


@dataclass(frozen=True, slots=True)
class Route:
    """A tensor from one stage to another.

    result: its position among the source's results; argument: among the target's arguments. values: boxes of the
    activation; gradients: boxes back, empty where no gradient flows.
    """

    name: str
    source: int
    target: int
    result: int
    argument: int
    values: tuple[Box, ...]
    gradients: tuple[Box, ...]


def routes(program: Program) -> tuple[Route, ...]:
    """All of them; those of one pair of stages by name, the order in which both sides send and receive."""
    found = []
    for target, code in enumerate(program.stages):
        for position, argument in enumerate(code.arguments):
            if argument.kind != "recv":
                continue
            results = program.stages[argument.stage].results
            index = next(i for i, r in enumerate(results) if r.name == argument.name and target in r.stages)
            result = results[index]
            here, there = program.placement[argument.stage], program.placement[target]
            one = Side(result.layout, here.mesh, here.ranks)
            two = Side(argument.layout, there.mesh, there.ranks)
            back = transfers(result.global_shape, two.dual(), one.dual()) if argument.requires_grad else ()
            values = transfers(result.global_shape, one, two)
            found.append(Route(argument.name, argument.stage, target, index, position, values, back))
    return tuple(sorted(found, key=lambda route: (route.source, route.target, route.name)))


def deliver(
    boxes: Iterable[Box],
    held: Mapping[int, torch.Tensor],
    ranks: Iterable[int],
    shapes: Mapping[int, tuple[int, ...]],
) -> dict[int, torch.Tensor]:
    """What every one of `ranks` has when the boxes have arrived. held: the senders' tensors by rank; shapes: the
    receivers' local shapes."""
    like = next(iter(held.values()))
    found = {rank: like.new_zeros(shapes[rank]) for rank in ranks}
    for box in boxes:
        found[box.target][box.here] += held[box.source][box.there]
    return found
