"""A rank's parts of the global batch, microbatch by microbatch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shardplan.errors import InputMismatch
from shardplan.planner.placement import MICROBATCH_AXIS, local_slices
from shardplan.rewrite.program import Program, StageRanks

_Cut = list[tuple[int, list[tuple[int, int]]]]
"""(dim, (start, stop) runs that are kept) for every dim that is cut."""


class Inputs:
    """Cuts inputs by their layouts. names: the inputs that this rank reads."""

    def __init__(
        self, program: Program, placement: StageRanks, coordinate: dict[str, int], device: torch.device, names: set[str]
    ) -> None:
        self._device = device
        self._specs = [spec for spec in program.inputs if spec.name in names]
        self._cuts: dict[str, list[_Cut]] = {}
        for spec in self._specs:
            cuts = []
            for microbatch in range(program.microbatches):
                place = {**coordinate, MICROBATCH_AXIS: microbatch}
                slices = local_slices(spec.shape, spec.layout, placement.mesh, place)
                cuts.append([(d, runs) for d, runs in enumerate(slices) if runs != [(0, spec.shape[d])]])
            self._cuts[spec.name] = cuts if any(cut != cuts[0] for cut in cuts) else cuts[:1]
        self._batch: Mapping[str, torch.Tensor] = {}
        self._kept: dict[str, torch.Tensor] = {}

    def start(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Take up a global batch. Raises InputMismatch where it is not as planned."""
        for spec in self._specs:
            given = batch.get(spec.name)
            if given is None:
                raise InputMismatch(f"input {spec.name} is missing", [f"given: {', '.join(batch) or 'nothing'}"])
            if given.shape != spec.shape or given.dtype != spec.dtype:
                raise InputMismatch(
                    f"input {spec.name} is {given.dtype}{list(given.shape)}, "
                    f"planned was {spec.dtype}{list(spec.shape)} (the global batch)"
                )
        self._batch = batch
        self._kept = {}

    def finish(self) -> None:
        """Let go of the batch."""
        self._batch = {}
        self._kept = {}

    def part(self, name: str, microbatch: int) -> torch.Tensor:
        """This rank's part in a microbatch, on its device."""
        cuts = self._cuts[name]
        if len(cuts) > 1:
            return self._cut(name, cuts[microbatch])
        if name not in self._kept:  # all microbatches read the same
            self._kept[name] = self._cut(name, cuts[0])
        return self._kept[name]

    def _cut(self, name: str, cut: _Cut) -> torch.Tensor:
        value = self._batch[name]
        for dim, runs in cut:
            parts = [value.narrow(dim, start, stop - start) for start, stop in runs]
            value = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
        return value.contiguous().to(self._device, non_blocking=True)
