"""Floating-point operations of matrix products, and the share of them that a plan really splits over one axis.

Counted by running every op's forward on fake tensors under `torch.utils.flop_counter`, so that whatever an op consists
of inside (mm, bmm, addmm, convolution, attention, grouped products) counts, whether or not the planner knows the op.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from shardplan.planner.placement import Mesh
from shardplan.planner.plan import Plan
from shardplan.planner.rules import LocalCall, Slot, Strategy, local_call
from shardplan.planner.trace import Trace, infos, leaf_of, resolve

aten = torch.ops.aten


def _attention_on_cpu(query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> int:
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _grouped(left: Any, right: Any, *rest: Any, **more: Any) -> int:
    """Rows of a 2-d left operand are dealt out to the groups of a 3-d right one; batches and 2-d x 2-d likewise."""
    if len(left) == 2 and len(right) == 2:  # the contracted dim is dealt out
        return 2 * left[0] * left[1] * right[1]
    return 2 * math.prod(left) * right[-1]


_FORMULAS = {aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu, aten._grouped_mm: _grouped}


def flops_of(call: LocalCall) -> int:
    """Of the forward of one call at its local shapes."""
    with FakeTensorMode(), torch.no_grad():
        tensors = [torch.empty(i.shape, dtype=i.dtype) for i in call.inputs]

        def fill(value: Any) -> Any:
            return tensors[value.index] if isinstance(value, Slot) else value

        args, kwargs = pytree.tree_map(fill, (call.args, call.kwargs), is_leaf=lambda v: isinstance(v, Slot))
        with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
            call.target(*args, **kwargs)
    return counter.get_total_flops()


def split_share(trace: Trace, plan: Plan, axis: str = "tp") -> tuple[float, list[tuple[str, float]]]:
    """(share of the trace's operations that the plan divides by the size of the axis, what is not divided).

    The second is a list of (node and op, share of all operations), the largest first. NaN where nothing multiplies.
    """
    mesh = Mesh((axis,), (plan.stages[0].mesh.size(axis),))
    total = 0
    whole: dict[str, int] = {}
    for node in trace.nodes():
        if not _computes(node):
            continue
        everything = _on_one_rank(node, {}, mesh)
        if not everything:
            continue
        total += everything
        strategy = plan.strategy(axis, node.name)
        mine = everything if strategy is None else _on_one_rank(node, {axis: strategy}, mesh)
        if mine * mesh.sizes[0] > everything:
            whole[f"{node.name} {node.target}"] = everything
    if not total:
        return math.nan, []
    listed = sorted(((name, flops / total) for name, flops in whole.items()), key=lambda item: -item[1])
    return 1 - sum(whole.values()) / total, listed


def _on_one_rank(node: fx.Node, chosen: dict[str, Strategy], mesh: Mesh) -> int:
    note = leaf_of(node)
    if note is None:
        return flops_of(local_call(node, chosen, mesh))
    split = any(strategy.is_split for strategy in chosen.values())
    return int(note.leaf.flops) // (mesh.sizes[0] if split else 1)


def _computes(node: fx.Node) -> bool:
    return node.op == "call_function" and resolve(node)[0] is node and bool(infos(node))
