"""What must hold of the graph between passes. A violation is a bug of the pass that ran last."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from shardplan.planner.passes.draft import Draft


class BrokenGraph(AssertionError):
    """A pass left the graph in a state that no later code can read."""


def verify(draft: Draft, deep: bool = False) -> None:
    """deep: also run every op again on fake values and compare shapes and dtypes with the recorded ones."""
    draft.graph.lint()
    names: set[tuple[str, str]] = set()
    for node in draft.graph.nodes:
        if node.op == "placeholder":
            _check(node in draft.sources, node, "placeholder without a source")
            source = draft.sources[node]
            _check((source.kind, source.name) not in names, node, f"second {source.kind} {source.name}")
            names.add((source.kind, source.name))
            _check((source.kind == "constant") == (node in draft.constants), node, "constant and value do not match")
        elif node.op == "call_function":
            _check(known_target(node.target), node, f"unknown target {node.target}")
            if node.target is not operator.getitem and _has_result(node.target):
                _check("val" in node.meta, node, "no recorded value")
            _check(not _symbolic(node.meta.get("val")), node, "symbolic size")
            if deep:
                _compare(draft, node)
        elif node.op == "output":
            _check(isinstance(node.args[0], tuple) and len(node.args[0]) > 0, node, "output is not a flat tuple")
        else:
            _check(node.op == "get_attr", node, f"unexpected {node.op}")
    for node in draft.sources:
        _check(node.graph is draft.graph, node, "source of a node that is gone")


def _check(condition: bool, node: fx.Node, what: str) -> None:
    if not condition:
        raise BrokenGraph(f"{node.format_node()}: {what}")


def known_target(target: Any) -> bool:
    """Whether a call_function may have the target."""
    return isinstance(target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)) or target is operator.getitem


def _has_result(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and bool(target._schema.returns)


def _symbolic(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return any(not isinstance(extent, int) for extent in value.shape)
    if isinstance(value, (tuple, list)):
        return any(_symbolic(item) for item in value)
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def _changes_arguments(node: fx.Node) -> bool:
    """Such an op would change the recorded values of others; a region may hold one."""
    target = node.target
    return isinstance(target, torch._ops.HigherOrderOperator) or (
        isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
    )


def _facts(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(_facts(item) for item in value)
    return None


def _compare(draft: Draft, node: fx.Node) -> None:
    if node.meta.get("autocast") is not None or _changes_arguments(node):
        return
    found = draft.evaluate(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    _check(
        _facts(found) == _facts(node.meta.get("val")), node, f"gives {_facts(found)}, not {_facts(node.meta['val'])}"
    )
