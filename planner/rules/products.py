"""Products: linear maps, convolutions, attention. A contracted letter gives summands."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from shardplan.planner.rules.letters import Term, broadcast_terms, from_rule, linear_in, split_letters
from shardplan.planner.rules.randomness import random_impl
from shardplan.planner.rules.schema import argument, shapes
from shardplan.planner.rules.strategy import Strategy
from shardplan.planner.trace import info, infos, tensor_args

aten = torch.ops.aten


def linear(node: fx.Node) -> list[Strategy]:
    found = from_rule(node, "... k, n k, n -> ... n", partial=("k",), summand=2)
    return [*found, linear_in(node, (0, 2) if len(tensor_args(node)) > 2 else (0,))]


def addmm(node: fx.Node) -> list[Strategy]:
    term = _added(shapes(node)[0], ["m", "n"])
    found = split_letters(node, [term, ["m", "k"], ["k", "n"]], [["m", "n"]], partial=("k",), summand=0)
    return [*found, linear_in(node, (0, 1))]


def baddbmm(node: fx.Node) -> list[Strategy]:
    term = _added(shapes(node)[0], ["b", "m", "n"])
    found = split_letters(node, [term, ["b", "m", "k"], ["b", "k", "n"]], [["b", "m", "n"]], partial=("k",), summand=0)
    return [*found, linear_in(node, (0, 1)), linear_in(node, (0, 2))]


def _added(shape: tuple[int, ...], letters: Term) -> Term:
    """Term of a tensor that is broadcast and added to a product."""
    return [None if extent == 1 else x for x, extent in zip(letters[len(letters) - len(shape) :], shape, strict=True)]


def matmul(node: fx.Node) -> list[Strategy]:
    left, right = shapes(node)
    if len(left) == 1 and len(right) == 1:
        found = from_rule(node, "k, k -> ", partial=("k",))
    elif len(left) == 1 or len(right) == 1:
        rule = "k, ... k n -> ... n" if len(left) == 1 else "... m k, k -> ... m"
        found = from_rule(node, rule, partial=("k",))
    else:
        batch = infos(node)[0].shape[:-2]
        terms, result = broadcast_terms([left[:-2], right[:-2]], batch)
        found = split_letters(
            node, [[*terms[0], "m", "k"], [*terms[1], "k", "n"]], [[*result, "m", "n"]], partial=("k",)
        )
    return [*found, linear_in(node, (0,)), linear_in(node, (1,))]


def outer(node: fx.Node) -> list[Strategy]:
    return [*from_rule(node, "m, n -> m n"), linear_in(node, (0,)), linear_in(node, (1,))]


def bilinear(node: fx.Node) -> list[Strategy]:
    return from_rule(node, "... i, ... j, n i j, n -> ... n", partial=("i", "j"), summand=3)


def cdist(node: fx.Node) -> list[Strategy]:
    left, right = shapes(node)
    terms, result = broadcast_terms([left[:-2], right[:-2]], infos(node)[0].shape[:-2])
    return split_letters(node, [[*terms[0], "m", None], [*terms[1], "n", None]], [[*result, "m", "n"]])


def einsum(node: fx.Node) -> list[Strategy]:
    sizes = shapes(node)
    text = str(node.args[0]).replace(" ", "").replace("...", ".")
    left, arrow, right = text.partition("->")
    words = left.split(",")
    if not arrow:
        once = sorted(x for x in set(left) - {",", "."} if left.count(x) == 1)
        right = ("." if "." in left else "") + "".join(once)
    width = max((len(size) - len(word) + 1 for word, size in zip(words, sizes, strict=True) if "." in word), default=0)

    def term(word: str, rank: int | None = None) -> Term:
        mine = width if rank is None else rank - len(word) + 1
        dots: Term = [f"b{i}" for i in range(width - mine, width)]
        return [x for c in word for x in (dots if c == "." else [c])]

    terms = [term(word, len(size)) for word, size in zip(words, sizes, strict=True)]
    if any(len(set(t)) != len(t) for t in terms):
        return []
    result = term(right)
    gone = {x for t in terms for x in t if x is not None} - set(result)
    found = split_letters(node, terms, [result], partial=gone)
    return [*found, *(linear_in(node, (slot,)) for slot in range(len(terms)))]


_ALIGNED_NBYTES = 16


def grouped_mm(node: fx.Node) -> list[Strategy]:
    """Products of groups of rows (or columns) with a matrix each; offsets say where a group ends, so that dim is not
    split. Rows of local tensors must begin at multiples of 16 bytes."""
    if argument(node, "bias") is not None:
        return []
    left, right = shapes(node)[:2]
    rules = {
        (3, 3): "g m k, g k n -> g m n",
        (2, 3): "_ k, _ k n, _ -> _ n",
        (3, 2): "_ m k, k _, _ -> m _",
        (2, 2): "m _, _ n, _ -> _ m n",
    }
    unit = _ALIGNED_NBYTES // info(tensor_args(node)[0]).dtype.itemsize
    inner = {"k": left[-1] // unit, "n": right[-1] // unit} if unit > 1 else {}
    if len(left) == len(right) == 2:
        inner["m"] = left[0] // unit
    found = from_rule(node, rules[len(left), len(right)], partial=("k",), groups=inner)
    return [*found, linear_in(node, (0,)), linear_in(node, (1,))]


# -- convolutions ------------------------------------------------------------------------------------------------------


def convolution(node: fx.Node) -> list[Strategy]:
    """x [n, c, ...], weight [o, c / groups, ...] (transposed: [c, o / groups, ...]), bias [o].

    Grouped channels are split group by group.
    """
    sizes = shapes(node)
    rank = len(sizes[1])
    windows: Term = [None] * (rank - 2)
    sample: Term = ["n"] if len(sizes[0]) == rank else []
    groups = argument(node, "groups", 1)
    transposed = bool(argument(node, "transposed", "transpose" in node.target._opname))  # type: ignore[union-attr]
    has_bias = len(sizes) > 2
    slots = (0, 2) if has_bias else (0,)
    if groups == 1:
        weight: Term = ["c", "o"] if transposed else ["o", "c"]
        terms: list[Term] = [[*sample, "c", *windows], [*weight, *windows], ["o"]][: len(sizes)]
        result: Term = [*sample, "o", *windows]
        found = split_letters(node, terms, [result], partial=("c",), summand=2 if has_bias else None)
        return [*found, linear_in(node, slots)]
    terms = [[*sample, "g", *windows], ["g", None, *windows], ["g"]][: len(sizes)]
    found = split_letters(node, terms, [[*sample, "g", *windows]], groups={"g": groups})
    return [*found, linear_in(node, slots)]


# -- attention ---------------------------------------------------------------------------------------------------------


def attention(node: fx.Node) -> list[Strategy]:
    """scaled_dot_product_attention. Grouped key-value heads are split along with the query heads."""
    sizes = shapes(node)
    query = sizes[0]
    batch: Term = [f"b{i}" for i in range(len(query) - 2)]
    terms: list[Term] = [[*batch, "q", None], [*batch, None, None], [*batch, None, None]]
    for slot in (1, 2):
        for i in range(len(query) - 2):
            if sizes[slot][i] == 1 and query[i] != 1:
                terms[slot][i] = None
    if len(sizes) > 3:
        mask = sizes[3]
        letters: Term = [*batch, "q", None]
        offset = len(letters) - len(mask)
        terms.append([letters[offset + i] if extent > 1 else None for i, extent in enumerate(mask)])
    skip: tuple[Any, ...] = ("q",) if argument(node, "is_causal", False) else ()
    return split_letters(node, terms, [[*batch, "q", None]], skip=skip, impl=random_impl(node))


def recurrent(node: fx.Node) -> list[Strategy]:
    """lstm, gru, rnn over padded sequences [seq, batch, features] (or batch first): the batch can be split."""
    sizes = shapes(node)
    if len(sizes[0]) != 3:
        return []
    first = bool(argument(node, "batch_first"))
    sequence: Term = ["b", None, None] if first else [None, "b", None]
    state: Term = [None, "b", None]
    states = len(argument(node, "hx")) if node.target is aten.lstm.input else 1
    others: list[Term] = [[None] * len(size) for size in sizes[1 + states :]]
    results = [sequence, *[state] * (len(infos(node)) - 1)]
    return split_letters(node, [sequence, *[state] * states, *others], results, impl=random_impl(node))
