"""The ranks of a job, with one face wherever they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from shardplan.errors import WorkerFailed, WorkerTimeout
from shardplan.runtime import rank_calls
from shardplan.runtime.launch import Workers
from shardplan.runtime.rank_calls import Job
from shardplan.runtime.supply import Supply
from shardplan.runtime.worker import Session
from shardplan.values import names_by_rank


class Ranks(Protocol):
    """The ranks of a job. A call runs on all of them; `call` gives this process's result (rank 0's in a driver)."""

    in_place: bool
    hint: Callable[[], list[str]]
    """What to say besides where the job ends."""

    @property
    def alive(self) -> bool:
        """Whether they can be called."""
        ...

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any: ...

    def load(self, job: Job, supply: Supply) -> None: ...

    def close(self) -> None: ...


class InPlace:
    """This process is a rank (torchrun)."""

    in_place = True

    def __init__(self, session: Session) -> None:
        self.session = session
        self.hint: Callable[[], list[str]] = list
        self.alive = True

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._watched(function, *arguments)

    def load(self, job: Job, supply: Supply) -> None:
        told = replace(supply, told=supply.told and self.session.rank == 0)
        self._watched(rank_calls.load, job, self._watched(rank_calls.same_values, told))

    def _watched(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Any error that is another rank's doing says so, and where this rank was."""
        watch = self.session.watch
        batch = next((value for value in arguments if isinstance(value, dict)), None)
        watch.begin(function.__name__, batch)
        try:
            return function(self.session, *arguments)
        except Exception as error:
            explained = told(watch.explained(error), self.hint)
            self.alive = not isinstance(explained, (WorkerFailed, WorkerTimeout))
            if explained is error:
                raise
            raise explained from error
        finally:
            watch.end()

    def close(self) -> None:
        try:
            rank_calls.unload(self.session)
        finally:
            self.session.watch.close()


def told(error: Exception, hint: Callable[[], list[str]]) -> Exception:
    """The error, with the hint if it ends the job."""
    if isinstance(error, (WorkerFailed, WorkerTimeout)):
        error.hints = (*error.hints, *hint())
    return error


class Spawned:
    """The ranks are workers that this process drives."""

    in_place = False

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.hint: Callable[[], list[str]] = list

    @property
    def alive(self) -> bool:
        return not self.workers.closed

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self.workers.call(function, *arguments)[0]
        except (WorkerFailed, WorkerTimeout) as error:
            told(error, self.hint)
            raise

    def load(self, job: Job, supply: Supply) -> None:
        needed = names_by_rank(job.programs, len(self.workers))
        mine = [replace(supply.only(names), told=supply.told and rank == 0) for rank, names in enumerate(needed)]
        self.workers.call_each(rank_calls.load, [(job, given) for given in mine])

    def close(self) -> None:
        self.workers.close()
