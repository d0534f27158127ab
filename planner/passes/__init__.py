"""Normalising passes. Each is a module with `name` and ``apply(draft)``; the verifier runs after every one."""

from __future__ import annotations

from shardplan.planner.passes import (
    autocast_casts,
    broadcasts,
    common,
    dead_code,
    detach_edges,
    drop_checks,
    fold_masks,
    functionalize,
    gradients,
    inline_regions,
    known_forms,
    mixtures,
    no_ops,
    reshape_views,
    scalar_terms,
)
from shardplan.planner.passes.draft import Draft
from shardplan.planner.passes.verify import BrokenGraph, verify

__all__ = ["BrokenGraph", "Draft", "PIPELINE", "normalize", "verify"]

PIPELINE = (
    drop_checks,
    inline_regions,
    drop_checks,
    broadcasts,
    autocast_casts,
    gradients,
    functionalize,
    gradients,
    detach_edges,
    gradients,
    known_forms,
    no_ops,
    reshape_views,
    scalar_terms,
    fold_masks,
    dead_code,
    common,
    no_ops,
    mixtures,
    dead_code,
    gradients,
)


def normalize(draft: Draft, deep: bool = False) -> None:
    """Run the pipeline. deep: the verifier also recomputes every shape (slow; for tests)."""
    verify(draft)
    for step in PIPELINE:
        step.apply(draft)
        try:
            verify(draft, deep)
        except (BrokenGraph, RuntimeError) as error:
            raise BrokenGraph(f"after pass {step.name}: {error}") from error
