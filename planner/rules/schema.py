"""Arguments of ATen calls by their schema's names, and shapes of the tensors among them."""

from __future__ import annotations

from typing import Any

from torch import fx

from shardplan.planner.trace import info, is_tensor, tensor_args


def position(target: Any, name: str) -> int:
    """Index of a schema argument, or -1 where the op has none of that name."""
    for index, declared in enumerate(target._schema.arguments):
        if declared.name == name:
            return index
    return -1


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """Value of a schema argument, given by position or by name, or the schema's default."""
    index = position(node.target, name)
    if index < 0:
        return default
    if index < len(node.args):
        return node.args[index]
    declared = node.target._schema.arguments[index]  # type: ignore[union-attr]
    return node.kwargs.get(name, declared.default_value if declared.has_default_value() else default)


def shapes(node: fx.Node) -> list[tuple[int, ...]]:
    """Global shapes of the tensor arguments (empty for an argument that is a tuple)."""
    return [info(a).shape if is_tensor(a) else () for a in tensor_args(node)]
