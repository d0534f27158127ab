"""What it costs to turn a value's layout on one mesh axis into another: the collective, and the copies around it.

Collectives move ranges along the first dim. Along any other, and where sections are interleaved, what is sent is
stacked before, and what has arrived is put in order afterwards (`runtime.comm`): a copy of what moves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from shardplan.planner.placement import COLLECTIVES, Placement, R, conversion
from shardplan.planner.propagate import placed
from shardplan.planner.search.problem import Price
from shardplan.planner.trace import info, is_tensor, needs_grad, resolve, tensor_args

if TYPE_CHECKING:
    from shardplan.planner.search.columns import Columns


def conversion_price(columns: Columns, value: fx.Node, source: Placement, target: Placement) -> Price:
    """A conversion on the tensor-parallel axis."""
    step = conversion(source, target, needs_grad(value))
    whole = columns.local_nbytes(value, R)
    forward = _seconds(columns, step.forward, source, target, whole, "tp")
    differentiable = needs_grad(value) and columns.training
    backward = _seconds(columns, step.backward, source, target, whole, "tp") if differentiable else 0.0
    copied = step.forward != "identity"
    held = whole / columns.tp if target.is_shard else whole
    keep = columns.training and copied and columns.keeps.is_read_again(value)
    return Price(forward, backward, 0.0, 0.0, held if keep else 0.0, held if copied else 0.0)


def batch_conversions(columns: Columns, node: fx.Node) -> Price:
    """Conversions on "dp" that the followed strategy of an op needs on what it reads."""
    forward = backward = 0.0
    strategy = columns.others(node).get("dp")
    if strategy is None:
        return Price()
    for argument, wanted in zip(tensor_args(node), strategy.inputs, strict=True):
        if not is_tensor(argument):
            continue
        maker, position = resolve(argument)
        source = placed(columns.others(maker).get("dp"), position)
        step = conversion(source, wanted, needs_grad(argument))
        nbytes = float(info(argument).nbytes) / columns.microbatches
        forward += _seconds(columns, step.forward, source, wanted, nbytes, "dp")
        if columns.training:
            backward += _seconds(columns, step.backward, source, wanted, nbytes, "dp")
    return Price(forward, backward)


def _seconds(
    columns: Columns, part: str, source: Placement, target: Placement, whole_nbytes: float, axis: str
) -> float:
    """Of one half of a conversion. whole_nbytes: of the value, split by the other axes."""
    ranks = columns.tp_ranks if axis == "tp" else columns.dp_ranks
    if part == "identity":
        return 0.0
    if part not in COLLECTIVES:
        return columns.costs.copy(round(whole_nbytes), 0)
    nbytes = whole_nbytes / len(ranks) if part == "all_to_all" else whole_nbytes
    seconds = columns.collective_seconds(part, round(nbytes), ranks)
    stacked = (
        0 if part == "all_reduce" else sum(p.is_shard and (p.dim > 0 or bool(p.sections)) for p in (source, target))
    )
    return seconds + (columns.costs.copy(round(stacked * nbytes), 0) if stacked else 0.0)
