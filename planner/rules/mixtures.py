"""How a mixture of experts (`planner.mixture`) may be split on one axis.

====  ===========================================  =============================================================
name  what is split                                state
====  ===========================================  =============================================================
t     rows: each rank sorts its own                ids S(0), rows S(0), held whole -> S(0)
e     experts: a rank runs the rows of its own     ids R, rows whole, held S(0) where it has one an expert -> P
a     rows and experts: rows travel, all-to-all    ids S(0), rows S(0), held as above -> S(0)
h     inside every expert, as the steps allow      rows whole, held S(d) -> P
====  ===========================================  =============================================================

For "h" the steps are split op by op by the ops' own rules, from whole rows to a summand, without any conversion.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from shardplan.planner.mixture import Ref, Step, by_expert, is_product, parse_steps, substituted
from shardplan.planner.placement import D, P, Placement, R, S
from shardplan.planner.rules.letters import read_whole
from shardplan.planner.rules.localize import resizes
from shardplan.planner.rules.strategy import OWN, SENT, Strategy
from shardplan.planner.trace import TensorInfo, info, set_needs_grad, tensor_args

_MOST = 32


def mixture(node: fx.Node) -> list[Strategy]:
    steps, experts, _, _, rows, held = node.args
    whole = read_whole(node)
    count = 1 + len(rows)  # type: ignore[arg-type]
    found = [Strategy("t", (*[S(0)] * count, *whole[count:]), (S(0),))]
    own = by_expert(str(steps))
    if int(experts) > 1:  # type: ignore[call-overload]
        ins = tuple(S(0) if i in own else whole[count + i] for i in range(len(held)))  # type: ignore[arg-type]
        found.append(Strategy("e", (*whole[:count], *ins), (P,), OWN))
        found.append(Strategy("a", (*[S(0)] * count, *ins), (S(0),), SENT))
    facts = tuple(info(a) for a in tensor_args(node))
    for number, placements in enumerate(_inner(str(steps), int(experts), count, facts)):  # type: ignore[call-overload]
        ins = tuple(w if p is None else p for w, p in zip(whole[count:], placements, strict=True))
        found.append(Strategy(f"h{number or ''}", (*whole[:count], *ins), (P,)))
    return found


@lru_cache(maxsize=256)
def _inner(
    text: str, experts: int, count: int, facts: tuple[TensorInfo, ...]
) -> tuple[tuple[Placement | None, ...], ...]:
    """Placements of the held tensors (None: whole) with which every product of the steps is split and their result is
    a summand."""
    graph = fx.Graph()
    given: dict[Ref, fx.Node] = {}

    def placeholder(ref: Ref, shape: tuple[int, ...], dtype: torch.dtype, grad: bool) -> None:
        node = given[ref] = graph.placeholder(f"{ref.kind}{ref.index}")
        node.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
        set_needs_grad(node, grad)

    pairs = facts[0].shape[0]
    placeholder(Ref("i", 0), (pairs,), torch.int64, False)
    placeholder(Ref("o", 0), (experts,), torch.int32, False)
    for i, fact in enumerate(facts[1:count]):
        placeholder(Ref("r", i), (pairs, *fact.shape[1:]), fact.dtype, fact.needs_grad)
    for i, fact in enumerate(facts[count:]):
        placeholder(Ref("h", i), fact.shape, fact.dtype, fact.needs_grad)
    for i, step in enumerate(parse_steps(text)):
        given[Ref("s", i)] = _added(graph, step, given)
    graph.output((given[Ref("s", len(parse_steps(text)) - 1)],))
    held = [given[Ref("h", i)] for i in range(len(facts) - count)]
    found: dict[tuple[Placement | None, ...], None] = {}
    for placements in _Splits(graph, held).found():
        found[tuple(placements.get(node) for node in held)] = None
        if len(found) >= _MOST:
            break
    return tuple(found)


def _added(graph: fx.Graph, step: Step, given: dict[Ref, fx.Node]) -> fx.Node:
    args, kwargs = substituted((step.args, step.kwargs), given.__getitem__)
    node = graph.call_function(step.target, args, kwargs)
    values, named = substituted((step.args, step.kwargs), lambda ref: given[ref].meta["val"])
    with torch.no_grad():
        node.meta["val"] = step.target(*values, **named)
    made = node.meta["val"]
    floating = not isinstance(made, torch.Tensor) or made.dtype.is_floating_point
    set_needs_grad(node, floating and any(bool(a.meta.get("needs_grad")) for a in node.all_input_nodes))
    return node


class _Splits:
    def __init__(self, graph: fx.Graph, held: list[fx.Node]) -> None:
        self.held = set(held)
        self.ops = [n for n in graph.nodes if n.op == "call_function"]
        self.fixed = {
            n: (D if n.meta["needs_grad"] else R,) for n in graph.nodes if n.op == "placeholder" and n not in self.held
        }

    def found(self) -> Iterator[dict[fx.Node, Placement]]:
        yield from self._from(0, dict(self.fixed), {})

    def _from(
        self, at: int, states: dict[fx.Node, tuple[Placement, ...]], chosen: dict[fx.Node, Placement]
    ) -> Iterator[dict[fx.Node, Placement]]:
        from shardplan.planner.rules import strategies
        from shardplan.planner.trace import resolve

        if at == len(self.ops):
            maker, index = resolve(self.ops[-1])
            if states[maker][index] == P:
                yield chosen
            return
        node = self.ops[at]
        if resolve(node)[0] is not node:
            yield from self._from(at + 1, states, chosen)
            return
        product = is_product(node.target)
        for strategy in strategies(node):
            if strategy.impl is not None or (strategy.is_split and resizes(node.target)):
                continue
            if product and (strategy.name == "p" or not strategy.is_split):
                continue
            mine = dict(chosen)
            if all(
                self._agrees(argument, wanted, states, mine)
                for argument, wanted in zip(tensor_args(node), strategy.inputs, strict=True)
            ):
                yield from self._from(at + 1, {**states, node: strategy.outputs}, mine)

    def _agrees(
        self, value: fx.Node, wanted: Placement, states: dict[fx.Node, Any], chosen: dict[fx.Node, Placement]
    ) -> bool:
        from shardplan.planner.trace import resolve

        if value not in self.held:
            maker, index = resolve(value)
            return states[maker][index] == wanted
        if not value.meta["needs_grad"] and wanted == D:
            wanted = R
        whole = D if value.meta["needs_grad"] else R
        if wanted in (R, D, P) and wanted != whole:
            return False
        return chosen.setdefault(value, wanted) == wanted
