"""Timelines: what happened when, on named tracks. Predicted and measured ones have the same form.

`chrome_trace` writes them for Perfetto and chrome://tracing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NamedTuple


class Event(NamedTuple):
    """One bar. category: "forward", "backward", "weight", "reduce", "optimizer", "transfer" or "wait"."""

    name: str
    category: str
    start_seconds: float
    end_seconds: float


class Counter(NamedTuple):
    """A value from `seconds` on (bytes in use, say)."""

    name: str
    seconds: float
    value: float


class Track(NamedTuple):
    """Bars (and counters) of one row, in order of start."""

    name: str
    events: tuple[Event, ...]
    counters: tuple[Counter, ...] = ()


class Timeline(NamedTuple):
    """A titled group of tracks, e.g. "predicted"."""

    name: str
    tracks: tuple[Track, ...]

    @property
    def end_seconds(self) -> float:
        return max((event.end_seconds for track in self.tracks for event in track.events), default=0.0)


def chrome_trace(timelines: Iterable[Timeline]) -> str:
    """JSON text in the Chrome trace event format (microseconds): a process per timeline, a thread per track."""
    records: list[dict[str, object]] = []
    for process, timeline in enumerate(timelines):
        records.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": timeline.name}})
        for thread, track in enumerate(timeline.tracks):
            place = {"pid": process, "tid": thread}
            records.append({"ph": "M", "name": "thread_name", **place, "args": {"name": track.name}})
            records.append({"ph": "M", "name": "thread_sort_index", **place, "args": {"sort_index": thread}})
            records += (
                {
                    "ph": "X",
                    "name": event.name,
                    "cat": event.category,
                    **place,
                    "ts": _micros(event.start_seconds),
                    "dur": _micros(event.end_seconds - event.start_seconds),
                }
                for event in track.events
            )
            records += (
                {
                    "ph": "C",
                    "name": f"{track.name} {counter.name}",
                    "pid": process,
                    "ts": _micros(counter.seconds),
                    "args": {counter.name: counter.value},
                }
                for counter in track.counters
            )
    body = ",\n".join(json.dumps(record, separators=(",", ":")) for record in records)
    return '{"displayTimeUnit":"ms","traceEvents":[\n' + body + "\n]}\n"


def _micros(seconds: float) -> float:
    return round(seconds * 1e6, 3)
