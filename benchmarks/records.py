"""Results of benchmarks on disk: one JSON file a suite, with machine facts, targets and whether they were met.

    {"schema": 1, "suite", "machine": {...}, "targets": [{"name", "wanted", "value", "met", "why"}], ...}

What else a file holds is the suite's own. `benchmarks.page` makes docs/benchmarks.md of these files, and `compare` sets
one beside an older one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.protocol import TIE, machine

FOLDER = Path(__file__).parent / "results"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Target:
    """wanted: the bound; most: whether the value may at most be that, else at least. why: of a miss, in words: what is
    known of its cause; shown only where the value misses."""

    name: str
    wanted: float
    most: bool = True
    why: str = ""

    def check(self, value: float) -> Checked:
        met = not math.isnan(value) and (value <= self.wanted if self.most else value >= self.wanted)
        return Checked(self.name, ("<= " if self.most else ">= ") + f"{self.wanted:g}", value, met, self.why)


@dataclass(frozen=True, slots=True)
class Checked:
    name: str
    wanted: str
    value: float
    met: bool
    why: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.value:.3f}, wanted {self.wanted}"


def write(path: Path | None, suite: str, targets: Iterable[Checked] = (), **data: Any) -> None:
    """The file of a suite, whole or untouched."""
    if path is None:
        return
    shown = [asdict(target) for target in targets]
    text = json.dumps({"schema": SCHEMA, "suite": suite, "machine": machine(), "targets": shown, **data}, indent=1)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(text + "\n")
    os.replace(draft, path)


def read(path: Path | None) -> dict[str, Any]:
    """Empty where there is no file."""
    return json.loads(path.read_text()) if path is not None and path.exists() else {}


def figures(data: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a result that two runs can be compared by: those of its targets, and all called
    ``"comparable"``."""
    found = {entry["name"]: entry["value"] for entry in data.get("targets", ())}
    return found | dict(data.get("comparable", {}))


def compare(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[tuple[str, float, float, str]]:
    """(figure, before, now, verdict) of every figure that both have. Smaller is better, but for figures whose target is
    a least value; "same" within a tie."""
    rising = {entry["name"] for entry in now.get("targets", ()) if entry["wanted"].startswith(">=")}
    old, rows = figures(before), []
    for name, value in figures(now).items():
        if name not in old:
            continue
        change = value - old[name]
        worse = change < 0 if name in rising else change > 0
        same = abs(change) <= TIE * max(abs(old[name]), 1e-12)
        rows.append((name, old[name], value, "same" if same else "worse" if worse else "better"))
    return rows
