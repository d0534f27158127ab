"""Losses: a mean over elements is a scaled sum; a mean over tokens that count divides by the count of the batch."""

from __future__ import annotations

import torch
from torch import fx

from shardplan.planner.placement import R, S
from shardplan.planner.rules.letters import Term, broadcast_terms, split_letters
from shardplan.planner.rules.schema import argument, shapes
from shardplan.planner.rules.strategy import Strategy
from shardplan.planner.trace import info, tensor_args

NONE, MEAN = 0, 1


def _classified(shape: tuple[int, ...]) -> tuple[int, Term, Term]:
    """(class dim, term of the scores, term of the tokens) for scores [tokens, classes, ...] or [classes]."""
    rank = len(shape)
    classes = 1 if rank > 1 else 0
    tokens: Term = [f"b{i}" for i in range(rank) if i != classes]
    return classes, ([*tokens[:1], None, *tokens[1:]] if rank > 1 else [None]), tokens


def cross_entropy(node: fx.Node) -> list[Strategy]:
    """Token dims: a mean divides by the count of the whole batch. Class dim: vocab parallel."""
    logits, target = shapes(node)[:2]
    weight, reduction = argument(node, "weight"), argument(node, "reduction", MEAN)
    classes, term, tokens = _classified(logits)
    weights: list[Term] = [[None]] if weight is not None else []
    gone = [x for x in tokens if x] if reduction else []
    result: Term = [] if reduction else tokens
    if len(target) == len(logits) and info(tensor_args(node)[1]).dtype.is_floating_point:
        scale = gone if reduction == MEAN else []
        return split_letters(node, [term, term, *weights], [result], partial=gone, scale=scale)
    found = split_letters(node, [term, tokens, *weights], [result], partial=gone, impl="cross_entropy")
    if weight is None:
        others = tuple(R for _ in tensor_args(node)[1:])
        outs = (R,)
        found.append(Strategy("class", (S(classes), *others), outs, "cross_entropy"))
    return found


def nll(node: fx.Node) -> list[Strategy]:
    """Negative log likelihood of class indices: token dims as in `cross_entropy`."""
    _, term, tokens = _classified(shapes(node)[0])
    weights: list[Term] = [[None]] if argument(node, "weight") is not None else []
    reduction = argument(node, "reduction", MEAN)
    gone = [x for x in tokens if x] if reduction else []
    return split_letters(node, [term, tokens, *weights], [[] if reduction else tokens], partial=gone, impl="nll_loss")


def elementwise_loss(node: fx.Node) -> list[Strategy]:
    """mse, l1, bce, ... The functions of `torch.nn.functional` broadcast the target beforehand; a weight may be
    smaller."""
    sizes = shapes(node)
    if sizes[0] != sizes[1]:
        return []
    full = tuple(torch.broadcast_shapes(*sizes))
    return _reduced(node, *broadcast_terms(sizes, full))


def pairwise_loss(node: fx.Node) -> list[Strategy]:
    """Losses of vectors [batch, dim] (and targets [batch]): samples are independent."""
    terms: list[Term] = [["b", *[None] * (len(size) - 1)] for size in shapes(node)]
    if len(shapes(node)[0]) != 2:
        return []
    return _reduced(node, terms, ["b"])


def _reduced(node: fx.Node, terms: list[Term], letters: Term) -> list[Strategy]:
    reduction = argument(node, "reduction", MEAN)
    if reduction == NONE:
        return split_letters(node, terms, [letters])
    gone = [x for x in letters if x]
    return split_letters(node, terms, [[]], partial=gone, scale=gone if reduction == MEAN else ())
