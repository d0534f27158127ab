"""Set `needs_grad` on every node, as autograd will."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from shardplan.planner.leaf_op import is_leaf, leaf_results
from shardplan.planner.passes.draft import Draft, aten_ops, packet
from shardplan.planner.trace import needs_grad as flows
from shardplan.planner.trace import set_needs_grad, set_result_grads, tensor_args

name = "gradients"

# Results that do not depend on the values of the argument, only on its shape and dtype.
SHAPE_ONLY = aten_ops(
    "zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros new_ones new_full "
    "new_empty new_empty_strided detach"
)


def apply(draft: Draft) -> None:
    """A gradient starts at trainable floating parameters; integers, detach and no_grad regions stop it."""
    for node in draft.graph.nodes:
        set_needs_grad(node, draft.training and _needs(draft, node))
        if is_leaf(node):
            set_result_grads(node, tuple(flows(node) and result.differentiable for result in leaf_results(node)))


def _floating(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dtype.is_floating_point or value.dtype.is_complex
    return isinstance(value, (tuple, list)) and any(_floating(item) for item in value)


def _needs(draft: Draft, node: fx.Node) -> bool:
    if not _floating(node.meta.get("val")):
        return False
    if node.op == "placeholder":
        return draft.sources[node].trainable
    if node.target is operator.getitem:
        source: Any = node.args[0]
        linked = not is_leaf(source) or leaf_results(source)[int(node.args[1])].differentiable  # type: ignore[arg-type]
        return linked and flows(source)
    if node.op != "call_function" or node.meta.get("no_grad") or packet(node) in SHAPE_ONLY:
        return False
    return any(flows(argument) for argument in tensor_args(node))
