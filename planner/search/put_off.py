"""What backward in two parts puts off: seconds of gradients of weights, and bytes that wait for them.

Of a product of activations and trained weights that lie whole in memory, half of backward is for the weights; it reads
the product's input and the gradient of its result. Weights that are gathered, or whose gradients go to parts of them,
are not put off (`rewrite.split_backward`). The first stage sends no gradients back: all of its backward waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import fx

from shardplan.planner.propagate import placed
from shardplan.planner.rules import Strategy
from shardplan.planner.search.memory import root
from shardplan.planner.search.runs import ops_of
from shardplan.planner.storage import Storage
from shardplan.planner.trace import needs_grad, resolve, tensor_args
from shardplan.planner.weight_work import is_product

if TYPE_CHECKING:
    from shardplan.planner.search.candidate import Candidate
    from shardplan.planner.search.search import Search

SPLIT = ("zb", "zbv")
"""Schedules with backward in two parts."""
_RESIDENT = 2
"""From this level of storage on (`planner.storage`) gradients are not put off."""


def weight_seconds(
    search: Search,
    candidate: Candidate,
    chosen: Mapping[str, Strategy],
    stored: Mapping[str, Storage],
    stage: int,
) -> float:
    """Seconds of a microbatch's backward of a stage that can be put off."""
    if stage == 0:
        first, last = _segments(candidate, stage)
        prices = [candidate.segments[i].columns[candidate.choice.columns[i]].price for i in range(first, last)]
        return sum(p.backward_seconds for p in prices)
    total = 0.0
    columns = candidate.columns
    for node, weights in _products(search, candidate, stored, stage):
        others = [a for a in tensor_args(node) if a not in weights and needs_grad(a)]
        share = 0.5 if others else 1.0
        total += share * columns.op_cost(node, chosen.get(node.name)).backward_seconds
        adding = sum(columns.local_nbytes(w, placed(chosen.get(w.name), 0)) for w in weights)
        total += columns.adding_seconds(adding)
    return total


def waiting_nbytes(
    search: Search,
    candidate: Candidate,
    chosen: Mapping[str, Strategy],
    stored: Mapping[str, Storage],
    stage: int,
) -> float | None:
    """Bytes of a microbatch that stay between the two parts of its backward; None: all that its forward kept."""
    if stage == 0:
        return None
    columns = candidate.columns

    def size(value: fx.Node) -> float:
        maker, position = resolve(value)
        return columns.local_nbytes(value, placed(chosen.get(maker.name), position))

    read: dict[tuple[fx.Node, int], float] = {}
    gradients = 0.0
    for node, weights in _products(search, candidate, stored, stage):
        for argument in tensor_args(node):
            if argument not in weights and needs_grad(argument):
                read[root(argument)] = size(argument)
        gradients += size(node)
    return sum(read.values()) + gradients


def _segments(candidate: Candidate, stage: int) -> tuple[int, int]:
    bounds = [*candidate.choice.bounds, len(candidate.segments)]
    return bounds[stage], bounds[stage + 1]


def _products(
    search: Search, candidate: Candidate, stored: Mapping[str, Storage], stage: int
) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Products of a stage, with their weights that can wait."""
    trace = search.trace
    for index in range(*_segments(candidate, stage)):
        for node in ops_of(trace, trace.segments[index]):
            if not is_product(node):
                continue
            weights = []
            for argument in tensor_args(node):
                name = resolve(argument)[0].name
                source, kept = trace.sources.get(name), stored.get(name)
                trained = source is not None and source.kind == "param" and source.trainable
                if trained and (kept is None or kept.level < _RESIDENT):
                    weights.append(argument)
            if weights:
                yield node, weights
