"""The op as one rank runs it: local shapes, localised size arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import fx

from shardplan.planner.mixture import SENT_MIXTURE
from shardplan.planner.placement import Mesh, Placement, R, local_shape
from shardplan.planner.rules.schema import argument, position
from shardplan.planner.rules.strategy import SENT, Strategy
from shardplan.planner.trace import TensorInfo, info, infos, is_tensor, leaf_of, tensor_args

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
    note = leaf_of(node)
    if note is not None:
        return LocalCall(note.leaf, tuple(map(Slot, range(len(inputs)))), {}, inputs, outputs)
    counter = count()

    def slots(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return Slot(next(counter)) if isinstance(value.meta.get("val"), (torch.Tensor, tuple, list)) else value
        if isinstance(value, (tuple, list)):
            return type(value)(slots(item) for item in value)
        return value

    call = _Sizes(node, [slots(v) for v in node.args], {k: slots(v) for k, v in node.kwargs.items()}, inputs, outputs)
    fix = _FIXES.get(node.target)
    if fix is not None and chosen:
        fix(call)
    if any(strategy.impl == SENT for strategy in chosen.values()):
        call.target = SENT_MIXTURE
    return LocalCall(call.target or node.target, tuple(call.args), call.kwargs, inputs, outputs)


def resizes(target: Any) -> bool:
    """Whether a split call of the op has other size arguments than the whole one."""
    return target in _FIXES


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
    target: Any = None

    @property
    def whole(self) -> tuple[int, ...]:
        """Global shape of the first tensor argument."""
        return info(tensor_args(self.node)[0]).shape

    def set(self, name: str, value: Any) -> None:
        """Replace an argument that the call has, by its schema name."""
        index = position(self.node.target, name)
        if 0 <= index < len(self.args):
            self.args[index] = value
        elif name in self.kwargs:
            self.kwargs[name] = value


def _result_size(name: str) -> Callable[[_Sizes], None]:
    return lambda call: call.set(name, list(call.outputs[0].shape))


def _unflatten(call: _Sizes) -> None:
    dim, count_ = argument(call.node, "dim") % len(call.whole), len(argument(call.node, "sizes"))
    call.set("sizes", list(call.outputs[0].shape[dim : dim + count_]))


def _squeeze(call: _Sizes) -> None:
    """Only dims of size 1 go that have it globally: a local extent of 1 stays."""
    dims = argument(call.node, "dim", None)
    named = range(len(call.whole)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = [dim for dim in named if call.whole and call.whole[dim] == 1]
    call.target, call.args, call.kwargs = aten.squeeze.dims, [Slot(0), gone], {}


def _split(call: _Sizes) -> None:
    call.set("split_size", call.outputs[0].shape[argument(call.node, "dim")])


def _split_sizes(call: _Sizes) -> None:
    sizes = [result.shape[argument(call.node, "dim")] for result in call.outputs]
    for name in ("split_sizes", "split_size"):
        call.set(name, sizes)


def _slice(call: _Sizes) -> None:
    """A slice of a split dim takes all of it, or sections of it, which are all split alike."""
    dim = argument(call.node, "dim") % len(call.whole)
    whole, local = call.whole[dim], call.inputs[0].shape[dim]
    if local == whole:
        return
    if call.outputs[0].shape[dim] == local:
        call.set("end", sys.maxsize)
        return
    start = argument(call.node, "start") or 0
    first = (start + whole if start < 0 else start) * local // whole
    call.args, call.kwargs = [Slot(0), dim, first, first + call.outputs[0].shape[dim]], {}


def _repeat(call: _Sizes) -> None:
    local = call.inputs[0].shape
    if 0 in local:
        return
    shape = (1,) * (len(call.outputs[0].shape) - len(local)) + local
    name = "repeats" if call.node.target is aten.repeat.default else "dims"
    call.set(name, [after // before for before, after in zip(shape, call.outputs[0].shape, strict=True)])


def _repeat_interleave(call: _Sizes) -> None:
    dim = argument(call.node, "dim")
    if dim is not None:
        call.set("output_size", call.outputs[0].shape[dim])


def _groups(name: str, slot: int) -> Callable[[_Sizes], None]:
    """Groups of channels, of which a rank has its share: that of tensor argument `slot` along `dim`."""

    def fix(call: _Sizes) -> None:
        dim = 1 if slot == 0 else 0
        whole, local = info(tensor_args(call.node)[slot]).shape[dim], call.inputs[slot].shape[dim]
        groups = argument(call.node, name)
        if groups > 1 and local != whole:
            call.set(name, groups * local // whole)

    return fix


def _affine_grid(call: _Sizes) -> None:
    call.set("size", [call.outputs[0].shape[0], *argument(call.node, "size")[1:]])


_FIXES: dict[Any, Callable[[_Sizes], None]] = {
    aten.unflatten.int: _unflatten,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_sizes,
    aten.split.sizes: _split_sizes,
    aten.slice.Tensor: _slice,
    aten.repeat.default: _repeat,
    aten.tile.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.reshape.default: _result_size("shape"),
    aten.affine_grid_generator.default: _affine_grid,
    aten.group_norm.default: _groups("num_groups", 0),
}
_FIXES |= dict.fromkeys(
    (aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.broadcast_to.default,
     aten.new_zeros.default, aten.new_ones.default,
     aten.new_full.default, aten.new_empty.default, aten.full.default, aten.zeros.default, aten.ones.default,
     aten.empty.memory_format, aten.rand.default, aten.randn.default, aten.randint.default, aten.randint.low,
     aten.normal.float_float),
    _result_size("size"),
)  # fmt: skip
_FIXES |= dict.fromkeys(
    (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
     aten.conv3d.padding, aten.convolution.default, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
     aten.conv_transpose3d.input),
    _groups("groups", 1),
)  # fmt: skip
