"""A rank's own part of a dataset: the rows of each global batch that it reads, and no others.

Which samples a batch holds follows from its place alone (epoch, position), so that every rank knows, none is told, and
a run that is resumed sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from shardplan.errors import InputMismatch
from shardplan.runtime.inputs import Rows, Runs, union


@dataclass(frozen=True, slots=True)
class Drawn:
    """A global batch that every rank loads for itself: the samples from `start` on in the order of an epoch."""

    source: int
    epoch: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Source:
    """What batches are drawn from. dataset: samples by index; collate: list of samples -> batch.

    names: input name -> position among the leaves of a batch. shuffle: a new order every epoch, which follows from the
    seed and the epoch. total: samples of an epoch.
    """

    number: int
    dataset: Any
    collate: Callable[[list[Any]], Any]
    names: Mapping[str, int]
    shuffle: bool
    seed: int
    total: int


def order(source: Source, epoch: int) -> torch.Tensor:
    """Indices of the samples, in the order of an epoch."""
    if not source.shuffle:
        return torch.arange(source.total)
    generator = torch.Generator().manual_seed((source.seed * 1_000_003 + epoch) & (2**63 - 1))
    return torch.randperm(source.total, generator=generator)


class Loader:
    """Loads one rank's rows; the batch after the one that was asked for is loaded in the background."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._order: tuple[int, torch.Tensor] = (-1, torch.empty(0))
        self._thread = ThreadPoolExecutor(1, "loader")
        self._next: tuple[Drawn, dict[str, Runs], Future[dict[str, Rows]]] | None = None

    def batch(self, drawn: Drawn, rows: Mapping[str, Runs]) -> dict[str, Rows]:
        """rows: of the inputs that this rank reads. -> these inputs. What the dataset raises comes through."""
        wanted = {name: runs for name, runs in rows.items() if name in self._source.names}
        held = self._next
        self._next = None
        if held is not None and held[:2] == (drawn, wanted):
            found = held[2].result()
        else:
            found = self._thread.submit(self._load, drawn, wanted).result()
        following = replace(drawn, start=drawn.start + drawn.count)
        if following.start + following.count <= self._source.total:
            self._next = following, wanted, self._thread.submit(self._load, following, wanted)
        return found

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _load(self, drawn: Drawn, rows: Mapping[str, Runs]) -> dict[str, Rows]:
        if not rows:
            return {}
        if self._order[0] != drawn.epoch:
            self._order = drawn.epoch, order(self._source, drawn.epoch)
        every = union(run for runs in rows.values() for run in runs)
        places = [place for start, stop in every for place in range(start, stop)]
        indices = self._order[1][drawn.start : drawn.start + drawn.count][torch.tensor(places)].tolist()
        leaves = pytree.tree_leaves(self._source.collate(self._samples(indices)))
        found = {}
        for name in rows:
            value = leaves[self._source.names[name]]
            if not isinstance(value, torch.Tensor) or value.shape[:1] != (len(places),):
                raise InputMismatch(f"input {name} of the dataset is not a tensor with a row for every sample")
            found[name] = Rows(value, tuple(every), drawn.count)
        return found

    def _samples(self, indices: Sequence[int]) -> list[Any]:
        many: Any = getattr(self._source.dataset, "__getitems__", None)
        if many is not None:
            return list(many(indices))
        return [self._source.dataset[index] for index in indices]
