"""The graph while it is being normalised, and the few operations that passes do on it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from shardplan.errors import NotTraceable
from shardplan.planner.trace import Source, module_path

KEPT_META = ("nn_module_stack", "stack_trace", "no_grad", "autocast")


@dataclass(eq=False)
class Draft:
    """A graph on its way to a Trace; passes change it in place.

    module: holds the graph and, until they are inlined, the submodules of its regions. The output node returns a flat
        tuple: the loss (or None) first, then the output's tensor leaves.
    sources, constants: placeholder -> what it stands for, and the value of the constants among them.
    fake_mode: mode of the fake tensors in ``meta["val"]``.
    """

    module: fx.GraphModule
    sources: dict[fx.Node, Source]
    constants: dict[fx.Node, torch.Tensor]
    fake_mode: Any
    training: bool = True
    notes: list[str] = field(default_factory=list)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def ops(self) -> Iterator[fx.Node]:
        """The call_function nodes, in order; safe while nodes are added or erased."""
        return iter([node for node in self.graph.nodes if node.op == "call_function"])

    def emit(self, before: fx.Node, target: Callable[..., Any], *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
        """A new call placed before `before`, with its fake value; stack and region marks come from `like`."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        for key in KEPT_META:
            if key in like.meta:
                node.meta[key] = like.meta[key]
        node.meta["val"] = self.evaluate(target, args, kwargs)
        return node

    def evaluate(self, target: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Fake result of a call whose node arguments stand for their fake values."""
        args, kwargs = map_arg((args, dict(kwargs)), lambda node: node.meta["val"])
        with self.fake_mode or contextlib.nullcontext(), torch.no_grad():
            return target(*args, **kwargs)

    def replace(self, node: fx.Node, value: fx.Node) -> None:
        """Let `value` stand for `node` everywhere, and erase `node`."""
        node.replace_all_uses_with(value)
        self.graph.erase_node(node)

    def note(self, text: str) -> None:
        """Something the user should be told; each text once."""
        if text not in self.notes:
            self.notes.append(text)


def packet(node: fx.Node) -> str:
    """Namespace and name of the operator without its overload ("aten.add"), or "" for anything else."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[1]}"
    return ""


def aten_ops(names: str) -> frozenset[str]:
    """ "add mul" -> {"aten.add", "aten.mul"}, as `packet` names them."""
    return frozenset(f"aten.{name}" for name in names.split())


def same_storage(a: Any, b: Any) -> bool:
    """Whether two fake tensors share memory."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    try:
        return a.untyped_storage()._cdata == b.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return False


def location(node: fx.Node) -> tuple[str, str]:
    """(file:line, source line) of the statement of the user's code that made the node; empty where unknown."""
    found = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', node.meta.get("stack_trace") or "")
    if not found:
        return "", ""
    file, line, text = found[-1]
    return f"{file}:{line}", text.strip()


def way_out(path: str | None) -> list[str]:
    """Hints for a module that no graph can hold. "": the model itself, of which a part can be a leaf."""
    if path is None:
        return []
    if path:
        return [f'constraints=[leaf("{path}")] keeps it whole', f"choose with torch.where in {path}"]
    return ['move that part into a submodule "name": it is then kept whole, as by constraints=[leaf("name")]']


def not_traceable(node: fx.Node, what: str) -> NotTraceable:
    """The error for a node that cannot be part of a trace: where it came from, and what can be done."""
    place, text = location(node)
    path = module_path(node)
    details = [f"{place}: {text}"] if place else []
    error = NotTraceable(f"{path or 'the model'} {what}", details, way_out(path))
    error.module = path
    return error
