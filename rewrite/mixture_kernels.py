"""A mixture of experts (`planner.mixture`) whose experts lie on the ranks of an axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.autograd import Function

from shardplan.planner.mixture import inverse, run, run_own
from shardplan.rewrite.comm import Comm


def own_experts(
    comm: Comm,
    axis: str,
    steps: str,
    experts: int,
    fans: Sequence[int],
    ids: torch.Tensor,
    rows: Sequence[torch.Tensor],
    held: Sequence[torch.Tensor],
) -> torch.Tensor:
    """What this rank's experts give, zeros for pairs of others; summed over `axis` it is the whole.

    experts: of a rank. ids: int [n], global; rows: [n / fan, ...], all of them; held: those with one matrix an expert
    are this rank's part. -> [n, ...].
    """
    return run_own(steps, comm.index(axis) * experts, experts, fans, ids, rows, held)


def sent_experts(
    comm: Comm,
    axis: str,
    steps: str,
    experts: int,
    fans: Sequence[int],
    ids: torch.Tensor,
    rows: Sequence[torch.Tensor],
    held: Sequence[torch.Tensor],
) -> torch.Tensor:
    """The same of this rank's pairs, by the experts of all ranks: pairs travel to the ranks of their experts, and the
    results back.

    ids: int [n], rows: [n / fan, ...] of this rank; experts, held: as in `own_experts`. -> [n, ...].
    """
    ordered, order = torch.sort(ids, stable=True)
    size = comm.size(axis)
    last = torch.arange(1, size + 1, device=ids.device) * experts - 1
    counts = torch.searchsorted(ordered, last, right=True)
    counts = torch.diff(counts, prepend=counts.new_zeros(1))
    arriving = comm.all_to_all(counts, 0, 0, axis).tolist()
    sent = counts.tolist()
    mine = comm.exchange(ordered, sent, arriving, axis) - comm.index(axis) * experts
    taken = [
        _exchanged(tensor[order // fan if fan > 1 else order], comm, sent, arriving, axis)
        for tensor, fan in zip(rows, fans, strict=True)
    ]
    found = run(steps, experts, [1] * len(taken), mine, taken, held)
    returned = _exchanged(found, comm, arriving, sent, axis)
    return returned[inverse(order)]


def _exchanged(x: torch.Tensor, comm: Comm, sent: list[int], arriving: list[int], axis: str) -> torch.Tensor:
    """`Comm.exchange`, whose gradient travels back."""
    return cast(torch.Tensor, _Exchange.apply(x, comm, sent, arriving, axis))


class _Exchange(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: Comm, sent: list[int], arriving: list[int], axis: str) -> torch.Tensor:
        ctx.comm, ctx.place = comm, (arriving, sent, axis)
        return comm.exchange(x, sent, arriving, axis)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return ctx.comm.exchange(grad, *ctx.place), None, None, None, None
