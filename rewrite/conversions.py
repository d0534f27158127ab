"""Which function of `rewrite.collectives` a conversion step is, and with which arguments."""

from __future__ import annotations

from typing import Any

from shardplan.planner.reshard import Step
from shardplan.rewrite import collectives

_WHOLE = {
    ("R", "D"): collectives.identity_all_reduce,
    ("R", "P"): collectives.mask_identity,
    ("D", "R"): collectives.identity_mask,
    ("D", "P"): collectives.mask,
    ("P", "R"): collectives.all_reduce,
    ("P", "D"): collectives.all_reduce_all_reduce,
}
_INTO_SHARD = {
    "R": collectives.slice_all_gather,
    "D": collectives.slice_zero_pad,
    "P": collectives.reduce_scatter_all_gather,
}
_OUT_OF_SHARD = {
    "R": collectives.all_gather_slice,
    "D": collectives.all_gather_reduce_scatter,
    "P": collectives.zero_pad_slice,
}


def conversion_call(comm: Any, x: Any, step: Step, differentiable: bool) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(function, args, kwargs) that converts `x`. comm and x: values or graph nodes, passed through."""
    source, target, axis = step.source, step.target, step.axis
    if source.is_shard and target.is_shard:
        sections = {"split_sections": target.sections, "concat_sections": source.sections}
        used = sections if target.sections or source.sections else {}
        return collectives.all_to_all, (comm, x, target.dim, source.dim, axis), used
    if target.is_shard:
        # Without a gradient a slice of a replicated value has nothing to gather in backward.
        kind = "D" if source.kind == "R" and not differentiable else source.kind
        sections = {"sections": target.sections} if target.sections else {}
        return _INTO_SHARD[kind], (comm, x, target.dim, axis), sections
    if source.is_shard:
        sections = {"sections": source.sections} if source.sections else {}
        return _OUT_OF_SHARD[target.kind], (comm, x, source.dim, axis), sections
    return _WHOLE[source.kind, target.kind], (comm, x, axis), {}
