"""Which rank a job ended for, told from what its ranks answered, how they ended and at what places they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardplan.errors import ShardplanError, WorkerFailed, WorkerTimeout
from shardplan.runtime.worker import Failure

_PEER_WORDS = ("gloo", "nccl", "connection closed by peer", "connection reset", "processgroup", "distbackenderror")
_TOLD = 8  # places of other ranks in an error


def blame(failures: dict[int, Failure], ended: dict[int, str], places: dict[int, str]) -> WorkerFailed:
    """The error of the rank that failed first in substance: a death or an exception of its own before an exception
    that only says that a peer is gone."""
    own = {rank: f for rank, f in failures.items() if not is_of_a_peer(f.kind, f.title)}
    if own:
        rank = min(own)
        failure = own[rank]
        title = f"rank {rank} raised {failure.kind}: {failure.title}"
        details = failure.traceback.rstrip().splitlines()
    elif ended:
        rank = min(ended)
        title, details = f"rank {rank} {ended[rank]}", []
        if "SIGKILL" in title:
            details = ["nothing but another process, often the system when memory runs out, kills that way"]
    else:
        rank = min(failures)
        title = f"rank {rank} raised {failures[rank].kind}: {failures[rank].title}"
        details = failures[rank].traceback.rstrip().splitlines()
    details.append(f"rank {rank} was at: {places[rank]}")
    others = [f"rank {r} {how}" for r, how in sorted(ended.items()) if r != rank]
    others += [f"rank {r} then raised {f.kind}: {f.title}" for r, f in sorted(failures.items()) if r != rank]
    others += _elsewhere(places, [rank])
    cause = failures[rank].error if rank in failures else None
    error = WorkerFailed(title, [*details, *others], cause.hints if isinstance(cause, ShardplanError) else ())
    error.rank = rank
    return error


def is_of_a_peer(kind: str, title: str) -> bool:
    """Whether an exception only says that another rank is gone or late."""
    text = f"{kind} {title}".lower()
    return any(word in text for word in _PEER_WORDS)


def _elsewhere(places: dict[int, str], told: Sequence[int]) -> list[str]:
    others = [rank for rank in sorted(places) if rank not in told][:_TOLD]
    return [f"rank {rank} was at: {places[rank]}" for rank in others]


def silence(silent: Sequence[int], seconds: float, places: dict[int, str]) -> WorkerTimeout:
    error = WorkerTimeout(
        f"{_named(silent)} gave no sign of life for {seconds:g} s, at {places[silent[0]]}",
        [*_elsewhere(places, silent[:1]), "all workers were ended"],
        ["the process was stopped, or its machine has no memory or time left", "heartbeat_seconds= sets the limit"],
    )
    error.rank = silent[0]
    return error


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def lateness(
    late: Sequence[int], answers: dict[int, tuple[str, Any]], seconds: float, places: dict[int, str]
) -> WorkerTimeout:
    done = ", ".join(map(str, sorted(answers))) or "none"
    error = WorkerTimeout(
        f"{_named(late)} did not answer within {seconds:g} s",
        [f"ranks that answered: {done}", *_elsewhere(places, sorted(answers)), "all workers were ended"],
    )
    error.rank = late[0]
    return error
