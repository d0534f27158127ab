"""A submodule that is kept whole, as a rank runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.autograd import Function

from shardplan.errors import LeafChanged
from shardplan.planner.leaf_op import Leaf
from shardplan.planner.leaf_probe import drawing
from shardplan.planner.placement import COLLECTIVES, R, conversion
from shardplan.planner.reshard import steps
from shardplan.planner.trace import leaf_of, needs_grad, tensor_args
from shardplan.rewrite.comm import Comm

if TYPE_CHECKING:
    from shardplan.rewrite.implement import OpContext

Shapes = tuple[tuple[int, ...], ...]


def implement_leaf(op: OpContext) -> fx.Node:
    """The call of a leaf: its `Leaf` travels with the program and is bound in the source by name."""
    note = leaf_of(op.node)
    assert note is not None
    bound = op.stage.leaf(note.leaf)
    arguments = tensor_args(op.node)
    # A parameter may go without a gradient, unless the backward of its conversion waits for other ranks.
    held = [i for i in range(note.leaf.inputs, len(arguments)) if arguments[i].op == "placeholder"]
    op.stage.lowered.late |= {op.stage.trace.sources[arguments[i].name].name for i in held}
    alone = [i for i in held if not _waits(op, arguments[i], i)]
    if any(strategy.is_split for strategy in op.chosen.values()):
        op.stage.lowered.uneven |= {op.stage.trace.sources[arguments[i].name].name for i in alone}
    return op.emit(
        run_leaf,
        op.stage.comm,
        op.stage.sites[op.node.name],
        bound,
        tuple(out.shape for out in op.call.outputs),
        tuple(i for i, out in enumerate(op.call.outputs) if out.needs_grad),
        tuple(i for i, argument in enumerate(arguments) if needs_grad(argument) and i not in alone),
        note.draws,
        *op.arguments,
    )


def _waits(op: OpContext, value: fx.Node, position: int) -> bool:
    """Whether the gradient of a tensor argument goes through a collective of ranks that have other parts of the batch,
    and may have gone another way inside the leaf."""
    kept = op.stage.stored.get(value.name)
    if kept is not None and kept.level > 1:
        return True
    mesh = op.stage.mesh
    wanted = tuple(op.chosen[a].inputs[position] if a in op.chosen else R for a in mesh.axes)
    apart = {axis for axis, strategy in op.chosen.items() if strategy.is_split}
    found = (s for s in steps(op.stage.layout(value), wanted, mesh) if s.axis in apart)
    return any(conversion(s.source, s.target, True).backward in COLLECTIVES for s in found)


def run_leaf(
    comm: Comm,
    site: int,
    leaf: Leaf,
    shapes: Shapes,
    differentiable: tuple[int, ...],
    read: tuple[int, ...],
    draws: bool,
    *tensors: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """The leaf's results, of the given local shapes, under ordinary autograd.

    differentiable: results to which a gradient flows; read: tensors whose gradient other ranks may wait for. Each of
    these gets one, zeros where the module did not use it this time; other tensors that it did not use have none.
    draws: random numbers inside follow from `site` and the step.
    """
    given = list(tensors)
    grads = torch.is_grad_enabled() and bool(differentiable)
    tied = grads and bool(read)
    anchor: torch.Tensor | None = None
    if tied:
        anchor, *passed = _Pass.apply(*(given[i] for i in read))  # type: ignore[misc]
        for i, tensor in zip(read, passed, strict=True):
            given[i] = tensor
    if draws:
        with drawing(comm.key(site) % 2**63):
            found = list(leaf(*given))
    else:
        found = list(leaf(*given))
    now = tuple(tuple(result.shape) for result in found)
    if now != shapes:
        raise LeafChanged(
            f"{leaf.name} returned shapes {now}, not {shapes} as when it was traced",
            ["results whose shapes depend on data cannot be planned for"],
        )
    if grads:
        wanted = [found[i] for i in differentiable]
        # Results that the module did not link to anything this time need a gradient all the same: it goes nowhere.
        linked = _Tie.apply(anchor, *wanted) if tied else [r if r.requires_grad else r.requires_grad_() for r in wanted]
        for i, tensor in zip(differentiable, linked, strict=True):  # type: ignore[arg-type]
            found[i] = tensor
    return tuple(found)


class _Pass(Function):
    """Tensors as they are, behind an anchor: where a gradient of the anchor arrives, every one of them gets one."""

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tensors[0].new_zeros(()), *(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, _anchor: torch.Tensor, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return grads


class _Tie(Function):
    """Results as they are; a gradient of any of them is also one (zero) of the anchor."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *results: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.like = anchor
        return tuple(r.view_as(r) for r in results)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return torch.zeros_like(ctx.like), *grads
