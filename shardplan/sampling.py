"""Batches that the ranks load for themselves: `ParallelModel.sampler`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from shardplan.batch import Batch, example_batch
from shardplan.errors import CheckpointError, UsageError
from shardplan.runtime.loading import Drawn, Source

State = dict[str, int]


class Sampler:
    """The rest of an epoch of global batches: ``for batch in sampler: pm.train_step(batch)``.

    A batch is a token; each rank loads the rows of it that it reads (a pipeline stage that reads no input loads none).
    The place moves when a batch is trained on, or the next one is asked for, and is kept in checkpoints.

    epoch: of the next batch; position: samples of that epoch that were used. With drop_last an epoch ends before a
    batch that would be smaller.
    """

    def __init__(self, source: Source, batch_size: int, drop_last: bool, sample: Any) -> None:
        if batch_size < 1 or source.total < (batch_size if drop_last else 1):
            raise UsageError(f"batches of {batch_size} from {source.total} samples")
        self.source = source
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.epoch = 0
        self.position = 0
        self._sample = sample  # a batch of one sample

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(self.source.total, self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[Drawn]:
        epoch = self.epoch
        while self.epoch == epoch:
            drawn = Drawn(self.source.number, epoch, self.position, self._left())
            yield drawn
            self.used(drawn)

    def _left(self) -> int:
        return min(self.batch_size, self.source.total - self.position)

    def used(self, drawn: Drawn) -> None:
        """A batch was trained on. Does nothing the second time."""
        if (drawn.epoch, drawn.start) != (self.epoch, self.position):
            return
        self.position += drawn.count
        left = self._left()
        if left <= 0 or (left < self.batch_size and self.drop_last):
            self.epoch, self.position = self.epoch + 1, 0

    def example(self, model: nn.Module, count: int, has_loss_fn: bool) -> Batch:
        """A batch of so many samples as they are shaped, without data."""
        whole = pytree.tree_map_only(
            torch.Tensor, lambda t: torch.empty((count, *t.shape[1:]), dtype=t.dtype, device="meta"), self._sample
        )
        return example_batch(model, whole, has_loss_fn)

    def state(self) -> State:
        """What a checkpoint keeps."""
        return {"epoch": self.epoch, "position": self.position, "seed": self.source.seed, "total": self.source.total}

    def restore(self, state: State) -> None:
        """Go on where `state` was. Raises CheckpointError where the batches would be others."""
        mine = self.state()
        wrong = [f"{key}: {state[key]}, now {mine[key]}" for key in ("seed", "total") if state[key] != mine[key]]
        if wrong:
            raise CheckpointError("the checkpoint was made with another dataset or seed", wrong)
        self.epoch, self.position = state["epoch"], state["position"]


def source_of(
    number: int,
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    shuffle: bool,
    seed: int,
    model: nn.Module,
    has_loss_fn: bool,
    named: Callable[[Batch], dict[str, Any]],
) -> tuple[Source, Any]:
    """-> (the source, a batch of one sample). named: batch -> input name -> leaf. Raises UsageError for a dataset
    without a length or samples."""
    try:
        total = len(dataset)
        sample = collate([dataset[0]])
    except (TypeError, KeyError, IndexError) as error:
        raise UsageError("sampler() needs a dataset with len() and samples by index", [str(error)]) from error
    leaves, spec = pytree.tree_flatten(sample)
    numbered = pytree.tree_unflatten([_Leaf(index) for index in range(len(leaves))], spec)
    names = named(example_batch(model, numbered, has_loss_fn))
    positions = {name: leaf.index for name, leaf in names.items() if isinstance(leaf, _Leaf)}
    return Source(number, dataset, collate, positions, shuffle, seed, total), sample


class _Leaf:
    """Stands for a leaf of a batch. index: its position."""

    def __init__(self, index: int) -> None:
        self.index = index
