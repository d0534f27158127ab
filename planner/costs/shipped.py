"""Measurements that come with the package: op times of kinds of devices, made by ``make profile-gpu`` on such a device.

A file `planner/profile_NAME.toml` holds one device kind: its name as in the presets, where it was measured, and rows:
key of the call, its family (`costs.profile`), seconds forward and backward, and what the roofline said of them then. A
kind without a file has the roofline only, and coverage says "modelled".
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import astuple
from functools import lru_cache
from pathlib import Path

from shardplan.planner.costs.store import Sample

_FOLDER = Path(__file__).parent.parent
PREFIX = "profile_"


@lru_cache(maxsize=16)
def samples(kind: str, folder: Path = _FOLDER) -> tuple[Sample, ...]:
    """What was measured on a device of a kind, by call and family; () where nothing was. Rows that cannot be seconds
    are left out."""
    file = folder / f"{PREFIX}{kind}.toml"
    if not file.is_file():
        return ()
    found = tomllib.loads(file.read_text())
    if found.get("schema") != 1 or found.get("device") != kind:
        return ()
    rows = (Sample(*row) for row in found["rows"])
    return tuple(sample for sample in rows if sample.is_sane() and sample.forward_seconds > 0)


def text(kind: str, source: str, found: Iterable[Sample]) -> str:
    """The content of a file; inverse of `samples`. source: device and versions that it was measured with."""
    lines = ["schema = 1", f"device = {_quoted(kind)}", f"source = {_quoted(source)}", "rows = ["]
    for sample in sorted(found, key=lambda sample: sample.key):
        key, family, *numbers = astuple(sample)
        texts = [f"{n:.9f}" if isinstance(n, float) else str(n) for n in numbers]
        lines.append(f"    [{_quoted(key)}, {_quoted(family)}, {', '.join(texts)}],")
    return "\n".join([*lines, "]", ""])


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
