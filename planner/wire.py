"""What sums of gradients over replicas are sent as: exactly, rounded, or as products of small factors.

=============  =========================================================================================
text           what is sent
=============  =========================================================================================
exact          gradients in their own dtype
bf16, fp16     gradients rounded to that dtype: half the bytes of float32
low_rank:R     of a matrix [n, m] two factors [n, R] and [m, R] (PowerSGD, Vogels et al. 2019), where these are smaller
               than the matrix; everything else exactly
=============  =========================================================================================

All but the first compute something else than one device does, and plans that have them say so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shardplan.errors import UsageError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LOW_RANK = "low_rank"
_USUAL_RANK = 4


@dataclass(frozen=True, slots=True)
class Wire:
    """dtype: that gradients are rounded to, None for their own. rank: of the factors, 0 for none."""

    dtype: torch.dtype | None = None
    rank: int = 0

    @staticmethod
    def parse(text: str) -> Wire:
        """Raises UsageError."""
        name, _, rank = text.partition(":") if isinstance(text, str) else ("", "", "")
        if text == "exact" or (name in _DTYPES and not rank):
            return Wire(_DTYPES.get(name))
        if name == _LOW_RANK and (text == _LOW_RANK or (rank.isdecimal() and int(rank) > 0)):
            return Wire(rank=int(rank or _USUAL_RANK))
        hint = f'"exact", {", ".join(map(repr, _DTYPES))}, "{_LOW_RANK}" or "{_LOW_RANK}:8" for factors of rank 8'
        raise UsageError(f"reduction={text!r}", hints=[hint])

    @property
    def exact(self) -> bool:
        return self.dtype is None and self.rank == 0

    def factored(self, shape: Sequence[int]) -> int:
        """Rank of the factors that a gradient of this shape is sent as; 0: it is sent as it is."""
        if not self.rank or len(shape) < 2:
            return 0
        rows, columns = shape[0], math.prod(shape[1:])
        return self.rank if self.rank * (rows + columns) < rows * columns else 0

    def share(self, shape: Sequence[int], itemsize: int) -> float:
        """Bytes sent over bytes of the gradient."""
        if self.dtype is not None:
            return min(self.dtype.itemsize / itemsize, 1.0)
        rank = self.factored(shape)
        rows, columns = (shape[0], math.prod(shape[1:])) if rank else (1, 1)
        return rank * (rows + columns) / (rows * columns) if rank else 1.0


EXACT = Wire()


def said(reduction: str, average_every: int) -> list[str]:
    """Notes of a plan that does not compute what one device does."""
    wire = Wire.parse(reduction)
    found = []
    if wire.dtype is not None:
        dtype = str(wire.dtype).removeprefix("torch.")
        found.append(f"INEXACT: sums of gradients over replicas are sent in {dtype}, as asked for")
    if wire.rank:
        found.append(
            f"INEXACT: sums of matrix gradients over replicas are sent as factors of rank {wire.rank}, what they leave"
            " out is added to the next step's, as asked for"
        )
    if average_every:
        found.append(
            f"INEXACT: replicas step by themselves and average their parameters every"
            f" {'step' if average_every == 1 else f'{average_every} steps'}, as asked for"
        )
    return [f"{note}; one device computes something else" for note in found]
