"""What measured steps say about the cost model: corrections that the next plan on the same device uses.

A measured job leaves one `Evidence` per device key (`profile.device_key`): measured over predicted seconds of every
class of ops, forward and backward, of the optimizer and the gradient reduction, the seconds of an instruction and of a
step that no op accounts for, and measured over predicted peak memory. All ratios are against the *uncorrected* model,
so that evidence does not depend on what was known before.

`Corrections` are what a plan is priced with. A model that was measured itself is corrected by its own evidence; another
by the median over the jobs, class by class; a class that was never seen by the median over the classes. Everything is
clamped, so that a job that was measured while the machine did something else moves a plan by a bounded amount.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from shardplan.planner.costs.store import Store

VERSION = 1
_MOST_JOBS = 32
_RATIO = (0.25, 4.0)
_PASS_SECONDS = (0.0, 5e-3)
_STEP_SECONDS = (0.0, 50e-3)
_REDUCE = (0.02, 4.0)  # what overlaps with backward costs next to nothing
_MEMORY = (1.0, 1.5)

Pair = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Evidence:
    """One measured job. model: fingerprint of its trace; plan: its degrees.

    ops: class -> (forward, backward), measured over predicted; a side that was not seen is nan. forward_seconds,
    backward_seconds: of an instruction besides its ops; step_seconds: of a step besides its instructions. optimizer,
    reduce, collective, message: measured over predicted, None where there was none (collective: inside stages; message:
    between stages). memory: measured over predicted peak, None where not taken.
    """

    model: str
    plan: str
    ops: dict[str, Pair] = field(default_factory=dict)
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    step_seconds: float = 0.0
    optimizer: float | None = None
    reduce: float | None = None
    collective: float | None = None
    message: float | None = None
    memory: float | None = None


@dataclass(frozen=True, slots=True)
class Corrections:
    """See the module docstring. ops: class -> factors; default: of other classes. jobs: how many measured jobs speak;
    own: whether this very model is among them. memory: factor on a predicted peak, at least 1 (a reserve)."""

    ops: dict[str, Pair] = field(default_factory=dict)
    default: Pair = (1.0, 1.0)
    forward_seconds: float | None = None
    backward_seconds: float | None = None
    step_seconds: float | None = None
    optimizer: float = 1.0
    reduce: float = 1.0
    collective: float = 1.0
    message: float = 1.0
    memory: float = 1.0
    jobs: int = 0
    own: bool = False

    def factors(self) -> dict[str, float]:
        """All factors by name, for the record of a plan."""
        if not self.jobs:
            return {}
        names = ("optimizer", "reduce", "collective", "message", "memory")
        found = {name: getattr(self, name) for name in names}
        for name, pair in (*self.ops.items(), ("other", self.default)):
            for side, factor in zip(("forward", "backward"), pair, strict=True):
                found[f"op {name} {side}"] = factor
        return {name: round(factor, 6) for name, factor in found.items()}

    def of(self, op_class: str) -> Pair:
        """Factors on forward and backward seconds of an op."""
        return self.ops.get(op_class, self.default)


NONE = Corrections()


def corrections(evidence: Sequence[Evidence], model: str = "") -> Corrections:
    """What the evidence of a device says for a model."""
    if not evidence:
        return NONE
    own = [e for e in evidence if e.model == model]
    speaking = own or list(evidence)
    seen: dict[str, list[Pair]] = {}
    for job in evidence:
        for name, pair in job.ops.items():
            seen.setdefault(name, []).append(pair)
    ops = {name: _pair(pairs) for name, pairs in seen.items()}
    default = _pair(ops.values())
    for name in {name for job in own for name in job.ops}:
        mine = _pair(job.ops[name] for job in own if name in job.ops)
        ops[name] = mine
    return Corrections(
        dict(sorted(ops.items())),
        default,
        _clamped(statistics.median(e.forward_seconds for e in speaking), _PASS_SECONDS),
        _clamped(statistics.median(e.backward_seconds for e in speaking), _PASS_SECONDS),
        _clamped(statistics.median(e.step_seconds for e in speaking), _STEP_SECONDS),
        _middle((e.optimizer for e in speaking), _RATIO),
        _middle((e.reduce for e in speaking), _REDUCE),
        _middle((e.collective for e in speaking), _RATIO),
        _middle((e.message for e in speaking), _RATIO),
        _middle((e.memory for e in speaking), _MEMORY),
        len(evidence),
        bool(own),
    )


def _pair(pairs: Iterable[Pair]) -> Pair:
    given = list(pairs)
    forward, backward = (_middle((pair[side] for pair in given), _RATIO) for side in range(2))
    return forward, backward


def _middle(values: Iterable[float | None], bounds: Pair) -> float:
    known = [v for v in values if v is not None and math.isfinite(v)]
    return _clamped(statistics.median(known), bounds) if known else 1.0


def _clamped(value: float, bounds: Pair) -> float:
    return min(max(value, bounds[0]), bounds[1]) if math.isfinite(value) else bounds[0]


# -- on disk -----------------------------------------------------------------------------------------------------------


def key_of(place: str) -> str:
    """place: `profile.device_key` of the device."""
    return f"calibration/{VERSION}/{place}"


def load(store: Store, place: str) -> list[Evidence]:
    """Evidence on a device, oldest first; what is damaged is left out."""
    return _rows(store.get_text(key_of(place)))


def add(store: Store, place: str, found: Evidence) -> None:
    """Keep a job's evidence; a job of the same model and plan takes the place of the earlier one."""

    def merged(text: str | None) -> str:
        kept = [e for e in _rows(text) if (e.model, e.plan) != (found.model, found.plan)]
        return json.dumps([asdict(e) for e in [*kept, found][-_MOST_JOBS:]], sort_keys=True)

    store.change_text(key_of(place), merged)


def reset(store: Store, place: str) -> int:
    """Forget all evidence on a device -> of how many jobs."""
    count = len(load(store, place))
    store.change_text(key_of(place), lambda _: "[]")
    return count


def _rows(text: str | None) -> list[Evidence]:
    try:
        rows = json.loads(text) if text is not None else []
    except ValueError:
        return []
    return [e for row in (rows if isinstance(rows, list) else []) if (e := _parsed(row)) is not None]


def _parsed(row: Any) -> Evidence | None:
    try:
        ops = {str(name): (float(pair[0]), float(pair[1])) for name, pair in row["ops"].items()}
        found = Evidence(**{**row, "ops": ops})
        seconds = found.forward_seconds, found.backward_seconds, found.step_seconds
        if not all(isinstance(s, (int, float)) and math.isfinite(s) for s in seconds):
            return None
        for ratio in (found.optimizer, found.reduce, found.collective, found.message, found.memory):
            if ratio is not None and not (isinstance(ratio, (int, float)) and ratio > 0):
                return None
    except (TypeError, KeyError, ValueError, IndexError, AttributeError):
        return None
    return found
