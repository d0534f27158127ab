"""Rewrite: a Trace and a Plan become a Program. Never imports the runtime or torch.distributed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardplan.planner.plan import Plan
    from shardplan.planner.trace import Trace
    from shardplan.rewrite.program import Program


def compile(trace: Trace, plan: Plan, kind: str = "train", available: frozenset[str] | None = None) -> Program:
    """The program of a plan; see `shardplan.rewrite.compiler.compile_program`."""
    from shardplan.rewrite.compiler import compile_program

    return compile_program(trace, plan, kind, available)
