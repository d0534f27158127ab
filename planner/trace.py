"""The traced model: a flat fx graph of ATen ops with everything that planning and rewriting need to know about it.

`planner.export.trace_model` makes a Trace; passes in `planner.passes` normalise its graph; `planner.segments` fills
`shared` and `segments`. Downstream code reads nodes only through the accessors here, never through ``node.meta``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from torch.utils._pytree import TreeSpec

    from shardplan.planner.costs.base import OpSaves
    from shardplan.planner.leaf_op import Leaf
    from shardplan.planner.rules.strategy import Strategy


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Static facts of one tensor: global shape, dtype, and whether a gradient flows to it in training."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    needs_grad: bool = False

    @property
    def nbytes(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Source:
    """What a placeholder of the graph stands for.

    kind: "param", "buffer", "constant" (a tensor that the trace itself carries) or "input" (a leaf of the batch).
    name: fully qualified name in the model for params and buffers; a stable label otherwise ("ids", "args.0").
    aliases: further names of the same tensor (tied parameters), without `name`.
    trainable: a parameter that gets a gradient.
    batch_dim: for inputs, the dim that carries the global batch, or None (replicated input).
    leaf: for inputs, position among the flattened (args, kwargs) leaves of the call, or -1.
    """

    kind: str
    name: str
    aliases: tuple[str, ...] = ()
    trainable: bool = False
    batch_dim: int | None = None
    leaf: int = -1


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of consecutive compute nodes between two cheap cuts of the graph; the unit that is placed on a stage.

    name: readable, from the modules the ops came from ("model.layers.3.self_attn", "embed", "head+loss").
    kind: structural class; two segments of one kind have the same ops, shapes and inner wiring, node by node.
    nodes: names of the nodes, in graph order. Shared nodes and placeholders belong to no segment.
    """

    name: str
    kind: int
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LeafNote:
    """What is known of a submodule that stands in the graph whole (see `planner.leaf_op`).

    reason: why it does ("model.py:88: if scores.max() > 1", "asked for"). saves: what autograd keeps of it. draws:
    whether it draws random numbers. splits: the ways to split its batch, proven by running it; unsplit: why there are
    none. steady: every parameter got a gradient in every run; one that gets none in some steps must not be converted by
    collectives, which would give it zeros, and optimizers shrink what has zeros.
    """

    leaf: Leaf
    reason: str
    saves: OpSaves
    draws: bool = False
    splits: tuple[Strategy, ...] = ()
    unsplit: str = ""
    steady: bool = False


@dataclass(eq=False)
class Trace:
    """A traced model.

    module: flat GraphModule. Placeholders are parameters, buffers, constants and inputs (see `sources`);
        every other node is a call_function of an OpOverload, a higher-order op, `operator.getitem`, or a function of
        `planner.passes`; the output node returns one flat tuple: the loss (or None) first, then the tensor leaves of
        the model's output.
    sources: placeholder node name -> Source, in placeholder order.
    constants: placeholder node name -> real tensor.
    in_spec / out_spec: pytree of (args, kwargs) and of the model's output; `output_leaves` gives, per leaf of the
        output, its position in the output tuple (>= 1) or the constant value it has.
    loss_leaf: position of the loss among the output leaves if the model returned it itself, else None.
    batch_size: the global batch size of the example.
    shared: nodes that depend on no parameter, random number or mutated buffer (positions, masks, shifted labels).
        Any stage that needs one computes it itself; they belong to no segment.
    segments: the rest, in order.
    fingerprint: hash of ops, shapes, dtypes, wiring and parameter names; a plan is valid for one fingerprint.
    method: "export" or "make_fx" (which bakes in branches); notes: things the user should be told.
    batch_norm: statistics of batch normalisation in training are those of the whole batch ("global") or of each
        replica and microbatch ("replica", which is not what one device computes).
    precision: see `planner.precision`. masters: name of every parameter that is used in another dtype than the model
        has it in -> that dtype.
    """

    module: fx.GraphModule
    sources: dict[str, Source]
    constants: dict[str, torch.Tensor]
    in_spec: TreeSpec
    out_spec: TreeSpec
    output_leaves: tuple[int | tuple[Any], ...]
    loss_leaf: int | None
    batch_size: int
    training: bool = True
    shared: frozenset[str] = frozenset()
    segments: tuple[Segment, ...] = ()
    fingerprint: str = ""
    method: str = "export"
    model_name: str = ""
    notes: list[str] = field(default_factory=list)
    batch_norm: str = "global"
    precision: str | None = None
    masters: dict[str, torch.dtype] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def nodes(self) -> Iterator[fx.Node]:
        return iter(self.module.graph.nodes)

    def node(self, name: str) -> fx.Node:
        """The node of that name. Raises KeyError."""
        index = self.__dict__.get("_index")
        if index is None or len(index) != len(self.module.graph.nodes):
            index = self.__dict__["_index"] = {n.name: n for n in self.module.graph.nodes}
        return index[name]

    def parameters(self) -> dict[str, fx.Node]:
        """Parameter name -> placeholder (tied parameters once, under their first name)."""
        return {s.name: self.node(n) for n, s in self.sources.items() if s.kind == "param"}

    def leaves(self) -> dict[str, str]:
        """Submodules that are kept whole -> why."""
        notes = [note for node in self.nodes() if (note := leaf_of(node)) is not None]
        return {note.leaf.name.partition("#")[0]: note.reason for note in notes}


_INFO, _ARGUMENTS = "shardplan_info", "shardplan_arguments"

# -- accessors ---------------------------------------------------------------------------------------------------------


def is_tensor(node: fx.Node) -> bool:
    """Whether the node's value is one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def info(node: fx.Node) -> TensorInfo:
    """Shape, dtype and differentiability of a tensor node. Raises TypeError where the value is not one tensor."""
    meta = node.meta
    value, grad = meta.get("val"), bool(meta.get("needs_grad", False))
    # Asked for millions of times in a search, so the answer is kept until the value or its gradient changes.
    kept = meta.get(_INFO)
    if kept is not None and kept[0] is value and kept[1].needs_grad == grad:
        return kept[1]
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{node.name} is not a tensor but {type(value).__name__}")
    found = TensorInfo(tuple(int(extent) for extent in value.shape), value.dtype, grad)
    meta[_INFO] = value, found
    return found


def infos(node: fx.Node) -> tuple[TensorInfo, ...]:
    """TensorInfo of every tensor output of an op, in order (one for most; several for split, topk, ...)."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return (info(node),)
    if isinstance(value, (tuple, list)):
        grad, tensors = needs_grad(node), [v for v in value if isinstance(v, torch.Tensor)]
        grads = node.meta.get("result_grads") or [grad and v.dtype.is_floating_point for v in tensors]
        return tuple(
            TensorInfo(tuple(int(extent) for extent in v.shape), v.dtype, flows)
            for v, flows in zip(tensors, grads, strict=True)
        )
    return ()


def needs_grad(node: fx.Node) -> bool:
    """Whether a gradient flows to this node in training (set by `planner.passes`; False outside training)."""
    return bool(node.meta.get("needs_grad", False))


def set_needs_grad(node: fx.Node, value: bool) -> None:
    node.meta["needs_grad"] = value


def set_result_grads(node: fx.Node, flows: tuple[bool, ...]) -> None:
    """To which of an op's results a gradient flows, where that is not all that are floating."""
    node.meta["result_grads"] = flows


def leaf_of(node: fx.Node) -> LeafNote | None:
    """What is known of the submodule that a node runs whole; None for every other node."""
    return node.meta.get("leaf")


def set_leaf(node: fx.Node, note: LeafNote) -> None:
    node.meta["leaf"] = note


def mutated(node: fx.Node) -> tuple[fx.Node, ...]:
    """The buffer placeholders whose value the op changes in place (set by `planner.passes`); such an op never goes."""
    return node.meta.get("mutates", ())


def set_mutated(node: fx.Node, buffers: tuple[fx.Node, ...]) -> None:
    node.meta["mutates"] = buffers


def tensor_args(node: fx.Node) -> tuple[fx.Node, ...]:
    """The tensor-valued arguments of an op as they stand in args, then kwargs (lists flattened, repeats kept).

    This is the order of `Strategy.inputs`. A node whose value is a tuple (the input of getitem) counts as one argument.
    """
    kept = node.meta.get(_ARGUMENTS)
    if kept is not None and kept[0] is node.args and kept[1] == node.kwargs:
        return kept[2]
    found: list[fx.Node] = []

    def visit(argument: Any) -> None:
        if isinstance(argument, fx.Node):
            if isinstance(argument.meta.get("val"), (torch.Tensor, tuple, list)):
                found.append(argument)
        elif isinstance(argument, (tuple, list)):
            for item in argument:
                visit(item)
        elif isinstance(argument, dict):
            for item in argument.values():
                visit(item)

    visit(node.args)
    visit(dict(node.kwargs))
    arguments = tuple(found)
    if all(not isinstance(a, dict) for a in node.args):
        node.meta[_ARGUMENTS] = node.args, dict(node.kwargs), arguments
    return arguments


def resolve(node: fx.Node) -> tuple[fx.Node, int]:
    """The op that makes the value and the index of the result: looks through `operator.getitem`.

    A getitem has no strategy of its own; its placement is ``outputs[index]`` of the op's strategy.
    """
    if node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return node.args[0], int(node.args[1])  # type: ignore[arg-type]
    return node, 0


def module_path(node: fx.Node) -> str:
    """Qualified name of the innermost module that the op came from ("" for the root or where unknown)."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0] if isinstance(entry, tuple) else path
    return path
