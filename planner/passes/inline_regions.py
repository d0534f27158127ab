"""Inline no_grad, enable_grad and autocast regions; remember on every node which region it came from.

The marks ("no_grad", "autocast") are turned into detach and cast nodes by `autocast_casts` and `detach_edges`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from shardplan.planner.passes.draft import Draft, not_traceable

name = "inline-regions"

GRAD_REGION = "wrap_with_set_grad_enabled"
AUTOCAST_REGION = "wrap_with_autocast"
CHECKPOINT_REGION = "tag_activation_checkpoint"


def apply(draft: Draft) -> None:
    """Regions within regions included; the innermost region decides."""
    while regions := [node for node in draft.ops() if _region(node)]:
        for node in regions:
            _inline(draft, node)
    for node in list(draft.graph.nodes):
        if node.op == "get_attr" and not node.users:
            draft.graph.erase_node(node)


def _region(node: fx.Node) -> str:
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return ""
    kind = node.target.name()
    if kind in (GRAD_REGION, AUTOCAST_REGION, CHECKPOINT_REGION):
        return kind
    raise not_traceable(node, f"uses {kind}, which has no place in one graph of operators")


def _inline(draft: Draft, node: fx.Node) -> None:
    kind = _region(node)
    no_grad, autocast = node.meta.get("no_grad", False), node.meta.get("autocast")
    if kind == GRAD_REGION:
        enabled, body, *operands = node.args
        no_grad = not enabled
    elif kind == AUTOCAST_REGION:
        _device, dtype, enabled, _cache, body, *operands = node.args
        autocast = dtype if enabled else None
    else:
        body, *operands = node.args
        draft.note("activation checkpointing in the model is ignored: rematerialisation is planned")
    assert isinstance(body, fx.Node)
    inner: fx.GraphModule = draft.module.get_submodule(str(body.target))  # type: ignore[assignment]
    known: dict[fx.Node, Any] = dict(zip([n for n in inner.graph.nodes if n.op == "placeholder"], operands))
    for old in inner.graph.nodes:
        if old.op in ("placeholder", "output"):
            continue
        with draft.graph.inserting_before(node):
            if old.op == "get_attr":
                made = draft.graph.get_attr(_adopt(draft, getattr(inner, str(old.target))))
                made.meta = dict(old.meta)
            else:
                made = draft.graph.node_copy(old, lambda n: known[n])
        made.meta["no_grad"], made.meta["autocast"] = no_grad, autocast
        known[old] = made
    (returned,) = next(n for n in reversed(inner.graph.nodes) if n.op == "output").args
    results = map_arg(returned, lambda n: known[n])
    for user in list(node.users):
        if not isinstance(results, (tuple, list)):
            break
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index,arg-type]
        draft.graph.erase_node(user)
    if not isinstance(results, (tuple, list)):
        node.replace_all_uses_with(results)  # type: ignore[arg-type]
    draft.graph.erase_node(node)


def _adopt(draft: Draft, module: Any) -> str:
    number = 0
    while hasattr(draft.module, f"region_{number}"):
        number += 1
    setattr(draft.module, f"region_{number}", module)
    return f"region_{number}"


def mark_switched(graph: fx.Graph) -> None:
    """The same marks for a graph in which regions are calls that switch a mode on and off, as from `make_fx`."""
    enabled = True
    autocasts: list[Any] = []
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
            graph.erase_node(node)
        elif node.target is torch.amp.autocast_mode._enter_autocast:
            _device, dtype, active, *_ = node.args
            autocasts.append(dtype if active else None)
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            autocasts.pop()
            entered = node.args[0]
            graph.erase_node(node)
            graph.erase_node(entered)  # type: ignore[arg-type]
        else:
            node.meta["no_grad"] = not enabled
            node.meta["autocast"] = autocasts[-1] if autocasts else None
