"""A stage graph as readable Python source, and back to a function.

The source is a module of its own: imports, then ``def stage(comm, device, <arguments>)``. Values are released at their
last use. Nodes that share a group are outlined into an inner function that runs under ``torch.utils.checkpoint``, or
around parameters that are gathered for it.
"""

from __future__ import annotations

import linecache
import math
import operator
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

_HEADER = (
    "import torch",
    "from torch.utils.checkpoint import checkpoint",
    "from shardplan.rewrite import collectives, kernels, later, random_ops, storage",
)
_RESERVED = frozenset(
    {"torch", "checkpoint", "collectives", "kernels", "later", "random_ops", "storage", "stage", "shardplan"}
    | {"inf", "nan", "float"}
)
_GROUP = "shardplan_group"
_CHAIN = "shardplan_chain"
_SPLIT = "shardplan_split"


@dataclass(frozen=True, slots=True)
class Bound:
    """Stands in a stage graph for a value that the source finds by name when it is loaded."""

    name: str


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive nodes of a stage graph that become an inner function. recomputed: it is run again in backward;
    otherwise it runs around gathered parameters (see `rewrite.storage`)."""

    name: str
    recomputed: bool


def set_group(node: fx.Node, group: Group | None) -> None:
    """Mark a node of a stage graph as part of a group, or of none."""
    node.meta[_GROUP] = group


def group_of(node: fx.Node) -> Group | None:
    """The group that a node is part of."""
    return node.meta.get(_GROUP)


def set_chain(node: fx.Node) -> None:
    """Mark a node whose backward is not put off, see `rewrite.split_backward`."""
    node.meta[_CHAIN] = True


def set_split(node: fx.Node, weights: tuple[fx.Node, ...]) -> None:
    """Mark an op whose gradients of `weights` are put off."""
    node.meta[_SPLIT] = weights


def emit(graph: fx.Graph) -> str:
    """Source text of a stage graph whose first placeholders are ``comm`` and ``device``."""
    return _Emitter(graph).text()


def load(source: str, name: str, bound: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """The function that the source defines. `name` is shown as its file in tracebacks; bound: values by name (see
    `Bound`)."""
    filename = f"<shardplan {name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    scope: dict[str, Any] = {**(bound or {}), "__name__": f"shardplan_{name}"}
    exec(compile(source, filename, "exec"), scope)
    return scope["stage"]


class _Emitter:
    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.imports: set[str] = set()
        self.names: dict[fx.Node, str] = {}
        taken: set[str] = set(_RESERVED)
        for node in self.nodes:
            name = node.name
            while name in taken:
                name += "_"
            taken.add(name)
            self.names[node] = name
        self.last_use: dict[fx.Node, int] = {}
        for position, node in enumerate(self.nodes):
            for argument in node.all_input_nodes:
                self.last_use[argument] = position

    def text(self) -> str:
        body: list[str] = []
        parameters = [self.names[n] for n in self.nodes if n.op == "placeholder"]
        position = 0
        while position < len(self.nodes):
            node = self.nodes[position]
            group = node.meta.get(_GROUP)
            if group is None:
                body += self.line(position)
                position += 1
                continue
            end = position
            while end < len(self.nodes) and self.nodes[end].meta.get(_GROUP) == group:
                end += 1
            body += self.outline(position, end, group)
            position = end
        header = [*_HEADER, *sorted(f"import {module}" for module in self.imports)]
        lines = [*header, "", "", f"def stage({', '.join(parameters)}):", *(f"    {line}" for line in body)]
        return "\n".join(lines) + "\n"

    def outline(self, start: int, end: int, group: Group) -> list[str]:
        inside = self.nodes[start:end]
        members = set(inside)
        taken = list(dict.fromkeys(a for n in inside for a in n.all_input_nodes if a not in members))
        taken.sort(key=lambda n: not n.meta.get(_CHAIN, False))
        given = [n for n in inside if any(user not in members for user in n.users)]
        lines = [f"def {group.name}({', '.join(self.names[n] for n in taken)}):"]
        for position in range(start, end):
            lines += [f"    {line}" for line in self.line(position, keep=given, bound=members)]
        results = ", ".join(self.names[n] for n in given)
        lines.append(f"    return {results}")
        arguments = ", ".join([group.name, *(self.names[n] for n in taken)])
        call = f"storage.around({arguments})"
        chain = [n for n in taken if n.meta.get(_CHAIN)]
        if group.recomputed and chain:
            others = [n for n in taken if n not in chain]
            places = [i for i, n in enumerate(given) if n.meta.get(_CHAIN)]
            values = ", ".join([group.name, self.names_of(chain), self.names_of(others), _tuple(places)])
            call = f"later.recomputed(comm, {values})"
        elif group.recomputed:
            # Random numbers follow from where they stand, so the state of the generators need not be kept.
            call = f"checkpoint({arguments}, use_reentrant=False, preserve_rng_state=False)"
        dead = [n for n in taken if self.last_use.get(n, -1) < end and n.op != "placeholder"]
        lines.append(f"{results} = {call}{self.release(dead)}")
        return lines

    def line(self, position: int, keep: Iterable[fx.Node] = (), bound: set[fx.Node] | None = None) -> list[str]:
        node = self.nodes[position]
        if node.op == "placeholder":
            return []
        if node.op == "output":
            values = node.args[0]
            assert isinstance(values, (tuple, list))
            inner = ", ".join(self.value(v) for v in values)
            return [f"return ({inner}{',' if len(values) == 1 else ''})"]
        dead = [
            a
            for a in node.all_input_nodes
            if self.last_use[a] == position
            and a.op != "placeholder"
            and a not in keep
            and (bound is None or a in bound)
        ]
        return [f"{self.names[node]} = {self.call(node)}{self.release(dead)}"]

    def release(self, dead: list[fx.Node]) -> str:
        return f"; {' = '.join(self.names[n] for n in dead)} = None" if dead else ""

    def call(self, node: fx.Node) -> str:
        if node.target is operator.getitem:
            return f"{self.value(node.args[0])}[{self.value(node.args[1])}]"
        parts = [self.value(a) for a in node.args] + [f"{k}={self.value(v)}" for k, v in node.kwargs.items()]
        call = f"{self.target(node.target)}({', '.join(parts)})"
        weights = node.meta.get(_SPLIT)
        if weights is None:
            return call
        chain = [a for a in node.all_input_nodes if a.meta.get(_CHAIN)]
        names = ", ".join(self.names[n] for n in (*chain, *weights))
        return f"later.split(comm, lambda {names}: {call}, {self.names_of(chain)}, {self.names_of(weights)})"

    def names_of(self, nodes: Iterable[fx.Node]) -> str:
        """The text of a tuple of nodes."""
        return _tuple(self.names[n] for n in nodes)

    def target(self, target: Any) -> str:
        if isinstance(target, torch._ops.OpOverload):
            namespace, name = target._schema.name.split("::")
            return f"torch.ops.{namespace}.{name}.{target._overloadname}"
        module, name = target.__module__, target.__qualname__
        for short in ("collectives", "kernels", "later", "random_ops", "storage"):
            if module == f"shardplan.rewrite.{short}":
                return f"{short}.{name}"
        self.imports.add(module)
        return f"{module}.{name}"

    def value(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.names[value]
        if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
            return repr(value)
        if isinstance(value, Bound):
            return value.name
        if isinstance(value, (torch._ops.OpOverload, types.FunctionType)):
            return self.target(value)
        if isinstance(value, float):
            return repr(value) if math.isfinite(value) else f'float("{value}")'
        if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
            return str(value)
        if isinstance(value, torch.device):
            return repr(value) if value.type == "meta" else "device"
        if isinstance(value, slice):
            return f"slice({self.value(value.start)}, {self.value(value.stop)}, {self.value(value.step)})"
        if isinstance(value, tuple):
            return f"({', '.join(map(self.value, value))}{',' if len(value) == 1 else ''})"
        if isinstance(value, list):
            return f"[{', '.join(map(self.value, value))}]"
        if isinstance(value, complex):
            return repr(value)
        raise TypeError(f"cannot write {value!r} of type {type(value).__name__} as source")


def _tuple(texts: Iterable[object]) -> str:
    parts = [str(text) for text in texts]
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
