"""Views: one algorithm on groups of dims. A split of a merged dim is a split of its outermost factor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from shardplan.planner.placement import P, R, S
from shardplan.planner.rules.letters import Term, linear_in, split_letters
from shardplan.planner.rules.strategy import Strategy
from shardplan.planner.trace import info, infos, tensor_args

aten = torch.ops.aten

RESHAPES = frozenset(
    {
        aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
        aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unflatten.int,
        aten.view_as.default,
    }
)  # fmt: skip
PERMUTES = frozenset(
    {
        aten.transpose.int, aten.permute.default, aten.t.default, aten.movedim.int, aten.numpy_T.default,
        aten.swapaxes.default, aten.swapdims.default, aten.mT.default,
    }
)  # fmt: skip


def groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of dims of equal product: ([dims before], [dims after]), in order. Dims of size 1 are in none."""
    left = [i for i, extent in enumerate(before) if extent != 1]
    right = [i for i, extent in enumerate(after) if extent != 1]
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        mine, theirs = [left[i]], [right[j]]
        a, b = before[left[i]], after[right[j]]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a *= before[left[i]]
                mine.append(left[i])
                i += 1
            else:
                b *= after[right[j]]
                theirs.append(right[j])
                j += 1
        found.append((mine, theirs))
    return found


def reshape(node: fx.Node) -> list[Strategy]:
    """A view or reshape. The outermost dim of a group may be split on both sides at once."""
    source = tensor_args(node)[0]
    before, after = info(source).shape, infos(node)[0].shape
    found: list[Strategy] = []
    others = (R,) * (len(tensor_args(node)) - 1)
    if 0 not in before:
        for mine, theirs in groups(before, after):
            found.append(Strategy(f"g{mine[0]}", (S(mine[0]), *others), (S(theirs[0]),)))
    return [*found, linear_in(node, (0,))]


def inner_splits(node: fx.Node) -> list[Strategy]:
    """Splits of a dim that is merged behind another (the batch of a [seq, batch, ...] tensor that is flattened): the
    merged dim then consists of as many sections as the outer factor counts."""
    before, after = info(tensor_args(node)[0]).shape, infos(node)[0].shape
    found: list[Strategy] = []
    others = (R,) * (len(tensor_args(node)) - 1)
    if 0 in before:
        return found
    for mine, theirs in groups(before, after):
        if len(theirs) == 1:
            for k in range(1, len(mine)):
                outer = math.prod(before[i] for i in mine[:k])
                merged = S(theirs[0], (after[theirs[0]] // outer,) * outer)
                found.append(Strategy(f"i{mine[k]}", (S(mine[k]), *others), (merged,)))
        elif len(mine) == 1:
            for k in range(1, len(theirs)):
                outer = math.prod(after[i] for i in theirs[:k])
                merged = S(mine[0], (before[mine[0]] // outer,) * outer)
                found.append(Strategy(f"i{mine[0]}", (merged, *others), (S(theirs[k]),)))
    return found


def permute(node: fx.Node) -> list[Strategy]:
    """A reordering of dims, found by running it on distinct extents."""
    rank = len(info(tensor_args(node)[0]).shape)
    probe = torch.empty([i + 2 for i in range(rank)], device="meta")
    order = [extent - 2 for extent in node.target(probe, *node.args[1:], **node.kwargs).shape]  # type: ignore[operator]
    letters: Term = [f"b{i}" for i in range(rank)]
    return [*split_letters(node, [letters], [[letters[i] for i in order]]), linear_in(node, (0,))]


def expand(node: fx.Node) -> list[Strategy]:
    """Broadcasting to a size: a dim that is repeated is split in the result only."""
    shape, result = info(tensor_args(node)[0]).shape, infos(node)[0].shape
    offset = len(result) - len(shape)
    letters: Term = [f"b{i}" if extent > 1 else None for i, extent in enumerate(result)]
    term = [letters[offset + i] if extent == result[offset + i] else None for i, extent in enumerate(shape)]
    return [*split_letters(node, [term], [letters]), linear_in(node, (0,))]


def other_dims(node: fx.Node, fixed: Sequence[int], linear: bool = False) -> list[Strategy]:
    """An op of one tensor, and results of the same rank, that mixes only the dims `fixed`."""
    rank = len(info(tensor_args(node)[0]).shape)
    whole = {dim % max(rank, 1) for dim in fixed}
    letters: Term = [None if i in whole else f"b{i}" for i in range(rank)]
    found = split_letters(node, [letters] * len(tensor_args(node)), [letters] * len(infos(node)))
    return [*found, linear_in(node, range(len(tensor_args(node))))] if linear else found


def sections(node: fx.Node, dim: int) -> list[Strategy]:
    """chunk, split: other dims pass; the split dim is sharded section by section."""
    rank = len(info(tensor_args(node)[0]).shape)
    dim %= rank
    sizes = tuple(result.shape[dim] for result in infos(node))
    found = other_dims(node, (dim,), linear=True)
    if len(sizes) > 1:
        found.append(Strategy("sections", (S(dim, sizes),), tuple(S(dim) for _ in sizes)))
    return found


def stack(node: fx.Node, dim: int) -> list[Strategy]:
    """stack: a new dim among those of the arguments."""
    rank = len(infos(node)[0].shape)
    dim %= rank
    letters: Term = [f"b{i}" for i in range(rank - 1)]
    count = len(tensor_args(node))
    found = split_letters(node, [letters] * count, [[*letters[:dim], None, *letters[dim:]]])
    return [*found, linear_in(node, range(count))]


def select(node: fx.Node, dim: int) -> list[Strategy]:
    """select, unbind: one dim goes."""
    rank = len(info(tensor_args(node)[0]).shape)
    dim %= rank
    letters: Term = [None if i == dim else f"b{i}" for i in range(rank)]
    rest = [x for i, x in enumerate(letters) if i != dim]
    return [*split_letters(node, [letters], [rest] * len(infos(node))), linear_in(node, (0,))]


def summand(node: fx.Node) -> Strategy:
    """Every argument a summand, so is the result."""
    return Strategy("p", (P,) * len(tensor_args(node)), (P,) * len(infos(node)))
