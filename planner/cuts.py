"""Where a line of compute nodes may be cut cheaply, and which of these cuts make the segments.

A cut before position i costs the number of floating values made before i and still needed at or after i, those left
out that pass by: whose uses before and after i are `PASSING_HEAVY` or more heavy ops apart (a U-Net's skips). A
position is a *valley* where that number is lower than on either side, and a candidate where it is also the least within
`REACH_HEAVY` heavy ops on one of its sides, and at most twice the least on the other. Between the halves of a decoder
layer one value crosses (the residual stream), in a decoder with cross attention also the encoder's output and the
position bias, but never the inside of a layer. From the candidates, cuts are taken so that every segment has a heavy
op. Inside a segment that has several, the search goes on for places where a single value crosses among those that are
used inside. All of it is linear in the number of nodes, times the depth of nesting.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import fx

from shardplan.planner.trace import module_path, mutated

REACH_HEAVY = 6
REACH_NODES = 16
PASSING_HEAVY = 9

HEAVY = frozenset(
    [
        *("linear", "addmm", "mm", "bmm", "matmul", "baddbmm", "addbmm", "mv", "einsum", "bilinear", "_grouped_mm"),
        *("conv1d", "conv2d", "conv3d", "convolution", "_convolution"),
        *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        *("scaled_dot_product_attention", "embedding", "embedding_bag", "lstm", "gru", "rnn_tanh", "rnn_relu"),
    ]
)
EMBEDDINGS = frozenset(["embedding", "embedding_bag"])
EPILOGUES = frozenset(
    [
        *("relu", "gelu", "silu", "tanh", "sigmoid", "elu", "leaky_relu", "hardtanh", "hardswish", "mish", "softplus"),
        *("dropout", "batch_norm", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    ]
)


def op_name(node: fx.Node) -> str:
    """Operator name without namespace and overload, "" for what is not an operator."""
    return node.target._schema.name.split("::")[1] if isinstance(node.target, torch._ops.OpOverload) else ""


def is_heavy(node: fx.Node) -> bool:
    """Matrix products, convolutions, attention, embeddings, and every op that is not PyTorch's own."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return op_name(node) in HEAVY or node.target.namespace not in ("aten", "prims", "prim")


def find_cuts(compute: Sequence[fx.Node]) -> list[int]:
    """Bounds of the segments in `compute`, its ends included: [0, ..., len(compute)]."""
    if not compute:
        return [0]
    line = _Line(compute)
    bounds = _take(line, _candidates(line), 0, len(compute))
    pending = list(pairwise(bounds))[::-1]
    bounds = [0]
    while pending:
        start, stop = pending.pop()
        inner = _take(line, _streams(line, start, stop), start, stop)
        if len(inner) == 2:
            bounds.append(stop)
        else:
            pending += list(pairwise(inner))[::-1]
    return _merge_embeddings(line, bounds)


def possible_cuts(compute: Sequence[fx.Node]) -> list[int]:
    """Every position in `compute` where a cut is legal, cheap or not."""
    closed = _Line(compute).closed
    return [i for i in range(1, len(compute)) if i not in closed]


class _Line:
    """The compute nodes by position.

    first, uses: positions where the floating values are made, and, for each value, the sorted positions of its uses.
    closed: positions where no cut may be (between an op with several results and the getitems that take them apart, and
        between the ops that read or write a buffer that changes: it lives on one stage).
    heavy: positions of the heavy ops.
    """

    def __init__(self, compute: Sequence[fx.Node]) -> None:
        self.nodes = compute
        position = self.position = {node: i for i, node in enumerate(compute)}
        self.uses: list[list[int]] = []
        self.closed: set[int] = set()
        for i, node in enumerate(compute):
            uses = sorted(position[user] for user in node.users if user in position)
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor) and uses:
                self.closed.update(range(i + 1, uses[-1] + 1))
            floating = isinstance(value, torch.Tensor) and value.dtype.is_floating_point
            self.uses.append(uses if floating else [])
        for buffer in {buffer for node in compute for buffer in mutated(node)}:
            touching = sorted(position[user] for user in buffer.users if user in position)
            self.closed.update(range(touching[0] + 1, touching[-1] + 1))
        self.heavy = [i for i, node in enumerate(compute) if is_heavy(node)]
        self.embeds = [op_name(compute[i]) in EMBEDDINGS for i in self.heavy]

    def entries(self, start: int, stop: int) -> list[list[int]]:
        """For every value from before `start`: its uses within [start, stop)."""
        found: dict[fx.Node, list[int]] = {}
        for i in range(start, stop):
            for argument in self.nodes[i].all_input_nodes:
                made = self.position.get(argument, start)
                if made < start and self.uses[made]:
                    found.setdefault(argument, []).append(i)
        return list(found.values())

    def count(self, start: int, stop: int) -> int:
        """Number of heavy ops in [start, stop)."""
        return bisect.bisect_left(self.heavy, stop) - bisect.bisect_left(self.heavy, start)

    def spans(self, places: Sequence[int]) -> list[tuple[int, int]]:
        """Pairs of consecutive places (making, uses) of a value between which it does not merely pass by."""
        return [(a, b) for a, b in pairwise(places) if self.count(a + 1, b) < PASSING_HEAVY]

    def only_embeds(self, start: int, stop: int) -> bool:
        a, b = bisect.bisect_left(self.heavy, start), bisect.bisect_left(self.heavy, stop)
        return all(self.embeds[a:b])


def _accumulate(spans: list[tuple[int, int]], start: int, stop: int) -> list[int]:
    """For each cut position in (start, stop): how many spans (made at, last used at) cross it."""
    change = [0] * (stop - start + 2)
    for made, used in spans:
        low, high = max(made + 1, start + 1), min(used, stop - 1)
        if low <= high:
            change[low - start] += 1
            change[high - start + 1] -= 1
    total, found = 0, []
    for step in change[1 : stop - start]:
        total += step
        found.append(total)
    return found


def _candidates(line: _Line) -> list[int]:
    """Valleys of the whole line that are as low as anything within reach on one side, and not far above the other."""
    count = len(line.nodes)
    costs = _accumulate([span for i, uses in enumerate(line.uses) for span in line.spans([i, *uses])], 0, count)
    left = _reach_minimum(costs, _reach(line.heavy, count))
    backwards = [count - 1 - i for i in reversed(line.heavy)]
    right = _reach_minimum(costs[::-1], _reach(backwards, count))[::-1]
    valley = _valleys(costs)
    return [
        i + 1
        for i, cost in enumerate(costs)
        if valley[i] and cost <= min(max(left[i], right[i]), 2 * min(left[i], right[i])) and i + 1 not in line.closed
    ]


def _reach(heavy: Sequence[int], count: int) -> list[int]:
    """For each cut position (index i is the cut before node i + 1) the index of the farthest cut to its left that
    counts."""
    found = []
    for i in range(count - 1):
        passed = bisect.bisect_left(heavy, i + 1)
        far = heavy[passed - REACH_HEAVY - 1] if passed > REACH_HEAVY else 0
        found.append(max(0, min(far, i - REACH_NODES)))
    return found


def _reach_minimum(values: Sequence[int], farthest: Sequence[int]) -> list[int]:
    """Minimum of values[farthest[i] .. i] for every i; farthest must not decrease."""
    kept: deque[int] = deque()
    found = []
    for i, value in enumerate(values):
        while kept and values[kept[-1]] >= value:
            kept.pop()
        kept.append(i)
        while kept[0] < farthest[i]:
            kept.popleft()
        found.append(values[kept[0]])
    return found


def _valleys(values: Sequence[int]) -> list[bool]:
    """Whether the first different value on each side is higher (the ends count as higher)."""

    def rises(ordered: Sequence[int]) -> list[bool]:
        higher, found = True, []
        for i, value in enumerate(ordered):
            if i and ordered[i - 1] != value:
                higher = ordered[i - 1] > value
            found.append(higher)
        return found

    return [a and b for a, b in zip(rises(values), rises(values[::-1])[::-1], strict=True)]


def _streams(line: _Line, start: int, stop: int) -> list[int]:
    """Positions inside a segment where one value crosses, those that only pass by left out.

    Of a value made inside only the uses inside count, unless it has none (then it leaves the segment, and passes by
    from where it is made); a value from before counts between its first and its last use inside.
    """
    if line.count(start, stop) < 2:
        return []
    spans = []
    for i in range(start, stop):
        uses = line.uses[i]
        spans += line.spans([i, *uses[: bisect.bisect_left(uses, stop)]])
    for uses in line.entries(start, stop):
        spans += line.spans(uses)
    costs = _accumulate(spans, start, stop)
    return [start + 1 + i for i, cost in enumerate(costs) if cost <= 1 and start + 1 + i not in line.closed]


def _take(line: _Line, candidates: Sequence[int], start: int, stop: int) -> list[int]:
    """From the candidates in (start, stop), in order, those that leave a heavy op on both sides; bounds included.

    Light ops between two heavy ones open the next segment, unless they finish the one before.
    """
    bounds = [start]
    allowed = set(candidates)
    for candidate in candidates:
        if candidate <= bounds[-1] or not line.count(bounds[-1], candidate):
            continue
        if not line.count(candidate, stop):
            break
        cut = reached = candidate
        while reached < stop and _finishes(line.nodes[reached], line.nodes[reached - 1]):
            reached += 1
            if reached in allowed:
                cut = reached
        bounds.append(cut)
    return [*bounds, stop]


def _finishes(node: fx.Node, before: fx.Node) -> bool:
    """Whether a light op belongs to what comes before it: an activation, the rest of the same module, bookkeeping."""
    if is_heavy(node):
        return False
    if op_name(node) in EPILOGUES or mutated(node):
        return True
    here, there = module_path(node), module_path(before)
    around_here, around_there = here.rpartition(".")[0], there.rpartition(".")[0]
    return bool(there) and (here in (there, around_there) or around_here in (there, around_there)) and bool(here)


def _merge_embeddings(line: _Line, bounds: list[int]) -> list[int]:
    """Embeddings that are added up (tokens, positions, types) stay together."""
    kept = bounds[:1]
    for before, bound, after in zip(bounds, bounds[1:], bounds[2:], strict=False):
        if not (line.only_embeds(before, bound) and line.only_embeds(bound, after)):
            kept.append(bound)
    return [*kept, bounds[-1]]
