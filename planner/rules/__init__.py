"""Dimension rules: the ways in which an op may be split over one mesh axis."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from shardplan.planner.placement import D, P, R, S
from shardplan.planner.rules import discovery, families, sections, views
from shardplan.planner.rules.letters import whole_strategies
from shardplan.planner.rules.localize import LocalCall, Slot, local_call
from shardplan.planner.rules.strategy import Strategy, groups_fit
from shardplan.planner.trace import info, infos, is_tensor, leaf_of, resolve, tensor_args

__all__ = [
    "LocalCall", "Slot", "Strategy", "forget_strategies", "groups_fit", "has_rule", "is_discovered", "local_call",
    "strategies", "why_whole",
]  # fmt: skip


def strategies(node: fx.Node, inner: bool = False) -> tuple[Strategy, ...]:
    """Every way to run `node` on one axis, from its global shapes; divisibility is the caller's check.

    The first is always the replicated one. Placeholders have strategies with no inputs and one output. inner: with
    splits of dims that a view merges behind others, which only the batch needs (see `views.inner_splits`).
    """
    key = f"strategies inner={inner}"
    found = node.meta.get(key)
    if found is None:
        wanted = f"sections inner={inner}"
        if wanted not in node.meta:
            sections.annotate(node.graph, lambda n: _plain(n, inner), wanted)
        plain = _plain(node, inner)
        found = node.meta[key] = _unique([*plain, *sections.variants(node, plain, node.meta[wanted])])
    return found


def forget_strategies(graph: fx.Graph) -> None:
    """Find the strategies of all nodes anew: those of a leaf have changed, and with them what readers want."""
    for node in graph.nodes:
        for key in [k for k in node.meta if k.startswith(("strategies ", "plain ", "sections "))]:
            del node.meta[key]


def has_rule(node: fx.Node) -> bool:
    """Whether the op has a rule, written or discovered; one without is computed whole on every rank of an axis."""
    if node.op != "call_function" or resolve(node)[0] is not node or families.rule_of(node) is not None:
        return True
    return is_discovered(node)


def is_discovered(node: fx.Node) -> bool:
    """Whether the op has no written rule, but running it has shown how it may be split."""
    if node.op != "call_function" or resolve(node)[0] is not node or families.rule_of(node) is not None:
        return False
    return bool(discovery.discovered(node))


def why_whole(node: fx.Node) -> str:
    """Why an op without a rule could not be tried; empty where it was, and cannot be split."""
    return discovery.answer(node).reason


def _plain(node: fx.Node, inner: bool) -> tuple[Strategy, ...]:
    """Strategies without section variants of what readers want."""
    key = f"plain inner={inner}"
    found = node.meta.get(key)
    if found is None:
        made = _placeholder(node) if node.op == "placeholder" else _op(node)
        if inner and node.target in views.RESHAPES:
            made += views.inner_splits(node)
        note = leaf_of(node) if inner else None
        if note is not None:
            made += [*note.splits]
        found = node.meta[key] = _unique(made)
    return found


def _op(node: fx.Node) -> list[Strategy]:
    if node.op != "call_function" or resolve(node)[0] is not node or not infos(node):
        return []
    found = whole_strategies(node)
    rule = families.rule_of(node)
    if not families.unsplittable(node):
        found += rule(node) if rule is not None else discovery.discovered(node)
    return [strategy for strategy in found if _sensible(node, strategy)]


def _sensible(node: fx.Node, strategy: Strategy) -> bool:
    """Nothing splits a dim of one entry, and truth values do not add up."""
    values = [(info(a) if is_tensor(a) else None, p) for a, p in zip(tensor_args(node), strategy.inputs, strict=True)]
    values += list(zip(infos(node), strategy.outputs, strict=True))
    for value, placement in values:
        if value is None:
            continue
        if placement == P and value.dtype == torch.bool:
            return False
        if placement.is_shard and (placement.dim >= len(value.shape) or value.shape[placement.dim] < 2):
            return False
    return True


def _placeholder(node: fx.Node) -> list[Strategy]:
    value = info(node)
    found = [Strategy("-", (), (R,))]
    if value.needs_grad:
        found.append(Strategy("d", (), (D,)))
    return found + [Strategy(f"s{dim}", (), (S(dim),)) for dim, extent in enumerate(value.shape) if extent > 1]


def _unique(found: Iterable[Strategy]) -> tuple[Strategy, ...]:
    kept: dict[tuple[object, ...], Strategy] = {}
    for strategy in found:
        kept.setdefault((strategy.inputs, strategy.outputs, strategy.impl), strategy)
    return tuple(kept.values())
