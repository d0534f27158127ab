"""Which tensors stay in memory between forward and backward.

`Costs.saves` says what autograd keeps of every op; here these are joined over the graph, so that a tensor that several
ops keep counts once, and a view counts as the tensor that it looks at.
"""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import fx

from shardplan.planner.costs import mixtures
from shardplan.planner.costs.base import Costs, OpSaves
from shardplan.planner.rules import LocalCall, views
from shardplan.planner.trace import Trace, infos, is_tensor, resolve, tensor_args

aten = torch.ops.aten
_CONVERSIONS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default}
_VIEWS = (
    views.RESHAPES
    | views.PERMUTES
    | {aten.expand.default, aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default}
    | {aten.chunk.default, aten.unbind.int, aten.alias.default, aten.detach.default, aten.contiguous.default}
    | _CONVERSIONS
)


class Keeps:
    """What backward keeps alive, by op and result."""

    def __init__(self, trace: Trace, costs: Costs) -> None:
        self._saves: dict[fx.Node, OpSaves] = {}
        self._kept: dict[tuple[fx.Node, int], set[fx.Node]] = {}
        self._read_again: set[tuple[fx.Node, int]] = set()
        for node in trace.nodes():
            if node.op != "call_function" or resolve(node)[0] is not node or not infos(node):
                continue
            saves = self._saves[node] = costs.saves(node)
            for argument, kept in zip(tensor_args(node), saves.inputs, strict=True):
                if kept:
                    self._read_again.add(resolve(argument))
                    self._kept.setdefault(root(argument), set()).add(node)
            for position, kept in enumerate(saves.outputs):
                if kept:
                    self._kept.setdefault(root_of(node, position), set()).add(node)

    def saves_of(self, node: fx.Node) -> OpSaves | None:
        """What the op keeps by itself; None where it is none that computes."""
        return self._saves.get(node)

    def is_kept(self, node: fx.Node, position: int) -> bool:
        """Whether result `position` of the op stays until backward (views never: what they look at does)."""
        return (node, position) in self._kept

    def keepers(self, node: fx.Node, position: int) -> Set[fx.Node]:
        """The ops whose backward needs the result."""
        return self._kept.get((node, position), set())

    def is_read_again(self, value: fx.Node) -> bool:
        """Whether some reader keeps this very value for its backward."""
        return resolve(value) in self._read_again

    def extra_nbytes(self, node: fx.Node, output_nbytes: int) -> float:
        """Bytes that the op keeps besides its arguments and results."""
        saves = self._saves.get(node)
        return saves.extra_nbytes_per_output_byte * output_nbytes if saves is not None else 0.0

    def extra_of(self, node: fx.Node, call: LocalCall) -> float:
        """The same of a call on one rank. The experts of a mixture may be split otherwise than its results."""
        if mixtures.is_mixture(call):
            return mixtures.kept_nbytes(call)
        return self.extra_nbytes(node, sum(result.nbytes for result in call.outputs))


def root(value: fx.Node) -> tuple[fx.Node, int]:
    """The op and result whose memory the value looks at."""
    return root_of(*resolve(value))


def root_of(node: fx.Node, position: int) -> tuple[fx.Node, int]:
    while node.op == "call_function" and node.target in _VIEWS and not copies(node):
        node, position = resolve(tensor_args(node)[0])
    return node, position


def copies(node: fx.Node) -> bool:
    """Whether an op that could look at its input has to make a tensor of its own, because of strides or dtype."""
    if node.target in _CONVERSIONS:
        return infos(node)[0].dtype != infos(tensor_args(node)[0])[0].dtype
    return lies_otherwise(node)


def lies_otherwise(node: fx.Node) -> bool:
    """Whether a reshape, or what asks for a contiguous tensor, has to copy because of its input's strides."""
    if node.target is aten.contiguous.default and is_tensor(node):
        return not tensor_args(node)[0].meta["val"].is_contiguous()
    if node.target not in views.RESHAPES:
        return False
    found = node.meta.get("reshape_copies")
    if found is None:
        source = tensor_args(node)[0].meta["val"]
        if not is_tensor(node):
            return False
        try:
            strides = [int(s) for s in source.stride()]
            probe = torch.empty_strided([int(s) for s in source.shape], strides, device="meta")
            probe.view([int(s) for s in node.meta["val"].shape])
            found = False
        except RuntimeError:
            found = True
        node.meta["reshape_copies"] = found
    return found
