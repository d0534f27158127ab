"""A mixture of experts (`planner.mixture`) whose experts lie on the ranks of an axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardplan.planner.mixture import run_own
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
