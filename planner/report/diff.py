"""Plan.diff: what changes from one plan to another, in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shardplan.planner.plan import Plan
from shardplan.planner.report.facts import parameter_splits
from shardplan.planner.report.words import change_text, names_text, nbytes_text, ranges, seconds_text


@dataclass(frozen=True, slots=True)
class Change:
    """before, after: in words, "-" for nothing; by: how much that is, where both are numbers."""

    what: str
    before: str
    after: str
    by: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.before} -> {self.after}" + (f" ({self.by})" if self.by else "")


def diff(plan: Plan, other: Plan) -> str:
    """One line per change, ``what: before -> after``; "no difference" for equal plans."""
    lines = [str(change) for change in changes(plan, other)]
    if not lines:
        lines = ["no difference" if plan == other else "no difference that the report shows"]
    return "\n".join(lines) + "\n"


def changes(plan: Plan, other: Plan) -> list[Change]:
    """What differs, in the order of the report."""
    return list(_changes(plan, other))


def _changes(plan: Plan, other: Plan) -> Iterable[Change]:
    yield from _change("model", plan.model, other.model)
    yield from _change("graph", plan.fingerprint, other.fingerprint)
    yield from _change("inputs", _inputs(plan), _inputs(other))
    yield from _change("devices", _devices(plan), _devices(other))
    yield from _change("degrees", plan.degrees(), other.degrees())
    yield from _change("schedule", plan.schedule, other.schedule)
    if plan.step_seconds != other.step_seconds:
        by = change_text(other.step_seconds, plan.step_seconds)
        yield Change("step", seconds_text(plan.step_seconds), seconds_text(other.step_seconds), by)
    for index in range(max(len(plan.stages), len(other.stages))):
        for what, old, new in zip(
            ("blocks", "ranks", "mesh", "recomputed", "peak"), _stage(plan, index), _stage(other, index)
        ):
            yield from _change(f"stage {index} {what}", old, new)
    old_splits, new_splits = _splits(plan), _splits(other)
    for name in sorted(old_splits.keys() | new_splits.keys()):
        yield from _change(f"split {name}", old_splits.get(name, "-"), new_splits.get(name, "-"))
    yield from _change("constraints", "; ".join(plan.constraints), "; ".join(other.constraints))
    yield from _change("outcome", plan.status.outcome, other.status.outcome)


def _change(what: str, old: str, new: str) -> Iterable[Change]:
    if old != new:
        yield Change(what, old or "-", new or "-")


def _inputs(plan: Plan) -> str:
    return ", ".join(f"{name}={text}" for name, text in sorted(plan.inputs.items()))


def _devices(plan: Plan) -> str:
    kinds: dict[str, int] = {}
    for device in plan.devices:
        text = f"{device.kind} ({nbytes_text(device.limit_nbytes)})"
        kinds[text] = kinds.get(text, 0) + 1
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def _stage(plan: Plan, index: int) -> tuple[str, ...]:
    if index >= len(plan.stages):
        return ("",) * 5
    stage = plan.stages[index]
    mesh = " x ".join(f"{axis}{size}" for axis, size in zip(stage.mesh.axes, stage.mesh.sizes, strict=True))
    return (
        names_text(stage.blocks),
        ranges(stage.ranks),
        mesh,
        names_text(stage.rematerialized),
        nbytes_text(stage.memory.peak_nbytes),
    )


def _splits(plan: Plan) -> dict[str, str]:
    """Name pattern -> how it is split, on all axes."""
    found: dict[str, list[str]] = {}
    for split in parameter_splits(plan):
        words = ", ".join(f"{axis} {text}" for axis, text in split.axes.items()) or "whole"
        found.setdefault(split.pattern, []).append(words)
    return {pattern: " | ".join(texts) for pattern, texts in found.items()}
