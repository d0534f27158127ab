"""Measured link times: (bytes -> seconds) for every collective and group, with interpolation between sizes.

One latency and one bandwidth do not describe a real link (errors of 30-70 % on gloo), so measured points are kept as
they are and interpolated. A table is cleaned once, when it is made: see `clean`.
"""

from __future__ import annotations

import json
import math
import statistics
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

KINDS = ("p2p", "all_reduce", "all_gather", "reduce_scatter", "all_to_all")
SCHEMA = 1

Points = tuple[tuple[int, float], ...]
"""(nbytes, seconds), bytes strictly increasing, seconds positive and never decreasing."""


def clean(points: Iterable[tuple[int, float]]) -> Points:
    """Sorted, deduplicated, without spikes, never decreasing.

    Points of the same size become their median. A running median of three removes single spikes; what still decreases
    is pooled (isotonic regression of the logarithms, by pooling adjacent violators). Cleaning again changes nothing.
    Raises ValueError where a size is not positive, or where half of the times or more are not positive finite numbers.
    """
    by_size: dict[int, list[float]] = {}
    total = bad = 0
    for nbytes, seconds in points:
        if nbytes <= 0:
            raise ValueError(f"a message of {nbytes} bytes cannot be measured")
        total += 1
        if not (math.isfinite(seconds) and seconds > 0):
            bad += 1
            continue
        by_size.setdefault(int(nbytes), []).append(seconds)
    if total == 0 or 2 * bad >= total:
        raise ValueError(f"{bad} of {total} measured times are not positive numbers")
    sizes = sorted(by_size)
    times = [statistics.median(by_size[size]) for size in sizes]
    calm = [statistics.median(times[i - 1 : i + 2]) if 0 < i < len(times) - 1 else x for i, x in enumerate(times)]
    pools: list[tuple[float, int]] = []
    for value in calm:
        weight = 1
        while pools and pools[-1][0] > value:
            other, count = pools.pop()
            total_weight = weight + count
            value = math.exp((math.log(value) * weight + math.log(other) * count) / total_weight)
            weight = total_weight
        pools.append((value, weight))
    rising = [value for value, weight in pools for _ in range(weight)]
    return tuple(zip(sizes, rising, strict=True))


def interpolate(points: Points, nbytes: int) -> float:
    """Seconds for a size. Between points: linear in log bytes and log seconds. Below the first: the first (latency).
    Beyond the last: linear in bytes, at the rate of the last two points but between 1/4 of and all of the last point's
    seconds per byte."""
    if nbytes <= points[0][0]:
        return points[0][1]
    last, seconds = points[-1]
    if nbytes >= last:
        rate = seconds / last
        slope = rate
        if len(points) > 1:
            slope = (seconds - points[-2][1]) / (last - points[-2][0])
        return seconds + (nbytes - last) * min(max(slope, rate / 4), rate)
    index = bisect_left(points, (nbytes, 0.0))
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    share = math.log(nbytes / x0) / math.log(x1 / x0)
    return y0 * (y1 / y0) ** share


@dataclass(frozen=True, slots=True)
class LinkTables:
    """Measured times. entries: (kind, ranks) -> points. kind: one of `KINDS`; ranks: the group, or (source, target)
    for "p2p". backend: "gloo", "nccl" or "" where unknown. slowdowns: (kind, ranks) -> shares of its speed that compute
    loses on the first rank and on the others while it goes on. Raises ValueError on points that `clean` refuses."""

    entries: Mapping[tuple[str, tuple[int, ...]], Points] = field(hash=False)
    backend: str = ""
    slowdowns: Mapping[tuple[str, tuple[int, ...]], tuple[float, float]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        cleaned: dict[tuple[str, tuple[int, ...]], Points] = {}
        for (kind, ranks), points in sorted(self.entries.items()):
            if kind not in KINDS or len(set(ranks)) != len(ranks) or len(ranks) < 2:
                raise ValueError(f"no table for {kind} among {ranks}")
            if kind == "p2p" and len(ranks) != 2:
                raise ValueError(f"p2p between {ranks}")
            try:
                cleaned[kind, tuple(ranks)] = clean(points)
            except ValueError as error:
                raise ValueError(f"{kind} among {ranks}: {error}") from None
        object.__setattr__(self, "entries", cleaned)
        for key, shares in self.slowdowns.items():
            if key not in cleaned or not all(0 <= share <= 1 for share in shares):
                raise ValueError(f"slowdowns {shares} of {key[0]} among {key[1]}")
        object.__setattr__(self, "slowdowns", dict(sorted(self.slowdowns.items())))

    def seconds(self, kind: str, nbytes: int, ranks: tuple[int, ...]) -> float | None:
        """Interpolated seconds for exactly this group, None where it was not measured."""
        points = self.entries.get((kind, ranks))
        return None if points is None else interpolate(points, nbytes)

    def groups(self, kind: str) -> list[tuple[int, ...]]:
        """Groups for which `kind` was measured, in order."""
        return [ranks for name, ranks in self.entries if name == kind]

    def scaled(self, factor: float) -> LinkTables:
        """The same tables with every time multiplied (experiments: the link described so many times slower)."""
        if not factor > 0:
            raise ValueError(f"times cannot be multiplied by {factor}")
        scaled = {key: tuple((n, s * factor) for n, s in points) for key, points in self.entries.items()}
        return LinkTables(scaled, self.backend, self.slowdowns)

    def merged(self, other: LinkTables) -> LinkTables:
        """Both; where a group is in both, the other's points replace these."""
        return LinkTables(
            {**self.entries, **other.entries},
            other.backend or self.backend,
            {**self.slowdowns, **other.slowdowns},
        )

    # -- text -----------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """JSON text, the same for equal tables."""
        rows = [
            {
                "kind": kind,
                "ranks": list(ranks),
                "points": [list(point) for point in points],
                **({"slowdown": self.slowdowns[kind, ranks]} if (kind, ranks) in self.slowdowns else {}),
            }
            for (kind, ranks), points in self.entries.items()
        ]
        return json.dumps({"schema": SCHEMA, "backend": self.backend, "tables": rows}, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> LinkTables:
        """Inverse of `to_json`. Raises ValueError on anything else."""
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise ValueError(f"link tables have schema {data['schema']!r}, this version reads {SCHEMA}")
            entries = {
                (row["kind"], tuple(row["ranks"])): tuple((int(n), float(s)) for n, s in row["points"])
                for row in data["tables"]
            }
            slowdowns = {
                (row["kind"], tuple(row["ranks"])): (float(row["slowdown"][0]), float(row["slowdown"][1]))
                for row in data["tables"]
                if "slowdown" in row
            }
            return LinkTables(entries, data["backend"], slowdowns)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"not link tables: {type(error).__name__}: {error}") from None

    def __str__(self) -> str:
        lines = [f"link tables ({self.backend or 'unknown backend'})"]
        for (kind, ranks), points in self.entries.items():
            first, last = points[0], points[-1]
            lines.append(
                f"  {kind:14} {','.join(map(str, ranks)):12} {first[0]} B {first[1] * 1e6:.0f} us"
                f" .. {last[0]} B {last[1] * 1e6:.0f} us ({last[0] / last[1] / 1e9:.3g} GB/s)"
            )
        return "\n".join(lines)


def median_points(samples: Mapping[int, Sequence[float]]) -> list[tuple[int, float]]:
    """Bytes -> repeated times, to bytes -> median time."""
    return [(nbytes, statistics.median(times)) for nbytes, times in sorted(samples.items()) if times]
