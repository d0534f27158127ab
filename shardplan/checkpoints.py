"""Checkpoints of a running model: saving now or in the background, loading, and where the last whole one is."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from shardplan.errors import CheckpointError, UsageError
from shardplan.ranks import Ranks
from shardplan.runtime import rank_calls

Facts = dict[str, Any]


class Saving:
    """A checkpoint that is being written. path: where it will be."""

    def __init__(self, path: str, finish: Callable[[], None]) -> None:
        self.path = path
        self._finish = finish

    def wait(self) -> str:
        """Wait until it is whole (every rank calls it). -> its path. Raises CheckpointError where it could not be
        written."""
        self._finish()
        return self.path


class Checkpoints:
    """ranks: gives the ranks of the model, at each call. last: the last whole checkpoint that was saved or loaded."""

    def __init__(self, ranks: Callable[[], Ranks]) -> None:
        self._ranks = ranks
        self._writing: str | None = None
        self.last: str | None = None

    def save(self, path: str | os.PathLike[str], facts: Facts, wait: bool, keep: int) -> Saving:
        """See `ParallelModel.save`."""
        if keep < 0:
            raise UsageError(f"keep={keep}", hints=["keep=3 keeps the last three checkpoints of a directory"])
        self.finish()
        target = self._ranks().call(rank_calls.save, os.path.abspath(path), facts, wait, keep)
        if wait:
            self.last = target
        else:
            self._writing = target
        return Saving(target, self.finish)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one. Raises CheckpointError."""
        if self._writing is None:
            return
        target, self._writing = self._writing, None
        self._ranks().call(rank_calls.finish_saving)
        self.last = target

    def load(self, path: str | os.PathLike[str]) -> tuple[int, Facts]:
        """-> (steps that were done, the facts that were saved). Raises CheckpointError."""
        self.finish()
        target = os.path.abspath(path)
        steps, facts = self._ranks().call(rank_calls.restore, target)
        self.last = target
        return steps, facts

    def load_if_any(self, path: str | os.PathLike[str]) -> tuple[int, Facts]:
        """As `load`, (0, {}) where no checkpoint was ever saved there."""
        if not self._ranks().call(rank_calls.has_checkpoint, os.path.abspath(path)):
            return 0, {}
        return self.load(path)

    def hint(self) -> list[str]:
        """What to say when the job ends."""
        return [f"the last whole checkpoint: {self.last}"] if self.last is not None else []


def encodable(extra: Any) -> Any:
    """What a user wants kept with a checkpoint. Raises CheckpointError where JSON does not give it back."""
    import json

    try:
        text = json.dumps(extra)
    except (TypeError, ValueError) as error:
        raise CheckpointError("extra= is kept as JSON, which cannot hold this", [str(error)]) from None
    if json.loads(text) != extra:
        raise CheckpointError("extra= is kept as JSON, which changes it", [text[:200]], ["lists, and text as keys"])
    return extra
