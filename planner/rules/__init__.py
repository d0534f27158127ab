"""Dimension rules: the ways in which an op may be split over one mesh axis."""

from __future__ import annotations

from torch import fx

from shardplan.planner.rules.localize import LocalCall, Slot, local_call
from shardplan.planner.rules.strategy import Strategy

__all__ = ["LocalCall", "Slot", "Strategy", "local_call", "strategies"]


def strategies(node: fx.Node) -> tuple[Strategy, ...]:
    """Every way to run `node` on one axis, from its global shapes; divisibility is the caller's check.

    The first is always the replicated one. Placeholders have strategies with no inputs and one output.
    """
    raise NotImplementedError
