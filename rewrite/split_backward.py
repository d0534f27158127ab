"""A pass on a stage graph: prepare it for backward in two parts (see `rewrite.later`).

Every node gets a kind: of the chain, if it depends on a received value that needs a gradient; of weights, if it depends
on parameters only; or neither. Products of the chain with weights are marked to be split, linear maps written out;
values of weights that the chain reads are held. In a segment that is recomputed, values of weights that are read
outside are moved before it, and the linear maps are found whose values nothing keeps for backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from shardplan.planner.weight_work import is_product
from shardplan.rewrite import collectives, later, storage
from shardplan.rewrite.emit import group_of, set_chain, set_group, set_split
from shardplan.rewrite.program import Argument

aten = torch.ops.aten

CHAIN = "chain"
WEIGHTS = "weights"
_GATHERING = "gathering"

_PASSIVE = frozenset(
    {aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.view.default, aten.reshape.default, aten.t.default}
    | {aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints}
)
"""Ops whose backward needs no values."""


def split_backward(graph: fx.Graph, arguments: Sequence[Argument]) -> list[bool]:
    """Prepare a stage graph, whose placeholders are comm, device and the arguments. -> for every result of the stage,
    whether it depends on parameters only."""
    kinds = _kinds(graph, arguments)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"][2:]
    dims = {node: len(argument.shape) for node, argument in zip(placeholders, arguments, strict=True)}
    _hold(graph, kinds)
    _move_out(graph, kinds)
    for node in graph.nodes:
        if kinds.get(node) != CHAIN:
            continue
        set_chain(node)
        weights = tuple(a for a in node.all_input_nodes if kinds.get(a) == WEIGHTS)
        found = _linear_map(node, kinds, dims)
        if found is not None:
            _write_out(node, *found)
        elif weights and is_product(node):
            set_split(node, weights)
    values = next(node for node in graph.nodes if node.op == "output").args[0]
    assert isinstance(values, (tuple, list))
    return [isinstance(value, fx.Node) and kinds.get(value) == WEIGHTS for value in values]


def _kinds(graph: fx.Graph, arguments: Sequence[Argument]) -> dict[fx.Node, str]:
    """Parameters that are gathered from their stored parts count to the chain: put off, their gradients would be there
    whole, and the parameters too, until the second part."""
    kinds: dict[fx.Node, str] = {}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"][2:]
    for node, argument in zip(placeholders, arguments, strict=True):
        if argument.requires_grad:
            kinds[node] = CHAIN if argument.kind == "recv" else WEIGHTS
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        inputs = {kinds.get(argument) for argument in node.all_input_nodes}
        if node.target is storage.start and not inputs.isdisjoint({WEIGHTS, _GATHERING}):
            kinds[node] = _GATHERING
        elif _GATHERING in inputs or (node.target is storage.resident and WEIGHTS in inputs):
            kinds[node] = CHAIN
        elif CHAIN in inputs or WEIGHTS in inputs:
            kinds[node] = CHAIN if CHAIN in inputs else WEIGHTS
    return kinds


def _hold(graph: fx.Graph, kinds: dict[fx.Node, str]) -> None:
    """Between values that are made of weights and the chain's ops that read them."""
    comm = next(iter(graph.nodes))
    for node in list(graph.nodes):
        readers = [user for user in node.users if kinds.get(user) == CHAIN]
        if node.op != "call_function" or kinds.get(node) != WEIGHTS or not readers:
            continue
        with graph.inserting_after(node):
            held = graph.call_function(later.hold, (comm, node))
        kinds[held] = WEIGHTS
        group = group_of(node)
        if group is not None:
            set_group(held, group)
        for reader in readers:
            reader.replace_input_with(node, held)


def _move_out(graph: fx.Graph, kinds: dict[fx.Node, str]) -> None:
    """A recomputed segment of the chain returns no values of weights: they are made before it."""
    groups: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        group = group_of(node)
        if group is not None and group.recomputed:
            groups.setdefault(group.name, []).append(node)
    for members in groups.values():
        inside = set(members)
        if not any(kinds.get(node) == CHAIN for node in members):
            continue
        pending = [n for n in members if kinds.get(n) == WEIGHTS and any(user not in inside for user in n.users)]
        moved: set[fx.Node] = set()
        while pending:
            node = pending.pop()
            if node not in moved:
                moved.add(node)
                pending += [a for a in node.all_input_nodes if a in inside]
        first = next((node for node in members if node not in moved), None)
        for node in members:
            if node in moved and first is not None:
                first.prepend(node)
                set_group(node, None)


def _linear_map(
    node: fx.Node, kinds: dict[fx.Node, str], dims: dict[fx.Node, int]
) -> tuple[fx.Node, fx.Node, Any, bool] | None:
    """(chain value, weight, bias, whether the weight is [in, out]) of a linear map of the chain by weights. dims: of
    placeholders."""
    if node.kwargs:
        return None
    if node.target is aten.linear.default:
        x, weight, bias = (*node.args, None)[:3]
        transposed = False
    elif node.target is aten.addmm.default:
        bias, x, weight = node.args
        transposed = dims.get(cast(Any, bias)) == 1
    elif node.target in (aten.mm.default, aten.matmul.default):
        (x, weight), bias = node.args, None
        transposed = dims.get(cast(Any, weight)) == 2
    else:
        return None
    if not transposed and node.target is not aten.linear.default:
        return None
    kind = [kinds.get(cast(Any, value)) for value in (x, weight, bias)]
    if kind[:2] != [CHAIN, WEIGHTS] or kind[2] == CHAIN:
        return None
    return cast(fx.Node, x), cast(fx.Node, weight), bias, transposed


def _write_out(node: fx.Node, x: fx.Node, weight: fx.Node, bias: Any, transposed: bool) -> None:
    comm = next(iter(node.graph.nodes))
    node.target = later.linear
    node.args = (comm, x, weight, bias)
    options: dict[str, Any] = {"transposed": True} if transposed else {}
    sums = _unkept(node)
    if sums is None:
        node.kwargs = options
        return
    node.kwargs = {**options, "kept": False}
    for reader in sums:
        reader.args = (cast(Any, reader.target), *reader.args)
        reader.target = later.summed


def _unkept(node: fx.Node) -> list[fx.Node] | None:
    """Where a segment is recomputed and none of its ops keeps the value for backward: the sums over ranks that it goes
    through. Else None."""
    group = group_of(node)
    if group is None or not group.recomputed:
        return None
    sums: list[fx.Node] = []
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if user in seen or group_of(user) != group:
                continue
            seen.add(user)
            if user.target is collectives.all_reduce:
                sums.append(user)
            elif user.target is not later.summed and user.target not in _PASSIVE:
                return None
            pending.append(user)
    return sums
