"""The communicator a stage's code is given: primitive collectives by mesh axis, without autograd.

`rewrite.collectives` and `rewrite.kernels` build the differentiable operations on it. The runtime implements it on
torch.distributed, tests on threads (`rewrite.threads`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from shardplan.rewrite.later import Later


class Comm(Protocol):
    """All methods return new tensors and never change their input. `axis` is a mesh axis of the stage; on an axis of
    size 1 every method is the identity.

    unsettled: what is left to do with gradients that are under way, see `rewrite.storage`. later: the gradients that
    wait, of the microbatch that runs, see `rewrite.later`.
    """

    unsettled: list[Callable[[], None]]
    later: Later

    def size(self, axis: str) -> int:
        """Number of ranks on the axis."""
        ...

    def index(self, axis: str) -> int:
        """This rank's index on the axis."""
        ...

    def all_reduce(self, x: torch.Tensor, axis: str, op: str = "sum") -> torch.Tensor:
        """op: "sum" or "max"."""
        ...

    def all_gather(self, x: torch.Tensor, dim: int, axis: str) -> torch.Tensor:
        """Concatenation of the ranks' tensors along `dim` in index order."""
        ...

    def reduce_scatter(self, x: torch.Tensor, dim: int, axis: str) -> torch.Tensor:
        """Sum over the ranks, then this rank's even part along `dim`."""
        ...

    def start_all_gather(self, x: torch.Tensor, axis: str) -> Callable[[], torch.Tensor]:
        """Begin to concatenate the ranks' vectors, in index order. -> what waits for the result. x must not change
        before that."""
        ...

    def start_reduce_scatter(self, x: torch.Tensor, axis: str) -> Callable[[], torch.Tensor]:
        """Begin to sum up row i for rank i. x: [ranks, n]. -> what waits for this rank's sum [n]."""
        ...

    def all_to_all(self, x: torch.Tensor, split_dim: int, concat_dim: int, axis: str) -> torch.Tensor:
        """Split evenly along `split_dim`, send part i to rank i, concatenate what arrives along `concat_dim`."""
        ...

    def exchange(self, x: torch.Tensor, sent: list[int], arriving: list[int], axis: str) -> torch.Tensor:
        """Send the first sent[0] rows to rank 0, the next sent[1] to rank 1, ...; what arrives, in the order of the
        ranks: arriving[i] rows from rank i."""
        ...

    def key(self, site: int) -> int:
        """63 bits that random op number `site` draws from in this step: the same on all ranks and for all microbatches,
        and when a segment is recomputed. Where a number stands makes it differ, see `rewrite.draws`."""
        ...
