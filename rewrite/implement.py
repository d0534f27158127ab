"""Ops whose local form is not the op itself: which one, and the call that replaces it.

An op is replaced where a chosen strategy names an implementation, and always where it draws random numbers (replicas
must draw the same, shards their part of what one device draws). The functions are in `rewrite.kernels` and
`rewrite.random_ops`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from shardplan.errors import NotSupported
from shardplan.planner.leaf_op import is_leaf
from shardplan.planner.mixture import own_experts
from shardplan.planner.placement import MICROBATCH_AXIS, S
from shardplan.planner.propagate import REPLICA_NORM
from shardplan.planner.rules import LocalCall, Slot, Strategy
from shardplan.planner.rules.positions import bag_step
from shardplan.planner.rules.randomness import random_impl
from shardplan.planner.rules.strategy import OWN, SENT
from shardplan.planner.trace import info, tensor_args
from shardplan.rewrite import index_kernels, kernels, mixture_kernels
from shardplan.rewrite.implement_random import implement_random
from shardplan.rewrite.leaf_kernel import implement_leaf

if TYPE_CHECKING:
    from shardplan.rewrite.lower import StageLowering


@dataclass(slots=True)
class OpContext:
    """One op being lowered: its node, local call, lowered tensor arguments (by slot), strategies by axis."""

    stage: StageLowering
    node: fx.Node
    call: LocalCall
    arguments: list[fx.Node]
    chosen: dict[str, Strategy]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """A positional or keyword argument of the op, tensors lowered."""
        given = position < len(self.call.args)
        value = self.call.args[position] if given else self.call.kwargs.get(name, default)
        return self.arguments[value.index] if isinstance(value, Slot) else value

    def split_axes(self, slot: int = 0) -> tuple[str, ...]:
        """Axes on which tensor argument `slot` is a shard."""
        return tuple(axis for axis, strategy in self.chosen.items() if strategy.inputs[slot].is_shard)

    def axes_of(self, impl: str) -> tuple[str, ...]:
        """Axes whose strategy asks for this implementation."""
        return tuple(axis for axis, strategy in self.chosen.items() if strategy.impl == impl)

    def emit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.stage.emit(function, args, kwargs)


def implementation_of(node: fx.Node, chosen: dict[str, Strategy]) -> str | None:
    """Name of the implementation that replaces the op, or None."""
    if is_leaf(node):
        return "leaf"
    names = {strategy.impl.replace(REPLICA_NORM, "batch_norm") for strategy in chosen.values() if strategy.impl}
    if len(names) > 1:
        raise NotSupported(f"{node.name} would need two implementations at once: {sorted(names)}")
    return names.pop() if names else random_impl(node)


def _vocab_embedding(op: OpContext) -> fx.Node:
    (axis,) = op.axes_of("vocab_embedding")
    padding = op.argument(2, "padding_idx", -1)
    return op.emit(kernels.vocab_embedding, op.stage.comm, axis, op.arguments[0], op.arguments[1], padding_idx=padding)


def _cross_entropy(op: OpContext) -> fx.Node:
    logits = info(tensor_args(op.node)[0])
    class_dim = 1 if len(logits.shape) > 1 else 0
    class_axes = tuple(axis for axis, s in op.chosen.items() if s.inputs[0] == S(class_dim))
    token_axes = [axis for axis in op.split_axes(1)]
    reduction = op.argument(3, "reduction", 1)
    weight = op.argument(2, "weight")
    ignore_index = op.argument(4, "ignore_index", -100)
    denominator = None
    if reduction == 1 and token_axes:
        denominator = op.stage.denominator(op, tuple(token_axes), weight, ignore_index)
    return op.emit(
        kernels.cross_entropy,
        op.stage.comm,
        op.arguments[0],
        op.arguments[1],
        weight,
        reduction,
        ignore_index,
        op.argument(5, "label_smoothing", 0.0),
        class_axes=class_axes,
        denominator=denominator,
    )


def _batch_norm(op: OpContext) -> fx.Node:
    names = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
    values = [op.argument(position, name) for position, name in enumerate(names)]
    replicas = tuple(axis for axis in op.axes_of(REPLICA_NORM) if axis != MICROBATCH_AXIS)
    return op.emit(kernels.batch_norm, op.stage.comm, op.axes_of("batch_norm"), replicas, *values)


def _nll(op: OpContext) -> fx.Node:
    token_axes = op.split_axes(1)
    weight, reduction = op.argument(2, "weight"), op.argument(3, "reduction", 1)
    ignore_index = op.argument(4, "ignore_index", -100)
    denominator = None
    if reduction == 1 and token_axes:
        denominator = op.stage.denominator(op, token_axes, weight, ignore_index)
    logs, target = op.arguments[:2]
    return op.emit(kernels.nll_loss, logs, target, weight, reduction, ignore_index, denominator=denominator)


def _positions(op: OpContext) -> fx.Node:
    """Indices that count through a split dim count from the start of the rank's part of it."""
    split = {op.chosen[axis].inputs[0].dim for axis in op.axes_of("positions")}
    used = [dim for dim, index in enumerate(op.call.args[1]) if index is not None]
    arguments = list(op.arguments)
    for slot, dim in enumerate(used, 1):
        if dim in split:
            arguments[slot] = op.emit(index_kernels.from_start, arguments[slot])
    args = op.stage.fill(op.call.args, arguments)
    return op.emit(op.call.target, *args, **op.stage.fill(op.call.kwargs, arguments))


def _embedding_bag(op: OpContext) -> fx.Node:
    names = {"weight": None, "indices": None, "offsets": None, "scale_grad_by_freq": False, "mode": 0, "sparse": False,
             "per_sample_weights": None, "include_last_offset": False, "padding_idx": None}  # fmt: skip
    values = [op.argument(position, name, default) for position, (name, default) in enumerate(names.items())]
    axes = op.axes_of("embedding_bag")
    vocab = tuple(axis for axis in axes if op.chosen[axis].inputs[0] == S(0))
    step = bag_step(op.node) if len(vocab) < len(axes) else None
    return op.emit(index_kernels.embedding_bag, op.stage.comm, *values, vocab_axes=vocab, step=step)


def _own_experts(op: OpContext) -> fx.Node:
    """A rank runs the pairs of its own experts."""
    (axis,) = op.axes_of(OWN)
    steps, experts, fans, ids, rows, held = op.stage.fill(op.call.args, op.arguments)
    own = own_experts(steps, experts, [value.shape for value in op.call.inputs[1 + len(rows) :]])
    return op.emit(mixture_kernels.own_experts, op.stage.comm, axis, steps, own, fans, ids, rows, held)


def _sent_experts(op: OpContext) -> fx.Node:
    """Pairs travel to the ranks of their experts, and the results back."""
    (axis,) = op.axes_of(SENT)
    steps, experts, fans, ids, rows, held = op.stage.fill(op.call.args, op.arguments)
    own = own_experts(steps, experts, [value.shape for value in op.call.inputs[1 + len(rows) :]])
    return op.emit(mixture_kernels.sent_experts, op.stage.comm, axis, steps, own, fans, ids, rows, held)


IMPLEMENTATIONS: dict[str, Callable[[OpContext], fx.Node]] = {
    "vocab_embedding": _vocab_embedding,
    "cross_entropy": _cross_entropy,
    "batch_norm": _batch_norm,
    "nll_loss": _nll,
    "positions": _positions,
    "embedding_bag": _embedding_bag,
    "leaf": implement_leaf,
    OWN: _own_experts,
    SENT: _sent_experts,
    "random": implement_random,
}
