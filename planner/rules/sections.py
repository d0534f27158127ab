"""Blocked shards: which dims consist of sections (a fused query-key-value projection) that a later op takes apart.

`annotate` carries the sections that a chunk or split wants on its input back through the ops that keep the dim whole,
up to the parameters; `variants` offers the split of such a dim section by section.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import fx

from shardplan.planner.placement import Placement, S
from shardplan.planner.rules.strategy import Strategy
from shardplan.planner.trace import info, infos, is_tensor, tensor_args

Wanted = tuple[tuple[int, tuple[int, ...]], ...]


def annotate(graph: fx.Graph, plain: Callable[[fx.Node], Iterable[Strategy]], key: str) -> None:
    """Set ``node.meta[key]`` of every node to the (dim, sections) that readers of its (only) result want.

    plain: strategies of a node without section variants.
    """
    pending: dict[fx.Node, dict[tuple[int, tuple[int, ...]], None]] = {}
    for node in reversed(graph.nodes):
        mine = node.meta[key] = tuple(pending.pop(node, ()))
        if node.op != "call_function":
            continue
        arguments = tensor_args(node)
        for strategy in plain(node):
            for argument, placement in zip(arguments, strategy.inputs, strict=True):
                if not placement.is_shard or not is_tensor(argument):
                    continue
                if placement.sections:
                    pending.setdefault(argument, {})[placement.dim, placement.sections] = None
                elif mine and len(strategy.outputs) == 1 and strategy.outputs[0].is_shard:
                    for dim, sizes in mine:
                        if dim == strategy.outputs[0].dim and info(argument).shape[placement.dim] == sum(sizes):
                            pending.setdefault(argument, {})[placement.dim, sizes] = None


def variants(node: fx.Node, plain: Iterable[Strategy], wanted: Wanted) -> list[Strategy]:
    """Strategies whose split of the result follows the sections that its readers want."""
    found: list[Strategy] = []
    results = infos(node)
    if len(results) != 1 or not wanted:
        return found
    shapes = [info(a).shape if is_tensor(a) else () for a in tensor_args(node)] if node.op == "call_function" else []
    for strategy in plain:
        if not strategy.is_split or not strategy.outputs[0].is_shard or strategy.outputs[0].sections:
            continue
        for dim, sizes in wanted:
            if dim != strategy.outputs[0].dim or results[0].shape[dim] != sum(sizes):
                continue
            groups = _groups_of_each(strategy.groups, sizes)
            if groups is None:
                continue
            ins: list[Placement] = []
            for shape, placement in zip(shapes, strategy.inputs, strict=True):
                if placement.is_shard and shape[placement.dim] != sum(sizes):
                    break
                ins.append(S(placement.dim, sizes) if placement.is_shard else placement)
            else:
                outs = (S(dim, sizes),)
                name, impl, scale = f"{strategy.name}|", strategy.impl, strategy.scale
                found.append(Strategy(name, tuple(ins), outs, impl, scale, groups))
    return found


def _groups_of_each(groups: int, sizes: tuple[int, ...]) -> int | None:
    """How many ranks at most split every section without cutting a group; 0 where there are no groups, None where the
    sections cut some."""
    if any(groups * size % sum(sizes) for size in sizes):
        return None
    return math.gcd(*(groups * size // sum(sizes) for size in sizes))
