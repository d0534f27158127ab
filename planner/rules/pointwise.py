"""Elementwise ops with broadcasting: any dim that is not repeated can be split; some let summands pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from shardplan.planner.rules.letters import Term, broadcast_terms, linear_in, split_letters
from shardplan.planner.rules.randomness import random_impl
from shardplan.planner.rules.schema import argument, shapes
from shardplan.planner.rules.strategy import Strategy
from shardplan.planner.trace import info, infos, tensor_args

aten = torch.ops.aten

# Elementwise in the dims of the result, but without the tag.
_UNTAGGED = frozenset(
    {
        aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.to.dtype,
        aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default, aten.type_as.default,
        aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
        aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarSelf,
        aten.where.ScalarOther, aten.where.Scalar, aten.dropout.default, aten.alpha_dropout.default,
        aten.lift_fresh_copy.default, aten.copy.default, aten.isin.Tensor_Scalar, aten.bernoulli.default,
        aten.bernoulli.p, aten.rand_like.default, aten.randn_like.default, aten.randint_like.default,
        aten.randint_like.low_dtype, aten.uniform.default, aten.exponential.default, aten.cauchy.default,
        aten.geometric.default, aten.log_normal.default, aten.normal_functional.default, aten.normal.Tensor_float,
        aten.normal.float_Tensor, aten.normal.Tensor_Tensor, aten.bernoulli.Tensor, aten.rrelu.default,
        aten.random.default, getattr(aten.random, "from"), aten.random.to,
        aten.expand_as.default, aten.masked_fill_.Scalar, aten.bitwise_not.default, aten.logical_not.default,
        aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor, aten.__and__.Scalar,
        aten.__or__.Scalar, aten.rsub.Tensor, aten.rsub.Scalar, aten.polar.default, aten.complex.default,
        aten.real.default, aten.imag.default, aten.conj.default, aten.log_sigmoid.default, aten.logit.default,
        aten.hardswish.default, aten.native_dropout.default, aten.multiply.Tensor, aten.divide.Tensor,
        aten.subtract.Tensor, aten.isclose.default, aten.resolve_conj.default, aten.resolve_neg.default,
    }
)  # fmt: skip
# Tagged, but not elementwise.
_MISTAGGED = frozenset({aten.equal.default})
_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.subtract.Tensor, aten.rsub.Tensor})
_LINEAR_IN_FIRST = frozenset(
    {
        aten.neg.default, aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default,
        aten.mul.Scalar, aten.div.Scalar, aten.div.Tensor, aten.divide.Tensor, aten.dropout.default,
        aten.positive.default,
    }
)  # fmt: skip
_CASTS = frozenset(
    {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default, aten.type_as.default}
)


def is_pointwise(target: Any) -> bool:
    if target in _UNTAGGED:
        return True
    return torch.Tag.pointwise in getattr(target, "tags", ()) and target not in _MISTAGGED


def pointwise(node: fx.Node) -> list[Strategy]:
    results = infos(node)
    terms, result = broadcast_terms(shapes(node), results[0].shape)
    found = split_letters(node, terms, [result] * len(results), impl=random_impl(node))
    return [*found, *(linear_in(node, slots) for slots in _linear_slots(node))]


def _linear_slots(node: fx.Node) -> list[tuple[int, ...]]:
    """Sets of tensor arguments in which the op is linear, taken together."""
    target, count = node.target, len(tensor_args(node))
    if target in _SUMS:
        return [(0, 1)] if count == 2 else []
    if target in (aten.mul.Tensor, aten.multiply.Tensor):
        return [(slot,) for slot in range(count)]
    if target in _LINEAR_IN_FIRST:
        return [(0,)] if isinstance(node.args[0], fx.Node) else []
    if target in _CASTS:
        return [(0,)] if _keeps_sums(info(tensor_args(node)[0]).dtype, infos(node)[0].dtype) else []
    if target is aten.where.self:
        return [(1, 2)]
    if target is aten.where.ScalarOther:
        return [(1,)] if node.args[2] == 0 else []
    if target is aten.where.ScalarSelf:
        return [(1,)] if node.args[1] == 0 else []
    if target is aten.masked_fill.Scalar:
        return [(0,)] if argument(node, "value") == 0 else []
    if target is aten.masked_fill.Tensor:
        return [(0, 2)]
    return []


def _keeps_sums(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether casting summands and adding them up is adding up and casting, rounding apart."""
    if torch.bool in (source, target):
        return False
    return target.is_floating_point or target.is_complex or not (source.is_floating_point or source.is_complex)


def prelu(node: fx.Node) -> list[Strategy]:
    """The weight has one entry, or one per channel (dim 1)."""
    sizes = shapes(node)
    term: Term = [f"b{i}" for i in range(len(sizes[0]))]
    if sizes[1] in ((), (1,)) or len(term) < 2:
        return split_letters(node, [term, [None] * len(sizes[1])], [term])
    term[1] = "c"
    return split_letters(node, [term, ["c"]], [term])


def feature_dropout(node: fx.Node) -> list[Strategy]:
    """One number per sample and channel, so positions are not split."""
    term: Term = [f"b{i}" if i < 2 else None for i in range(len(shapes(node)[0]))]
    found = split_letters(node, [term], [term], impl=random_impl(node))
    return [*found, linear_in(node, (0,))] if node.target is aten.feature_dropout.default else found


def lookup(node: fx.Node) -> list[Strategy]:
    """isin, bucketize: elementwise in one argument, the other is read whole."""
    name = "elements" if node.target is aten.isin.Tensor_Tensor else "self"
    arguments = tensor_args(node)
    mine = argument(node, name)
    term: Term = [f"b{i}" for i in range(len(infos(node)[0].shape))]
    terms: list[Term] = [term if a is mine else [None] * len(info(a).shape) for a in arguments]
    return split_letters(node, terms, [term])
