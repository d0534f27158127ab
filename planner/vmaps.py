"""Calls of `torch.func.vmap` in a captured graph, replaced by the ops on whole batches that they come to.

Export keeps a vmap as it was called: its function's ops on samples, between calls that add a batch dim and take it off.
Those samples exist only while functorch runs. So such a stretch of the graph is run once more on fake tensors, and
traced below functorch, where its rules for batches have done their work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._C._functorch import is_batchedtensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from shardplan.errors import NotTraceable
from shardplan.planner.passes.draft import not_traceable

_BEGIN, _END = "_vmap_increment_nesting", "_vmap_decrement_nesting"
_MODULE = "torch._functorch.predispatch"
_SWITCHES = (torch._C._set_grad_enabled, torch.amp.autocast_mode._enter_autocast)


def inline(program: torch.export.ExportedProgram, fake_mode: Any) -> None:
    """Raises NotTraceable for other transforms of torch.func, for one vmap within another (export has lost what the
    inner one reads), and where a vmap's function switches gradients off."""
    if any(isinstance(c, torch.Tensor) and is_batchedtensor(c) for c in program.constants.values()):
        raise NotTraceable("the model calls one vmap within another", [], ["write the inner one by broadcasting"])
    graph = program.graph_module.graph
    stretch: list[fx.Node] = []
    depth = 0
    for node in list(graph.nodes):
        kind = _functorch(node)
        depth += kind == _BEGIN
        if depth:
            stretch.append(node)
        elif kind and kind != "lazy_load_decompositions":
            raise not_traceable(node, f"uses {kind.strip('_')}, which has no place in one graph of operators")
        if kind == _END:
            depth -= 1
            if not depth:
                _replace(graph, stretch, fake_mode)
                stretch = []
        elif kind and not depth:
            graph.erase_node(node)


def _functorch(node: fx.Node) -> str:
    """Name of the part of torch.func that a node calls, or ""."""
    if node.op == "call_function" and getattr(node.target, "__module__", "") == _MODULE:
        return node.target.__name__  # type: ignore[union-attr]
    return ""


def _replace(graph: fx.Graph, stretch: Sequence[fx.Node], fake_mode: Any) -> None:
    inside = set(stretch)
    for node in stretch:
        if node.op != "call_function" or node.target in _SWITCHES:
            raise not_traceable(node, "switches a mode under vmap")
    entering = list(dict.fromkeys(n for node in stretch for n in node.all_input_nodes if n not in inside))
    leaving = [node for node in stretch if any(user not in inside for user in node.users)]

    def run(*values: Any) -> list[Any]:
        known = dict(zip(entering, values, strict=True))
        for node in stretch:
            args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: known[n])
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return [known[node] for node in leaving]

    with fake_mode:
        traced = make_fx(run, tracing_mode="real", _allow_non_fake_inputs=True)(*(n.meta["val"] for n in entering))
    given = iter(entering)
    known: dict[fx.Node, fx.Node] = {}
    like = next(n for n in stretch if not _functorch(n))
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            known[node] = next(given)
        elif node.op == "output":
            for old, new in zip(leaving, node.args[0], strict=True):
                old.replace_all_uses_with(known[new], delete_user_cb=lambda user: user not in inside)
        elif node.op == "call_function":
            with graph.inserting_before(stretch[0]):
                made = known[node] = graph.node_copy(node, lambda n: known[n])
            made.meta = {"val": node.meta["val"], **{k: like.meta.get(k) for k in ("nn_module_stack", "stack_trace")}}
        else:
            raise not_traceable(like, "makes a tensor of constants under vmap")
    for node in reversed(stretch):
        graph.erase_node(node)
