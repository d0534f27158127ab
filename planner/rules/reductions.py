"""Normalisation, softmax, reductions, and other ops along some dims."""

from __future__ import annotations

import torch
from torch import fx

from shardplan.planner.rules import views
from shardplan.planner.rules.letters import Term, linear_in, split_letters
from shardplan.planner.rules.schema import argument, shapes
from shardplan.planner.rules.strategy import Strategy
from shardplan.planner.trace import infos, tensor_args

aten = torch.ops.aten


# -- normalisation -----------------------------------------------------------------------------------------------------


def layer_norm(node: fx.Node) -> list[Strategy]:
    rank = len(shapes(node)[0])
    inner = len(argument(node, "normalized_shape"))
    term: Term = [*(f"b{i}" for i in range(rank - inner)), *[None] * inner]
    count = len(tensor_args(node))
    weights: list[Term] = [[None] * inner] * (count - 1)
    return split_letters(node, [term, *weights], [term] * len(infos(node)))


def group_norm(node: fx.Node) -> list[Strategy]:
    """Channels are split group by group."""
    shape = shapes(node)[0]
    term: Term = ["n", "c", *[None] * (len(shape) - 2)]
    channels: Term = ["c"]
    groups = {"c": int(argument(node, "num_groups"))}
    return split_letters(node, [term, *[channels] * (len(tensor_args(node)) - 1)], [term], groups=groups)


def instance_norm(node: fx.Node) -> list[Strategy]:
    shape = shapes(node)[0]
    term: Term = ["n", "c", *[None] * (len(shape) - 2)]
    channels: Term = ["c"]
    return split_letters(node, [term, *[channels] * (len(tensor_args(node)) - 1)], [term])


def batch_norm(node: fx.Node) -> list[Strategy]:
    """Channels are independent. A split of the batch or of positions needs the statistics of all ranks in training."""
    rank = len(shapes(node)[0])
    spatial = [f"s{i}" for i in range(rank - 2)]
    term: Term = ["n", "c", *spatial]
    channels: Term = ["c"]
    impl = dict.fromkeys(("n", *spatial), "batch_norm") if argument(node, "training", False) else None
    return split_letters(node, [term, *[channels] * (len(tensor_args(node)) - 1)], [term], impl=impl)


# -- along one dim -----------------------------------------------------------------------------------------------------


def along_dim(node: fx.Node) -> list[Strategy]:
    """softmax, sort, topk, ...: independent along every other dim."""
    return views.other_dims(node, (argument(node, "dim", -1),))


def along_dim_linear(node: fx.Node) -> list[Strategy]:
    """cumsum, cat, ...: the same, and summands pass."""
    return views.other_dims(node, (argument(node, "dim", -1),), linear=True)


def transformed(node: fx.Node) -> list[Strategy]:
    """Fourier transforms and shifts over several dims: the last ones that sizes are given for, or all, where none are
    named."""
    rank = len(shapes(node)[0])
    dims, sizes = argument(node, "dim"), argument(node, "s")
    if dims is None:
        dims = range(rank - len(sizes), rank) if sizes is not None else range(rank)
    return views.other_dims(node, [dims] if isinstance(dims, int) else dims, linear=True)


# -- reductions --------------------------------------------------------------------------------------------------------


def _reduced(node: fx.Node) -> tuple[Term, Term, set[str]]:
    """(term, result term, reduced letters) of a reduction."""
    rank = len(shapes(node)[0])
    dims = argument(node, "dim")
    dims = [dims] if isinstance(dims, int) else (dims or list(range(rank)))
    whole = {dim % max(rank, 1) for dim in dims}
    keep = bool(argument(node, "keepdim", False))
    term: Term = [f"b{i}" for i in range(rank)]
    result = [None if i in whole else x for i, x in enumerate(term) if keep or i not in whole]
    return term, result, {f"b{i}" for i in whole}


def sum_(node: fx.Node) -> list[Strategy]:
    term, result, gone = _reduced(node)
    return [*split_letters(node, [term], [result], partial=gone), linear_in(node, (0,))]


def count(node: fx.Node) -> list[Strategy]:
    term, result, gone = _reduced(node)
    return split_letters(node, [term], [result], partial=gone)


def mean(node: fx.Node) -> list[Strategy]:
    term, result, gone = _reduced(node)
    return [*split_letters(node, [term], [result], partial=gone, scale=gone), linear_in(node, (0,))]


def other_reduction(node: fx.Node) -> list[Strategy]:
    """max, argmax, var, all, ...: only the dims that stay can be split."""
    term, result, gone = _reduced(node)
    return split_letters(node, [term], [result] * len(infos(node)), skip=gone)


def cosine_similarity(node: fx.Node) -> list[Strategy]:
    left, right = shapes(node)
    if left != right or not left:
        return []
    dim = argument(node, "dim") % len(left)
    term: Term = [None if i == dim else f"b{i}" for i in range(len(left))]
    return split_letters(node, [term, term], [[x for i, x in enumerate(term) if i != dim]])
