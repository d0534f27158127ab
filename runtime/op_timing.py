"""Seconds of every op of a stage as it runs in a step: forward line by line, backward node by node.

The source of a stage is compiled once more with a mark behind every call. A mark notes the time and hooks the node of
autograd that the call made, so that backward says when it gets there: what runs from one such moment to the next is
the op's backward. On a CPU rank with one thread an op's time is that of its thread, which other processes on the
machine lengthen less than wall time; a collective's is wall time. On a GPU the moments are events in its stream.
"""

from __future__ import annotations

import ast
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from shardplan.planner.instructions import Op

GRADIENTS = "gradients"
"""Class of what adds gradients into parameters."""
START = "start"
"""Class of what an instruction does before the first op and after the last."""
_COLLECTIVES = "collectives"
_SIDES = {Op.FORWARD: "forward", Op.BACKWARD: "backward", Op.BACKWARD_INPUT: "backward", Op.BACKWARD_WEIGHT: "backward"}
_OPS = "torch.ops."


def timed(source: str, name: str, bound: Mapping[str, Any] | None, clock: OpClock) -> Callable[..., Any]:
    """The function that a stage's source defines, with a mark of `clock` behind every call."""
    tree = ast.parse(source)
    _Marks().visit(tree)
    ast.fix_missing_locations(tree)
    scope: dict[str, Any] = {**(bound or {}), "__name__": f"shardplan_{name}", _Marks.NAME: clock.mark}
    exec(compile(tree, f"<shardplan {name}, timed>", "exec"), scope)
    return scope["stage"]


def class_of(call: str) -> str:
    """The class of a call as it stands in the source: "aten.linear.default", "collectives.all_reduce_identity"."""
    return call.removeprefix(_OPS).removeprefix("shardplan.rewrite.")


def is_collective(op_class: str) -> bool:
    return op_class.startswith(_COLLECTIVES)


class _Marks(ast.NodeTransformer):
    """Behind ``x = f(...)`` comes ``mark("f", x)``."""

    NAME = "__mark"

    def visit_Assign(self, node: ast.Assign) -> Any:
        target = node.targets[0]
        if not isinstance(node.value, ast.Call) or not isinstance(target, ast.Name):
            return node
        called = ast.unparse(node.value.func)
        if called in ("checkpoint", "later.recomputed"):  # its lines have marks of their own
            return node
        mark = ast.Call(
            ast.Name(self.NAME, ast.Load()), [ast.Constant(class_of(called)), ast.Name(target.id, ast.Load())], []
        )
        return [node, ast.Expr(mark)]


class OpClock:
    """Adds up seconds by (class, "forward" | "backward" | "again"); "again" is a forward within a backward."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = ""
        self._log: list[tuple[tuple[str, str] | None, Any]] = []
        self._current = START
        self._gradient_nodes: list[Any] = []

    def watch_parameters(self, parameters: Any) -> None:
        """Tell apart what adds gradients into these leaves."""
        for parameter in {id(p): p for p in parameters}.values():
            if parameter.requires_grad and parameter.is_leaf:
                with torch.enable_grad():
                    node = parameter.view_as(parameter).grad_fn.next_functions[0][0]
                node.register_prehook(self._enter)
                node.register_hook(self._leave)
                self._gradient_nodes.append(node)  # lives as long as somebody holds it

    def begin(self, op: Op) -> None:
        """An instruction starts."""
        self._side = _SIDES.get(op, "")
        self._current = START
        self._note(None)

    def end(self) -> None:
        """An instruction is done."""
        self._note((self._current, self._side) if self._side else None)

    def mark(self, op_class: str, result: Any) -> None:
        """A call of that class returned."""
        self._note((op_class, "again" if self._side == "backward" else "forward"))
        if self._side == "forward":
            self._current = START  # what comes behind the last op
        tensor = result[0] if isinstance(result, (tuple, list)) and result else result
        node = tensor.grad_fn if isinstance(tensor, torch.Tensor) else None
        if node is not None:
            node.register_prehook(lambda _: self._at(op_class))
        self._note(None)

    def _at(self, op_class: str) -> None:
        self._note((self._current, "backward"))
        self._current = op_class
        self._note(None)

    def _enter(self, _: Any) -> None:
        self._note((self._current, "backward"))
        self._note(None)

    def _leave(self, *_: Any) -> None:
        self._note((GRADIENTS, "backward"))
        self._note(None)

    def _note(self, key: tuple[str, str] | None) -> None:
        if self.device.type == "cuda":
            stamp: Any = torch.cuda.Event(enable_timing=True)
            stamp.record()
        else:
            stamp = time.thread_time(), time.perf_counter()
        self._log.append((key, stamp))

    def take(self) -> dict[tuple[str, str], float]:
        """Seconds by class and direction since the last call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[tuple[str, str], float] = {}
        for (_, before), (key, after) in zip(self._log, self._log[1:]):
            if key is not None:
                found[key] = found.get(key, 0.0) + self._between(key[0], before, after)
        self._log.clear()
        return found

    def _between(self, op_class: str, before: Any, after: Any) -> float:
        if self.device.type == "cuda":
            return before.elapsed_time(after) / 1e3
        wall = is_collective(op_class) or torch.get_num_threads() > 1
        return after[wall] - before[wall]
