"""Why this and not the next best: every decision of a plan in a sentence with numbers."""

from __future__ import annotations

from collections.abc import Iterable

from shardplan.planner import schedules
from shardplan.planner.instructions import Op
from shardplan.planner.plan import Decision, Plan
from shardplan.planner.report.blocks import Table
from shardplan.planner.report.facts import stage_times
from shardplan.planner.report.words import change_text, nbytes_text, pattern, seconds_text
from shardplan.planner.simulate import messages_of, simulate

_SAME = 0.0005
"""Of the step: what differs by less takes as long."""


def reasons(plan: Plan) -> list[str]:
    """One sentence per decision and its next best."""
    return [sentence(plan, decision) for decision in (*plan.decisions, *schedule_decisions(plan))]


def table(plan: Plan) -> Table:
    """The same in columns."""
    columns = (("decision", False), ("this plan", False), ("instead", False), ("a step", True), ("change", True))
    rows = []
    for decision in (*plan.decisions, *schedule_decisions(plan)):
        found = seconds_text(decision.seconds)
        step = f"at least {found}" if decision.proven else found
        change = change_text(decision.seconds, plan.step_seconds) if decision.seconds is not None else ""
        cells = (decision.topic, decision.chosen, decision.other, step, change, _because(plan, decision))
        rows.append(cells)
    return Table((*columns, ("and", False)), tuple(rows))


def _because(plan: Plan, decision: Decision) -> str:
    """What is to be said besides the seconds."""
    if decision.seconds is None:
        return decision.why
    if decision.proven:
        return "" if decision.seconds >= plan.step_seconds * (1 - _SAME) else "not sought further: the time was up"
    name = [decision.name] if decision.name and not decision.nbytes else []
    why = decision.why.partition(": ")[2]
    return ", ".join([*name, *([why] if why else []), *_memory(plan, decision)])


def reasons_of(plan: Plan, name: str) -> list[str]:
    """Those that are about the parameter of that name."""
    return [sentence(plan, d) for d in plan.decisions if d.topic.startswith("split of ") and d.name == pattern(name)]


def sentence(plan: Plan, decision: Decision) -> str:
    """``topic: chosen, not other: what the other takes and holds``."""
    start = f"{decision.topic}: {decision.chosen}, not {decision.other}"
    if decision.seconds is None:
        return f"{start}: {decision.why}."
    step = plan.step_seconds
    takes = f"{seconds_text(decision.seconds)} a step{_change(decision.seconds, step)}"
    if decision.proven:
        if decision.seconds >= step * (1 - _SAME):
            return f"{start}: no plan with {decision.other} takes less than {takes}."
        return f"{start}: the best with {decision.other} was not sought further; it takes at least {takes}."
    name = f" ({decision.name})" if decision.name and not decision.nbytes else ""
    why = decision.why.partition(": ")[2]
    words = [f"that takes {takes}{name}", *([why] if why else []), *_memory(plan, decision)]
    return f"{start}: {', '.join(words)}."


def _change(seconds: float, step: float) -> str:
    if step <= 0:
        return ""
    if abs(seconds / step - 1) < _SAME:
        return ", as long"
    return f", {change_text(seconds, step)}"


def _memory(plan: Plan, decision: Decision) -> Iterable[str]:
    if not decision.nbytes:
        return
    now = plan.stages[decision.stage].memory.peak_nbytes
    where = f" on stage {decision.stage}" if len(plan.stages) > 1 else ""
    limit = decision.limit_nbytes
    if limit and decision.nbytes > limit:
        over = nbytes_text(decision.nbytes - limit)
        yield f"but needs {nbytes_text(decision.nbytes)}{where}, {over} more than there is"
    elif abs(decision.nbytes - now) > 0.01 * max(now, 1):
        yield f"and needs {nbytes_text(decision.nbytes)} instead of {nbytes_text(now)}{where}"


def schedule_decisions(plan: Plan) -> Iterable[Decision]:
    """The plan's own stages under the other schedules, simulated."""
    trains = any(i.op is Op.OPTIMIZER_STEP for line in plan.instructions for i in line)
    if len(plan.stages) < 2 or plan.chunks > 1 or not trains or plan.step_seconds <= 0:
        return
    edges = {(link.source, link.target) for link in plan.links}
    back = {(link.source, link.target) for link in plan.links if link.grad_nbytes}
    if not edges:
        return
    for kind in schedules.KINDS:
        if kind == plan.schedule or kind in schedules.CHUNKED:
            continue
        lines = schedules.build(kind, len(plan.stages), plan.microbatches, edges, grad_edges=back)
        if any(i.op in (Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT) for line in lines for i in line):
            continue  # needs the seconds of both halves of a backward, which this plan does not hold
        stages = range(len(plan.stages))
        found = simulate(lines, stage_times(plan), messages_of(plan.links))
        peaks = [max((nbytes for _, nbytes in found.memory.get(index, ())), default=0) for index in stages]
        limits = [stage.memory.limit for stage in plan.stages]
        fullest = max(stages, key=lambda index: (peaks[index] / (limits[index] or 1 << 62), peaks[index]))
        yield Decision(
            "schedule", plan.schedule, kind, found.step_seconds, False, peaks[fullest], fullest, limits[fullest]
        )
