"""The op as one rank runs it: local shapes, localised size arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import fx

from shardplan.planner.placement import Mesh, Placement, R, local_shape
from shardplan.planner.rules.strategy import Strategy
from shardplan.planner.trace import TensorInfo, info, infos, is_tensor, tensor_args

aten = torch.ops.aten
_NONE = TensorInfo((), torch.float32)


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands in `LocalCall.args` for the tensor argument of that index (order of `planner.trace.tensor_args`)."""

    index: int


@dataclass(frozen=True, slots=True)
class LocalCall:
    """A node's call on one rank.

    args / kwargs: the node's, tensors replaced by `Slot`, sizes (view, expand, full, arange, slice ends, ...) local.
    inputs / outputs: local TensorInfo of the slots and of the tensor results.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


def local_call(node: fx.Node, chosen: Mapping[str, Strategy], mesh: Mesh) -> LocalCall:
    """The call of `node` when axis `a` of `mesh` runs it by ``chosen[a]`` (an axis not named: replicated).

    Raises ValueError where a shard does not divide.
    """
    arguments = tensor_args(node)
    inputs = tuple(
        _local(info(a), [chosen[x].inputs[i] if x in chosen else R for x in mesh.axes], mesh) if is_tensor(a) else _NONE
        for i, a in enumerate(arguments)
    )
    outputs = tuple(
        _local(result, [chosen[x].outputs[i] if x in chosen else R for x in mesh.axes], mesh)
        for i, result in enumerate(infos(node))
    )
    counter = count()

    def slots(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return Slot(next(counter)) if isinstance(value.meta.get("val"), (torch.Tensor, tuple, list)) else value
        if isinstance(value, (tuple, list)):
            return type(value)(slots(item) for item in value)
        return value

    args = [slots(value) for value in node.args]
    kwargs = {key: slots(value) for key, value in node.kwargs.items()}
    fix = _FIXES.get(node.target)
    if fix is not None and chosen:
        fix(_Sizes(node, args, kwargs, inputs, outputs))
    return LocalCall(node.target, tuple(args), kwargs, inputs, outputs)


def _local(value: TensorInfo, layout: Sequence[Placement], mesh: Mesh) -> TensorInfo:
    return TensorInfo(local_shape(value.shape, tuple(layout), mesh), value.dtype, value.needs_grad)


@dataclass(slots=True)
class _Sizes:
    """A call whose size arguments are being made local, in place."""

    node: fx.Node
    args: list[Any]
    kwargs: dict[str, Any]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]

    def get(self, name: str, position: int, default: Any = None) -> Any:
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def set(self, name: str, position: int, value: Any) -> None:
        if position < len(self.args):
            self.args[position] = value
        elif name in self.kwargs:
            self.kwargs[name] = value


def _result_size(position: int, name: str = "size") -> Callable[[_Sizes], None]:
    return lambda call: call.set(name, position, list(call.outputs[0].shape))


def _unflatten(call: _Sizes) -> None:
    rank = len(call.inputs[0].shape)
    dim, sizes = call.get("dim", 1) % rank, call.get("sizes", 2)
    call.set("sizes", 2, list(call.outputs[0].shape[dim : dim + len(sizes)]))


def _split(call: _Sizes) -> None:
    dim = call.get("dim", 2, 0)
    call.set("split_size", 1, call.outputs[0].shape[dim])


def _split_sizes(call: _Sizes) -> None:
    dim = call.get("dim", 2, 0)
    call.set("split_sizes", 1, [result.shape[dim] for result in call.outputs])
    call.set("split_size", 1, [result.shape[dim] for result in call.outputs])


def _slice(call: _Sizes) -> None:
    """A slice of a split dim takes all of it; other dims keep their ends."""
    whole = info(tensor_args(call.node)[0]).shape
    dim = call.get("dim", 1, 0) % len(whole)
    if call.inputs[0].shape[dim] != whole[dim]:
        call.set("end", 3, sys.maxsize)


def _groups(call: _Sizes) -> None:
    whole = info(tensor_args(call.node)[1]).shape[0]
    local = call.inputs[1].shape[0]
    groups = call.get("groups", 6, 1)
    if groups > 1 and local != whole:
        call.set("groups", 6, groups * local // whole)


_FIXES: dict[Any, Callable[[_Sizes], None]] = {
    aten.unflatten.int: _unflatten,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_sizes,
    aten.split.sizes: _split_sizes,
    aten.slice.Tensor: _slice,
}
_FIXES |= dict.fromkeys(
    (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default, aten.new_zeros.default,
     aten.new_ones.default, aten.new_full.default, aten.new_empty.default), _result_size(1),
)  # fmt: skip
_FIXES |= dict.fromkeys(
    (aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format), _result_size(0)
)
_FIXES |= dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), _groups)
