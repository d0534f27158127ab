"""Calls that replace ops which draw random numbers: see `rewrite.random_ops`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from shardplan.errors import NotSupported
from shardplan.planner.rules.schema import argument
from shardplan.planner.trace import info, infos, tensor_args
from shardplan.rewrite import random_ops
from shardplan.rewrite.draws import where_text

if TYPE_CHECKING:
    from shardplan.rewrite.implement import OpContext

aten = torch.ops.aten


def implement_random(op: OpContext) -> fx.Node:
    """The op, drawing by position. One that has no such form runs whole on every rank."""
    found = _CALLS.get(op.node.target)
    if found is not None:
        return found(op)
    if any(p.is_shard for strategy in op.chosen.values() for p in (*strategy.inputs, *strategy.outputs)):
        raise NotSupported(f"{op.node.name} ({op.node.target}) draws numbers that cannot be split")
    args, kwargs = op.stage.fill(op.call.args, op.arguments), op.stage.fill(op.call.kwargs, op.arguments)
    site = op.stage.sites[op.node.name]
    return op.emit(random_ops.replicated, op.stage.comm, site, op.stage.device, op.call.target, *args, **kwargs)


def _call(op: OpContext, function: Callable[..., Any], shape: tuple[int, ...] | None, *args: Any) -> fx.Node:
    """shape: of the whole tensor of numbers, the result's by default. Its dims are split as the result's are."""
    whole = infos(op.node)[0].shape if shape is None else shape
    outputs = {axis: strategy.outputs[0] for axis, strategy in op.chosen.items()}
    split = {axis: str(p) for axis, p in outputs.items() if p.is_shard and p.dim < len(whole) and whole[p.dim] > 1}
    return op.emit(function, op.stage.comm, op.stage.sites[op.node.name], where_text(whole, split), *args)


def _given(op: OpContext, name: str, default: Any = None) -> Any:
    """An argument by its schema name, tensors lowered."""
    names = [a.name for a in op.node.target._schema.arguments]  # type: ignore[union-attr]
    value = op.argument(names.index(name), name, default) if name in names else default
    return op.stage.fill(value, op.arguments) if isinstance(value, (tuple, list)) else value


def _factory(function: Callable[..., Any], *names: str, **defaults: Any) -> Callable[[OpContext], fx.Node]:
    """An op whose result is nothing but numbers. names: its parameters, in the order of the function's."""

    def call(op: OpContext) -> fx.Node:
        values = [_given(op, name, defaults.get(name)) for name in names]
        return _call(op, function, None, infos(op.node)[0].dtype, op.stage.device, *values)

    return call


def _with_input(function: Callable[..., Any], *names: str, **defaults: Any) -> Callable[[OpContext], fx.Node]:
    """An op that changes its first argument elementwise."""
    return lambda op: _call(op, function, None, op.arguments[0], *(_given(op, n, defaults.get(n)) for n in names))


def _features(function: Callable[..., Any]) -> Callable[[OpContext], fx.Node]:
    """One number per sample and channel."""

    def call(op: OpContext) -> fx.Node:
        shape = info(tensor_args(op.node)[0]).shape
        return _call(op, function, (*shape[:2], *[1] * len(shape[2:])), op.arguments[0], _given(op, "p"))

    return call


def _integers(op: OpContext) -> fx.Node:
    low, high = argument(op.node, "low", 0), argument(op.node, "high")
    return _call(op, random_ops.integers, None, infos(op.node)[0].dtype, op.stage.device, low, high)


def _any_integers(op: OpContext) -> fx.Node:
    """random: between given ends, or any that the dtype holds exactly and that is not negative."""
    dtype = infos(op.node)[0].dtype
    low, high = _given(op, "from", 0), _given(op, "to")
    if high is None:
        high = int(1 / torch.finfo(dtype).eps) * 2 if dtype.is_floating_point else torch.iinfo(dtype).max
    return _call(op, random_ops.integers, None, dtype, op.stage.device, low, high)


def _multinomial(op: OpContext) -> fx.Node:
    replacement = bool(_given(op, "replacement", False))
    shape = None if replacement else info(tensor_args(op.node)[0]).shape
    return _call(op, random_ops.multinomial, shape, op.arguments[0], _given(op, "num_samples"), replacement)


def _attention(op: OpContext) -> fx.Node:
    result, keys = infos(op.node)[0].shape, info(tensor_args(op.node)[1]).shape[-2]
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    defaults = {"dropout_p": 0.0, "is_causal": False, "enable_gqa": False}
    values = [_given(op, name, defaults.get(name)) for name in names]
    if any(s.outputs[0].is_shard and s.outputs[0].dim == len(result) - 1 for s in op.chosen.values()):
        raise NotSupported(f"{op.node.name}: attention with dropout does not split the features of the values")
    return _call(op, random_ops.attention, (*result[:-1], keys), *values)


def _recurrent(op: OpContext) -> fx.Node:
    names = ("hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")
    values = [_given(op, name) for name in names]
    return _call(op, random_ops.recurrent, None, op.call.target, op.arguments[0], *values)


_RECURRENT = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
_INTEGERS = (
    aten.randint.default, aten.randint.low, aten.randint_like.default, aten.randint_like.low_dtype,
)  # fmt: skip
_CALLS: dict[Any, Callable[[OpContext], fx.Node]] = {
    aten.dropout.default: _with_input(random_ops.dropout, "p"),
    aten.native_dropout.default: _with_input(random_ops.native_dropout, "p"),
    aten.alpha_dropout.default: _with_input(random_ops.alpha_dropout, "p"),
    aten.feature_dropout.default: _features(random_ops.dropout),
    aten.feature_alpha_dropout.default: _features(random_ops.alpha_dropout),
    aten.rrelu.default: _with_input(random_ops.rrelu, "lower", "upper", lower=1 / 8, upper=1 / 3),
    aten.rand.default: _factory(random_ops.uniform),
    aten.rand_like.default: _factory(random_ops.uniform),
    aten.uniform.default: _factory(random_ops.uniform, "from", "to", **{"from": 0.0, "to": 1.0}),
    aten.randn.default: _factory(random_ops.normal),
    aten.randn_like.default: _factory(random_ops.normal),
    aten.normal_functional.default: _factory(random_ops.normal, "mean", "std", mean=0.0, std=1.0),
    aten.normal.Tensor_float: _factory(random_ops.normal, "mean", "std", std=1.0),
    aten.normal.float_Tensor: _factory(random_ops.normal, "mean", "std"),
    aten.normal.Tensor_Tensor: _factory(random_ops.normal, "mean", "std"),
    aten.normal.float_float: _factory(random_ops.normal, "mean", "std"),
    aten.log_normal.default: _factory(random_ops.log_normal, "mean", "std", mean=1.0, std=2.0),
    aten.exponential.default: _factory(random_ops.exponential, "lambd", lambd=1.0),
    aten.cauchy.default: _factory(random_ops.cauchy, "median", "sigma", median=0.0, sigma=1.0),
    aten.geometric.default: _factory(random_ops.geometric, "p"),
    aten.bernoulli.default: _factory(random_ops.bernoulli, "self"),
    aten.bernoulli.p: _factory(random_ops.bernoulli, "p"),
    aten.bernoulli.Tensor: _factory(random_ops.bernoulli, "p"),
    aten.multinomial.default: _multinomial,
    aten.scaled_dot_product_attention.default: _attention,
}
_CALLS |= dict.fromkeys(_RECURRENT, _recurrent)
_CALLS |= dict.fromkeys(_INTEGERS, _integers)
_CALLS |= dict.fromkeys((aten.random.default, getattr(aten.random, "from"), aten.random.to), _any_integers)
