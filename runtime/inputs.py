"""A rank's parts of the global batch, microbatch by microbatch. The batch is whole, or has only the rows that this rank
reads (`Rows`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from shardplan.errors import InputMismatch
from shardplan.planner.placement import MICROBATCH_AXIS, local_slices
from shardplan.rewrite.program import Program, StageRanks

_Cut = list[tuple[int, list[tuple[int, int]]]]
"""(dim, (start, stop) runs that are kept) for every dim that is cut."""


Runs = list[tuple[int, int]]
"""(start, stop) of rows, in order, apart from each other."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a global input, for the rank that reads only those. tensor: the rows of `runs`, one after another;
    count: rows of the whole."""

    tensor: torch.Tensor
    runs: tuple[tuple[int, int], ...]
    count: int

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        return torch.Size((self.count, *self.tensor.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def take(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the whole. Raises InputMismatch where they are not here."""
        place = 0
        for first, last in self.runs:
            if first <= start and stop <= last:
                return self.tensor.narrow(0, place + start - first, stop - start)
            place += last - first
        raise InputMismatch(
            f"rows {start} to {stop} are needed on this rank, which was given {list(self.runs)}",
            hints=["ParallelModel.rows() gives the rows that a rank needs"],
        )


def union(runs: Iterable[tuple[int, int]]) -> Runs:
    """The rows that are in any of the runs."""
    found: Runs = []
    for start, stop in sorted(runs):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return found


class Inputs:
    """Cuts inputs by their layouts. names: the inputs that this rank reads. rows: which rows of each."""

    def __init__(
        self, program: Program, placement: StageRanks, coordinate: dict[str, int], device: torch.device, names: set[str]
    ) -> None:
        self._device = device
        self._specs = [spec for spec in program.inputs if spec.name in names]
        self._cuts: dict[str, list[_Cut]] = {}
        self.rows: dict[str, Runs] = {}
        for spec in self._specs:
            cuts = []
            for microbatch in range(program.microbatches):
                place = {**coordinate, MICROBATCH_AXIS: microbatch}
                slices = local_slices(spec.shape, spec.layout, placement.mesh, place)
                cuts.append([(d, runs) for d, runs in enumerate(slices) if runs != [(0, spec.shape[d])]])
            if spec.shape:
                rows = [run for cut in cuts for run in dict(cut).get(0, [(0, spec.shape[0])])]
                self.rows[spec.name] = union(rows)
            self._cuts[spec.name] = cuts if any(cut != cuts[0] for cut in cuts) else cuts[:1]
        self._batch: Mapping[str, torch.Tensor | Rows] = {}
        self._kept: dict[str, torch.Tensor] = {}

    def start(self, batch: Mapping[str, torch.Tensor | Rows]) -> None:
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
        given = self._batch[name]
        if isinstance(given, Rows):
            runs = dict(cut).get(0, [(0, given.count)])
            held = [given.take(start, stop) for start, stop in runs]
            value = held[0] if len(held) == 1 else torch.cat(held)
            cut = [(dim, runs) for dim, runs in cut if dim]
        else:
            value = given
        for dim, runs in cut:
            parts = [value.narrow(dim, start, stop - start) for start, stop in runs]
            value = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
        return value.contiguous().to(self._device, non_blocking=True)
