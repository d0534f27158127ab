"""Find what a mixture of experts does with its sorted rows, and make one op of it (`planner.mixture`).

Looked for is a sort of integers whose every later use comes together in one op that puts rows back in the order before
the sort. Between the two may stand: positions (the order, or the order divided by the choices of a token), rows taken
at positions, where the groups end, products of groups of rows, and ops that treat every row by itself. Anything else
is left as it is: the op by itself can be split less, but it is what the model says.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from shardplan.planner.mixture import MIXTURE, Ref, Step, is_product, run_steps, steps_text, substituted
from shardplan.planner.passes.draft import Draft
from shardplan.planner.rules import families
from shardplan.planner.trace import info, infos, is_tensor, resolve, tensor_args

name = "mixtures"

aten = torch.ops.aten
_SORTS = {aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable}
_CASTS = {aten.to.dtype, aten._to_copy.default}


def apply(draft: Draft) -> None:
    index = {node: i for i, node in enumerate(draft.graph.nodes)}
    weights = _Weights(draft)
    for node in draft.ops():
        if node.target in _SORTS and node.graph is draft.graph:
            found = _Found(draft, node, weights)
            if found.read(index):
                found.replace()


@dataclass(slots=True)
class _Weights:
    """Which values follow from parameters, buffers and constants alone."""

    draft: Draft
    known: dict[fx.Node, bool] = field(default_factory=dict)

    def holds(self, node: fx.Node) -> bool:
        if node not in self.known:
            source = self.draft.sources.get(node)
            self.known[node] = (
                source.kind != "input"
                if source is not None
                else node.op == "call_function"
                and bool(node.all_input_nodes)
                and all(map(self.holds, node.all_input_nodes))
            )
        return self.known[node]


class _Unlike(Exception):
    """The part of the graph is no such mixture."""


class _Found:
    """What starts at one sort."""

    def __init__(self, draft: Draft, sort: fx.Node, weights: _Weights) -> None:
        self.draft, self.sort, self.weights = draft, sort, weights
        self.inside: dict[fx.Node, None] = {}
        self.ids: fx.Node = sort.args[0]  # type: ignore[assignment]
        self.rows: dict[tuple[fx.Node, int], int] = {}
        self.held: dict[fx.Node, int] = {}
        self.steps: dict[fx.Node, int] = {}
        self.made: list[Step] = []
        self.end: fx.Node = sort
        self.experts = 0

    def read(self, index: dict[fx.Node, int]) -> bool:
        try:
            if not isinstance(self.ids, fx.Node) or len(info(self.ids).shape) != 1:
                return False
            if info(self.ids).dtype.is_floating_point or self._option("descending", 2):
                return False
            self.pairs = info(self.ids).shape[0]
            end = self._end(index)
            if end is None:
                return False
            self.end = end
            result = self._result()
            if result not in self.steps or self.steps[result] != len(self.made) - 1:
                return False
            self.text = steps_text(self.made)
        except (_Unlike, TypeError):
            return False
        rows = tuple((info(t).shape[1:], info(t).dtype, fan) for t, fan in self.rows)
        held = tuple((info(t).shape, info(t).dtype) for t in self.held)
        return self.experts > 1 and _by_rows(self.text, self.experts, rows, held, info(self.end).shape[1:])

    def replace(self) -> None:
        fans = [fan for _, fan in self.rows]
        rows, held = [tensor for tensor, _ in self.rows], list(self.held)
        made = self.draft.emit(self.end, MIXTURE, self.text, self.experts, fans, self.ids, rows, held, like=self.end)
        self.draft.replace(self.end, made)

    def _option(self, option: str, place: int) -> Any:
        position = place + (self.sort.target in (aten.sort.stable, aten.argsort.stable)) * (option == "descending")
        given = self.sort.args[position] if position < len(self.sort.args) else None
        return self.sort.kwargs.get(option, given)

    def _end(self, index: dict[fx.Node, int]) -> fx.Node | None:
        """The op that all uses of the sort come together in: nothing else that follows from it is read behind it."""
        waiting = {self.sort}
        last = -1
        grouped = False
        while waiting:
            node = min(waiting, key=lambda n: index.get(n, -1))
            waiting.discard(node)
            if node.op != "call_function" or node not in index:
                return None
            if grouped and not waiting and last <= index[node]:
                return node
            self.inside[node] = None
            grouped = grouped or is_product(node.target)
            for user in node.users:
                waiting.add(user)
                last = max(last, index.get(user, -1))
            if len(self.inside) > 256:
                return None
        return None

    def _result(self) -> fx.Node:
        """The rows that are put back, all of what makes them read as steps."""
        if self.end.target is not aten.index.Tensor:
            raise _Unlike
        rows, (back,) = self.end.args[0], self.end.args[1]  # type: ignore[misc]
        if not isinstance(rows, fx.Node) or not self._puts_back(back):
            raise _Unlike
        for node in self.inside:
            if not is_product(node.target) and not self._is_step(node):
                continue
            self._step(node)
        return rows

    # -- what a node is ------------------------------------------------------------------------------------------------

    def _is_order(self, value: Any) -> bool:
        if not isinstance(value, fx.Node):
            return False
        if self.sort.target in (aten.argsort.default, aten.argsort.stable):
            return value is self.sort
        return resolve(value) == (self.sort, 1) and value is not self.sort

    def _is_ordered(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and value is not self.sort and resolve(value) == (self.sort, 0)

    def _fan(self, value: Any) -> int:
        """Pairs of a token, where the value says at which token a pair stands; 0: it says nothing of the kind."""
        if self._is_order(value):
            return 1
        if isinstance(value, fx.Node) and value.target in (aten.floor_divide.default, aten.div.Tensor_mode):
            floors = value.target is aten.floor_divide.default or value.kwargs.get("rounding_mode") == "floor"
            if floors and self._is_order(value.args[0]) and isinstance(value.args[1], int) and value.args[1] > 0:
                return value.args[1]
        return 0

    def _puts_back(self, value: Any) -> bool:
        """Whether the value is the inverse of the order."""
        if not isinstance(value, fx.Node):
            return False
        if value.target in (aten.index_put.default, aten.scatter.src):
            counted = value.args[2] if value.target is aten.index_put.default else value.args[3]
            where = value.args[1][0] if value.target is aten.index_put.default else value.args[2]  # type: ignore[index]
            plain = len(value.args) < 4 or value.target is aten.scatter.src or not value.args[3]
            return plain and self._is_order(where) and _counts(counted, self.pairs)
        maker, result = resolve(value)
        if maker.target in (aten.argsort.default, aten.argsort.stable):
            return len(maker.args) < 3 and not maker.kwargs.get("descending") and self._is_order(maker.args[0])
        return (
            maker.target in (aten.sort.default, aten.sort.stable)
            and result == 1
            and len(maker.args) < 3
            and not maker.kwargs.get("descending")
            and self._is_order(maker.args[0])
        )

    def _is_ends(self, value: fx.Node) -> bool:
        """Whether the value says where the groups end."""
        value = _uncast(value)
        if value.target is not aten.cumsum.default or value.args[1] not in (0, -1):
            return False
        counted = _uncast(value.args[0])  # type: ignore[arg-type]
        if counted.target is aten.histc.default:
            of, bins, *ends = counted.args
            self.experts = int(bins)  # type: ignore[arg-type]
            right = [float(e) for e in ends] == [0.0, float(self.experts - 1)]  # type: ignore[arg-type]
        elif counted.target is aten.bincount.default:
            of, right = counted.args[0], len(counted.args) < 2 or counted.args[1] is None
            self.experts = int(info(counted).shape[0])
        else:
            return False
        of = _uncast(of)  # type: ignore[arg-type]
        return right and (self._is_ordered(of) or of is _uncast(self.ids))

    def _is_step(self, node: fx.Node) -> bool:
        """Whether the node is made of rows."""
        return node in self.steps or any(
            a in self.steps or self._taken(a) is not None for a in tensor_args(node) if a in self.inside
        )

    def _taken(self, value: fx.Node) -> tuple[fx.Node, int] | None:
        """The tensor whose rows are taken at sorted positions, and its fan."""
        if value.target is aten.index.Tensor and len(value.args[1]) == 1:  # type: ignore[arg-type]
            tensor, fan = value.args[0], self._fan(value.args[1][0])  # type: ignore[index]
        elif value.target is aten.index_select.default and value.args[1] == 0:
            tensor, fan = value.args[0], self._fan(value.args[2])
        else:
            return None
        if not fan or not isinstance(tensor, fx.Node) or tensor in self.inside:
            return None
        return (tensor, fan) if info(tensor).shape[0] * fan == self.pairs else None

    def _step(self, node: fx.Node) -> None:
        if node in self.steps:
            return

        def ref(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(ref(item) for item in value)
            return self._ref(value) if isinstance(value, fx.Node) else value

        if node.target is not operator.getitem and not isinstance(node.target, torch._ops.OpOverload):
            raise _Unlike
        args, kwargs = ref(tuple(node.args)), {key: ref(value) for key, value in node.kwargs.items()}
        if node.target is not operator.getitem and not _row_by_row(node, args, kwargs):
            raise _Unlike
        if is_product(node.target) and (args[2:3] or (kwargs.get("offs"),)) != (Ref("o", 0),):
            raise _Unlike
        self.steps[node] = len(self.made)
        self.made.append(Step(node.target, args, kwargs))

    def _ref(self, value: fx.Node) -> Ref:
        taken = self._taken(value)
        if taken is not None:
            return Ref("r", self.rows.setdefault(taken, len(self.rows)))
        if value in self.inside and self._is_ordered(value):
            return Ref("i", 0)
        if value not in self.inside and self.weights.holds(value):
            return Ref("h", self.held.setdefault(value, len(self.held)))
        if is_tensor(value) and not info(value).dtype.is_floating_point and self._is_ends(value):
            return Ref("o", 0)
        if value in self.inside and value is not self.sort:
            if value.target is aten.index.Tensor and not self._indexes_held(value):
                raise _Unlike
            self._step(value)
            return Ref("s", self.steps[value])
        raise _Unlike

    def _indexes_held(self, value: fx.Node) -> bool:
        """A vector an expert, taken for every row (a bias)."""
        base, at = value.args[0], value.args[1]
        return self.weights.holds(base) and len(at) == 1 and self._is_ordered(at[0])  # type: ignore[arg-type,index]


def _counts(value: Any, pairs: int) -> bool:
    """Whether the value is 0, 1, ..., pairs - 1."""
    if not isinstance(value, fx.Node):
        return False
    if value.target is aten.arange.default:
        return value.args[0] == pairs
    return value.target is aten.arange.start and value.args[:2] == (0, pairs)


def _uncast(value: Any) -> Any:
    while isinstance(value, fx.Node) and value.target in _CASTS:
        value = value.args[0]
    return value


def _row_by_row(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the op treats every row by itself: it is a product of groups, or may be split along them."""
    refs: list[Ref] = []
    substituted((args, kwargs), refs.append)
    if is_product(node.target):
        return [ref.kind for ref in refs[:2]] in (["r", "h"], ["s", "h"]) and len(info(tensor_args(node)[1]).shape) == 3
    rule = families.rule_of(node)
    wanted = [ref.kind in ("r", "s", "i") for ref in refs]
    if node.target is aten.index.Tensor:
        return wanted == [False, True]
    for strategy in rule(node) if rule is not None else ():
        split = [p.is_shard and p.dim == 0 and not p.sections for p in strategy.inputs]
        if split == wanted and strategy.impl is None and not strategy.scale:
            return all(p.is_shard and p.dim == 0 for p in strategy.outputs) and bool(infos(node))
    return False


@lru_cache(maxsize=256)
def _by_rows(text: str, experts: int, rows: Any, held: Any, result: Any) -> bool:
    """Whether the steps run on any number of rows, and give one row for each."""

    def shapes(count: int) -> Iterator[tuple[int, ...]]:
        given = [torch.empty((count, *shape), dtype=dtype, device="meta") for shape, dtype, _ in rows]
        with torch.no_grad():
            found = run_steps(
                text,
                given,
                torch.empty(count, dtype=torch.int64, device="meta"),
                torch.empty(experts, dtype=torch.int32, device="meta"),
                [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in held],
            )
        yield tuple(found.shape)

    try:
        return all(next(shapes(count)) == (count, *result) for count in (48, 80))
    except (RuntimeError, IndexError, ValueError):
        return False
