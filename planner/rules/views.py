"""Views: one algorithm on groups of dims. A split of a merged dim is a split of its outermost factor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import fx

from shardplan.planner.placement import Placement, S
from shardplan.planner.rules.letters import Term, broadcast_terms, linear_in, split_letters
from shardplan.planner.rules.schema import argument
from shardplan.planner.rules.strategy import Strategy
from shardplan.planner.trace import info, infos, tensor_args

aten = torch.ops.aten

RESHAPES = frozenset(
    {
        aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
        aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unflatten.int,
        aten.view_as.default, aten.reshape_as.default, aten.ravel.default,
    }
)  # fmt: skip
PERMUTES = frozenset(
    {
        aten.transpose.int, aten.permute.default, aten.t.default, aten.movedim.int, aten.numpy_T.default,
        aten.swapaxes.default, aten.swapdims.default, aten.mT.default, aten.movedim.intlist, aten.moveaxis.int,
        aten.moveaxis.intlist, aten.mH.default, aten.matrix_H.default, aten.adjoint.default, aten.t_copy.default,
        aten.transpose_copy.int, aten.permute_copy.default,
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


FUSED = 4
"""How many tensors are taken to be fused in one dim at most (query, key and value; the gates of a recurrent cell)."""


def reshape(node: fx.Node) -> list[Strategy]:
    """A view or reshape. The outermost dim of a group may be split on both sides at once; inner dims of few outer ones
    (see `FUSED`) section by section. A second tensor argument gives the shape only."""
    before, after = info(tensor_args(node)[0]).shape, infos(node)[0].shape
    found: list[Strategy] = []
    if 0 not in before:
        for mine, theirs in groups(before, after):
            found.append(_regroup(node, f"g{mine[0]}", S(mine[0]), S(theirs[0])))
    return [*found, *inner_splits(node, FUSED), linear_in(node, (0,))]


LONGEST = 8192
"""Sections of a dim at most: a sequence in front of a batch. Tokens in front of their choices are more."""


def inner_splits(node: fx.Node, most: int = LONGEST) -> list[Strategy]:
    """Splits of a dim that is merged behind others (the batch of a [seq, batch, ...] tensor that is flattened): the
    merged dim then consists of as many sections as the outer factor counts. most: sections, at most."""
    before, after = info(tensor_args(node)[0]).shape, infos(node)[0].shape
    found: list[Strategy] = []
    if 0 in before:
        return found
    for mine, theirs in groups(before, after):
        single, many = (theirs, mine) if len(theirs) == 1 else (mine, theirs)
        if len(single) > 1:
            continue
        extents = before if many is mine else after
        for k in range(1, len(many)):
            outer = math.prod(extents[i] for i in many[:k])
            if outer > most:
                break
            merged = S(single[0], (math.prod(extents[i] for i in many[k:]),) * outer)
            ins, outs = (S(many[k]), merged) if many is mine else (merged, S(many[k]))
            found.append(_regroup(node, f"i{ins.dim}", ins, outs))
    return found


def _regroup(node: fx.Node, name: str, before: Placement, after: Placement) -> Strategy:
    return Strategy(name, (before, *(after for _ in tensor_args(node)[1:])), (after,))


def order_of(node: fx.Node, rank: int) -> list[int]:
    """The dims of the argument in the order that the result has them, found by running it on distinct extents."""
    probe = torch.empty([i + 2 for i in range(rank)], device="meta")
    return [extent - 2 for extent in node.target(probe, *node.args[1:], **node.kwargs).shape]  # type: ignore[operator]


def permute(node: fx.Node) -> list[Strategy]:
    """A reordering of dims."""
    rank = len(info(tensor_args(node)[0]).shape)
    order = order_of(node, rank)
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


def slice_(node: fx.Node) -> list[Strategy]:
    """A dim that is taken whole can be split. One that is cut can be split section by section, where the slices of it
    and of its siblings are the sections (halves of a gated projection)."""
    before, after = info(tensor_args(node)[0]).shape, infos(node)[0].shape
    found = other_dims(node, [i for i in range(len(before)) if before[i] != after[i]], linear=True)
    here = _cut(node)
    if here is None:
        return found
    dim, start, stop = here
    siblings = [_cut(user) for user in tensor_args(node)[0].users if user.target is node.target]
    marks = {mark for cut in siblings if cut is not None and cut[0] == dim for mark in cut[1:]}
    edges = sorted({0, before[dim], *marks})
    sizes = tuple(high - low for low, high in itertools.pairwise(edges))
    inside = tuple(size for size, low in zip(sizes, edges, strict=False) if start <= low < stop)
    if 1 < len(sizes) <= FUSED:
        found.append(Strategy("sections", (S(dim, sizes),), (S(dim, inside if len(inside) > 1 else ()),)))
    return found


def narrow(node: fx.Node) -> list[Strategy]:
    return other_dims(node, (argument(node, "dim"),), linear=True)


def _cut(node: fx.Node) -> tuple[int, int, int] | None:
    """(dim, start, stop) of a slice that takes a part of a dim without steps."""
    before, after = info(tensor_args(node)[0]).shape, infos(node)[0].shape
    dim = argument(node, "dim") % max(len(before), 1)
    start = argument(node, "start") or 0
    if argument(node, "step") != 1 or before == after or 0 in after:
        return None
    start = max(start + before[dim], 0) if start < 0 else start
    return dim, start, start + after[dim]


def stack(node: fx.Node, dim: int) -> list[Strategy]:
    """stack: a new dim among those of the arguments."""
    rank = len(infos(node)[0].shape)
    dim %= rank
    letters: Term = [f"b{i}" for i in range(rank - 1)]
    count = len(tensor_args(node))
    found = split_letters(node, [letters] * count, [[*letters[:dim], None, *letters[dim:]]])
    return [*found, linear_in(node, range(count))]


def repeat(node: fx.Node) -> list[Strategy]:
    """Tiling: a dim of one entry that is repeated is split in the result only; a longer one copy by copy."""
    shape = info(tensor_args(node)[0]).shape
    counts = list(argument(node, "repeats") or argument(node, "dims") or ())
    counts = [1] * (len(shape) - len(counts)) + counts  # tile may name fewer than there are
    offset = len(counts) - len(shape)
    term: Term = [f"b{offset + i}" if counts[offset + i] == 1 else None for i in range(len(shape))]
    result: Term = [
        f"b{i}" if count == 1 or i < offset or shape[i - offset] == 1 else None for i, count in enumerate(counts)
    ]
    found = split_letters(node, [term], [result])
    for dim, extent in enumerate(shape):
        count = counts[offset + dim]
        if count > 1 and extent > 1:
            copies = S(offset + dim, (extent,) * count)
            found.append(Strategy(f"c{offset + dim}", (S(dim),), (copies,)))
    return [*found, linear_in(node, (0,))]


def broadcast_tensors(node: fx.Node) -> list[Strategy]:
    terms, letters = broadcast_terms([info(a).shape for a in tensor_args(node)], infos(node)[0].shape)
    return [*split_letters(node, terms, [letters] * len(terms)), linear_in(node, range(len(terms)))]


def meshgrid(node: fx.Node) -> list[Strategy]:
    letters: Term = [f"b{i}" for i in range(len(infos(node)[0].shape))]
    terms: list[Term] = [[x] for x in letters]
    if argument(node, "indexing", "ij") == "xy":
        letters = [*reversed(letters[:2]), *letters[2:]]
    return split_letters(node, terms, [letters] * len(terms))


def diagonal(node: fx.Node) -> list[Strategy]:
    rank = len(info(tensor_args(node)[0]).shape)
    gone = {argument(node, "dim1") % rank, argument(node, "dim2") % rank}
    term: Term = [None if i in gone else f"b{i}" for i in range(rank)]
    rest: Term = [*(x for i, x in enumerate(term) if i not in gone), None]
    return [*split_letters(node, [term], [rest]), linear_in(node, (0,))]


def windows(node: fx.Node) -> list[Strategy]:
    """unfold: a dim becomes windows of it, their contents last."""
    rank = len(info(tensor_args(node)[0]).shape)
    dim = argument(node, "dimension") % max(rank, 1)
    term: Term = [None if i == dim else f"b{i}" for i in range(rank)]
    return [*split_letters(node, [term], [[*term, None]]), linear_in(node, (0,))]


def select(node: fx.Node, dim: int) -> list[Strategy]:
    """select, unbind: one dim goes."""
    rank = len(info(tensor_args(node)[0]).shape)
    dim %= rank
    letters: Term = [None if i == dim else f"b{i}" for i in range(rank)]
    rest = [x for i, x in enumerate(letters) if i != dim]
    return [*split_letters(node, [letters], [rest] * len(infos(node))), linear_in(node, (0,))]
