"""A point of the outer search: how many stages, replicas, ranks of tensor parallelism and microbatches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardplan.planner.placement import Mesh

USUAL = ("tp", "dp", "pp")


@dataclass(frozen=True, slots=True)
class Case:
    """One point of the outer search: stages x (dp x tp) devices each, and microbatches. order: which axis runs through
    neighbouring devices, which through groups of these, and which through what is left."""

    stages: int
    dp: int
    tp: int
    microbatches: int
    order: tuple[str, str, str] = USUAL

    @property
    def width(self) -> int:
        return self.dp * self.tp

    @property
    def devices(self) -> int:
        return self.stages * self.width

    @property
    def mesh(self) -> Mesh:
        """Layouts refer to this mesh; the batch is split in time first, then over replicas."""
        return Mesh(("mb", "dp", "tp"), (self.microbatches, self.dp, self.tp))

    def stride(self, axis: str) -> int:
        """Devices from one rank of a group of the axis ("tp", "dp", "pp") to the next."""
        sizes = {"tp": self.tp, "dp": self.dp, "pp": self.stages}
        return math.prod(sizes[inner] for inner in self.order[: self.order.index(axis)])

    def ranks(self, stage: int) -> tuple[int, ...]:
        """Devices of a stage in row-major order of its mesh (dp, tp)."""
        first, rows, columns = (stage * self.stride("pp"), self.stride("dp"), self.stride("tp"))
        return tuple(first + d * rows + t * columns for d in range(self.dp) for t in range(self.tp))

    def __str__(self) -> str:
        placed = f" ({' in '.join(self.order)})" if self.order != USUAL else ""
        return f"pp{self.stages} dp{self.dp} tp{self.tp} m{self.microbatches}{placed}"
