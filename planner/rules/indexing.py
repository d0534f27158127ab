"""Lookups and writes by index. Where an index is split the source is read whole; where values are added at an index
that is split, what they are added to is a summand."""

from __future__ import annotations

import torch
from torch import fx

from shardplan.planner.rules import positions
from shardplan.planner.rules.letters import Term, broadcast_terms, linear_in, split_letters
from shardplan.planner.rules.randomness import random_impl
from shardplan.planner.rules.schema import argument, shapes
from shardplan.planner.rules.strategy import Strategy
from shardplan.planner.trace import info, infos, tensor_args

aten = torch.ops.aten


def embedding(node: fx.Node) -> list[Strategy]:
    index: Term = [f"b{i}" for i in range(len(shapes(node)[1]))]
    # Gradients divided by how often a row occurs in the batch: the batch must be seen whole.
    skip = ["v", *index] if argument(node, "scale_grad_by_freq") else []
    return split_letters(
        node, [["v", "e"], index], [[*index, "e"]], partial=("v",), impl={"v": "vocab_embedding"},
        skip=[x for x in skip if x],
    )  # fmt: skip


def _dims(node: fx.Node) -> tuple[int, int]:
    """(dim, rank) of an op along a dim of its first tensor."""
    rank = len(shapes(node)[0])
    return int(argument(node, "dim", 0)) % max(rank, 1), rank


def gather(node: fx.Node) -> list[Strategy]:
    source, index = shapes(node)
    if len(source) != len(index) or argument(node, "dim") is None:
        return []
    dim, rank = _dims(node)
    term: Term = [f"b{i}" if i != dim and source[i] == index[i] else None for i in range(rank)]
    along: Term = [f"i{i}" if i == dim else None for i in range(rank)]
    found = split_letters(node, [term, term], [term])
    return [*found, *split_letters(node, [[None] * rank, along], [along]), linear_in(node, (0,))]


def overwrite(node: fx.Node) -> list[Strategy]:
    """slice_scatter, select_scatter: a part of one dim replaced."""
    dim, rank = _dims(node)
    term: Term = [None if i == dim else f"b{i}" for i in range(rank)]
    part = term if len(shapes(node)[1]) == rank else [x for i, x in enumerate(term) if i != dim]
    return [*split_letters(node, [term, part], [term]), linear_in(node, (0, 1))]


def scatter(node: fx.Node) -> list[Strategy]:
    """scatter, scatter_add, scatter_reduce: self, index and, unless it is a number, src, all of one rank."""
    sizes = shapes(node)
    dim, rank = _dims(node)
    term: Term = [f"b{i}" if i != dim and len({s[i] for s in sizes}) == 1 else None for i in range(rank)]
    found = split_letters(node, [term] * len(sizes), [term])
    if node.target is aten.scatter_add.default:
        along: Term = [None] * rank
        if sizes[1] == sizes[2]:
            along = ["i" if i == dim else None for i in range(rank)]
        found += split_letters(
            node, [[None] * rank, along, along], [[None] * rank], partial=("i",), summand=0
        )  # fmt: skip
    if node.target in (aten.scatter_add.default, aten.scatter.src):
        found.append(linear_in(node, (0, 2)))
    return found


def index_select(node: fx.Node) -> list[Strategy]:
    dim, rank = _dims(node)
    term: Term = [None if i == dim else f"b{i}" for i in range(rank)]
    result: Term = ["i" if i == dim else f"b{i}" for i in range(rank)]
    index: Term = ["i"] * len(shapes(node)[1])
    return [*split_letters(node, [term, index], [result]), linear_in(node, (0,))]


def index_add(node: fx.Node) -> list[Strategy]:
    dim, rank = _dims(node)
    term: Term = [None if i == dim else f"b{i}" for i in range(rank)]
    part: Term = ["i" if i == dim else f"b{i}" for i in range(rank)]
    found = split_letters(node, [term, ["i"], part], [term], partial=("i",), summand=0)
    return [*found, linear_in(node, (0, 2))]


def _indexed(node: fx.Node) -> tuple[Term, list[Term], Term, dict[str, str]] | None:
    """(source, indices, result, implementations) of ``x[i, :, j]``; None where an index is a mask."""
    indices = argument(node, "indices")
    used = [i for i, item in enumerate(indices) if item is not None]
    taken = [info(indices[i]) for i in used]
    if not used or any(t.dtype in (torch.bool, torch.uint8) for t in taken):
        return None
    common = tuple(torch.broadcast_shapes(*(t.shape for t in taken)))
    terms, letters = broadcast_terms([t.shape for t in taken], common)

    def named(term: Term) -> Term:
        return [None if x is None else f"i{x}" for x in term]

    source: Term = [None if i in used else f"b{i}" for i in range(len(shapes(node)[0]))]
    together = used == list(range(used[0], used[-1] + 1))
    before = source[: used[0]] if together else []
    after = source[used[-1] + 1 :] if together else [x for i, x in enumerate(source) if i not in used]
    rows = [named(term) for term in terms]
    source, impl = positions.rows(node, source, rows, used)
    return source, rows, [*before, *named(letters), *after], impl


def index(node: fx.Node) -> list[Strategy]:
    """x[i, j, ...]: dims that are not indexed, and the dims of the indices."""
    found = _indexed(node)
    if found is None:
        return []
    source, terms, result, impl = found
    return [*split_letters(node, [source, *terms], [result], impl=impl), linear_in(node, (0,))]


def index_put(node: fx.Node) -> list[Strategy]:
    """x[i, j, ...] = values, or += (accumulate)."""
    found = _indexed(node)
    if found is None:
        return _masked_put(node)
    source, terms, result, impl = found
    values = shapes(node)[-1]
    offset = len(result) - len(values)
    term: Term = [None if extent == 1 else result[offset + i] for i, extent in enumerate(values)]
    gone = {x for t in terms for x in t if x} - set(source) if argument(node, "accumulate") else set()
    strategies = split_letters(node, [source, *terms, term], [source], partial=gone, summand=0, impl=impl)
    return [*strategies, linear_in(node, (0, len(terms) + 1))]


def _masked_put(node: fx.Node) -> list[Strategy]:
    """x[mask] = number: as elementwise as masked_fill."""
    indices = argument(node, "indices")
    sizes = shapes(node)
    if len(indices) != 1 or len(sizes) != 3 or sizes[2] not in ((), (1,)) or argument(node, "accumulate"):
        return []
    term: Term = [f"b{i}" for i in range(len(sizes[0]))]
    return split_letters(node, [term, term[: len(sizes[1])], [None] * len(sizes[2])], [term])


def one_hot(node: fx.Node) -> list[Strategy]:
    if argument(node, "num_classes") == -1:
        return []  # the largest label decides
    term: Term = [f"b{i}" for i in range(len(shapes(node)[0]))]
    return split_letters(node, [term], [[*term, None]])


def searchsorted(node: fx.Node) -> list[Strategy]:
    """Sorted rows [..., n] and values [..., m]; one row serves values of any shape."""
    sizes = shapes(node)
    term: Term = [f"b{i}" for i in range(len(infos(node)[0].shape))]
    if len(tensor_args(node)) != 2:
        return []
    rows: Term = [*term[:-1], None] if len(sizes[0]) > 1 else [None]
    return split_letters(node, [rows, term], [term])


def multinomial(node: fx.Node) -> list[Strategy]:
    """Rows of weights are independent."""
    rows: Term = [f"b{i}" for i in range(len(shapes(node)[0]) - 1)]
    return split_letters(node, [[*rows, None]], [[*rows, None]], impl=random_impl(node))
