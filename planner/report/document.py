"""The report as a document: what it says in which order. The renderers turn it into text and HTML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from shardplan.planner.plan import Alternative, Memory, Plan
from shardplan.planner.report import pictures
from shardplan.planner.report.blocks import Bar, Bars, Block, Chart, Lines, Reasons, Section, Table
from shardplan.planner.report.facts import STORED, SUMMED, Facts, SplitFacts
from shardplan.planner.report.why import reasons, table
from shardplan.planner.report.words import (
    change_text,
    names_text,
    nbytes_text,
    numbers,
    plural,
    ranges,
    ratio_text,
    seconds_text,
    share_text,
)


def document(facts: Facts) -> tuple[Section, ...]:
    """All sections, in the order in which they are shown."""
    sections = (
        Section("Stages", _stages(facts)),
        Section("Where the time goes", pictures.seconds_of_stages(facts)),
        Section("Memory", (Bars(tuple(_bars(facts))),) if facts.devices else ()),
        Section("Pipeline", _pipeline(facts)),
        Section("Memory over the step", pictures.memory_curves(facts)),
        Section("Where the model lies", pictures.held(facts)),
        Section("Splits", _splits(facts)),
        Section("Why", _why(facts.plan)),
        Section("What binds", _lines(facts.binds)),
        Section("Alternatives", _alternatives(facts)),
        Section("What if", _what_if(facts)),
        Section("Certificate", _lines(_certificate(facts))),
        Section("Predicted and measured", _comparison(facts)),
        Section("Links", _links(facts.plan)),
        Section("Assumptions and coverage", _lines(facts.assumptions)),
        Section("Ops without a written rule", _unwritten(facts.plan)),
        Section("Submodules kept whole", _leaves(facts.plan)),
        Section("Constraints", _lines(facts.plan.constraints)),
        Section("Notes", _lines(facts.plan.notes)),
    )
    return tuple(section for section in sections if section.blocks)


def _lines(items: Iterable[str]) -> tuple[Block, ...]:
    found = tuple(items)
    return (Lines(found),) if found else ()


def _why(plan: Plan) -> tuple[Block, ...]:
    found = tuple(reasons(plan))
    return (Reasons(found, table(plan)),) if found else ()


def _stages(facts: Facts) -> tuple[Block, ...]:
    columns = (
        ("stage", True),
        ("devices", False),
        ("mesh", False),
        ("forward", True),
        ("backward", True),
        ("once", True),
        ("busy", True),
        ("peak", True),
    )
    rows = []
    lines = []
    for stage in facts.stages:
        plan = stage.plan
        mesh = " x ".join(f"{a}{n}" for a, n in zip(plan.mesh.axes, plan.mesh.sizes, strict=True) if a != "mb")
        rows.append(
            (
                str(stage.stage),
                stage.devices,
                mesh,
                seconds_text(plan.forward_seconds),
                seconds_text(plan.backward_seconds),
                seconds_text(plan.once_seconds),
                seconds_text(stage.busy_seconds),
                nbytes_text(plan.memory.peak_nbytes),
            )
        )
        recomputed = f" (recomputed in backward: {names_text(plan.rematerialized)})" if plan.rematerialized else ""
        lines.append(f"stage {stage.stage}: {names_text(plan.blocks)}{recomputed}")
    return (Table(columns, tuple(rows)), Lines(tuple(lines)))


def parts_of(memory: Memory) -> tuple[tuple[str, int], ...]:
    """(name, bytes) in the order in which bars show them."""
    return (
        ("parameters", memory.parameters),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("activations", memory.activations),
        ("buffers", memory.buffers),
        ("reserve", memory.reserve),
    )


def _bars(facts: Facts) -> Iterable[Bar]:
    for device in facts.devices:
        yield Bar(device.name, parts_of(device.memory), device.limit_nbytes, device.measured_nbytes)


def _pipeline(facts: Facts) -> tuple[Block, ...]:
    plan, simulation = facts.plan, facts.simulation
    text = (
        f"{plan.schedule}, {plural(plan.microbatches, 'microbatch')}"
        if plan.microbatches == 1
        else f"{plan.schedule}, {plan.microbatches} microbatches"
    )
    if simulation.step_seconds <= 0:
        return (Lines((f"{text}; the plan holds no times to draw.",)),)
    text += f"; predicted {seconds_text(simulation.step_seconds)} a step, bubble {share_text(simulation.bubble_share)}"
    end = max(timeline.end_seconds for timeline in facts.timelines)
    return (Lines((text + ".",)), *(Chart(timeline, end) for timeline in facts.timelines))


def _splits(facts: Facts) -> tuple[Block, ...]:
    if not facts.splits:
        return ()
    columns = [("parameter", False), ("count", True), ("tensor", False)]
    columns += [(f"{axis} ({'/'.join(map(str, sorted(set(sizes))))})", False) for axis, sizes in facts.axes.items()]
    columns.append(("bytes each", True))
    plain = [s for s in facts.splits if s.kind == "buffer" and set(s.axes.values()) <= {"copies"}]
    shown = [s for s in facts.splits if s not in plain]
    count = Counter(split.pattern for split in shown)
    rows = tuple(
        (
            _split_name(split, count[split.pattern] > 1),
            str(len(split.names)),
            split.tensor,
            *(split.axes[axis] for axis in facts.axes),
            nbytes_text(split.local_nbytes),
        )
        for split in shown
    )
    blocks: list[Block] = [Table(tuple(columns), rows)] if rows else []
    if any(SUMMED in split.axes.values() for split in shown):
        blocks.append(Lines((f"{SUMMED}: whole on every device, the gradient is summed once a step.",)))
    levels = {stored.level for stored in facts.plan.storage.values()}
    notes = [f"{short}: {meaning}." for level, (short, meaning) in STORED.items() if level in levels]
    if notes:
        blocks.append(Lines(tuple(notes)))
    if plain:
        names = sum(len(split.names) for split in plain)
        nbytes = sum(len(split.names) * split.local_nbytes for split in plain)
        blocks.append(Lines((f"{plural(names, 'buffer')} ({nbytes_text(nbytes)}): copies on every device.",)))
    return tuple(blocks)


def _split_name(split: SplitFacts, partial: bool) -> str:
    """The pattern; with the numbers it holds for, where the same pattern is split in more than one way."""
    found = {numbers(name)[0] for name in split.names if numbers(name)}
    if not partial or not found:
        return split.pattern
    return split.pattern.replace("*", ranges(found) if len(found) == 1 else f"[{ranges(found)}]", 1)


def _alternatives(facts: Facts) -> tuple[Block, ...]:
    if not facts.baselines and not facts.runners_up:
        return ()
    rows: list[tuple[str, ...]] = [
        ("this plan", seconds_text(facts.step_seconds), "", nbytes_text(_peak(facts.plan)), "")
    ]
    rows += (_alternative(facts, "baseline", found) for found in facts.baselines)
    rows += (_alternative(facts, "runner-up", found) for found in facts.runners_up)
    columns = (("plan", False), ("step", True), ("slower by", True), ("peak", True), ("why not", False))
    return (*pictures.costs(facts), Table(columns, tuple(rows)))


def _alternative(facts: Facts, kind: str, found: Alternative) -> tuple[str, ...]:
    change = change_text(found.seconds, facts.step_seconds) if found.seconds is not None else ""
    name = found.name if kind == "baseline" else f"{kind}: {found.name}"
    peak = nbytes_text(found.peak_nbytes) if found.peak_nbytes else "-"
    return name, seconds_text(found.seconds), change, peak, found.reason


def _what_if(facts: Facts) -> tuple[Block, ...]:
    if not facts.what_if:
        return ()
    rows = [
        (
            f"{found.setting} {found.value}",
            found.degrees or "-",
            seconds_text(found.seconds),
            f"{found.samples_per_second:,.1f}" if found.seconds else "-",
            ratio_text(found.samples_per_second / facts.samples_per_second)
            if found.seconds and facts.samples_per_second
            else "-",
            nbytes_text(found.peak_nbytes) if found.peak_nbytes else "-",
            found.reason,
        )
        for found in facts.what_if
    ]
    columns = (("if", False), ("then", False), ("step", True), ("samples/s", True), ("rate", True), ("peak", True))
    return (*pictures.rates(facts), Table((*columns, ("or", False)), tuple(rows)))


def _peak(plan: Plan) -> int:
    return max((stage.memory.peak_nbytes for stage in plan.stages), default=0)


def _certificate(facts: Facts) -> Iterable[str]:
    status, plan = facts.status, facts.plan
    if status.outcome == "given":
        yield "Degrees and splits were given; nothing was searched."
    else:
        yield (
            f"{status.outcome}: no plan in the cost model is faster than {seconds_text(status.lower_bound)}, "
            f"this one is within {share_text(max(status.gap, 0.0))} of that."
        )
    cases = ", ".join(f"{count:,} {name}" for name, count in sorted(status.searched.items()))
    # Plan files hold no wall times of planning.
    took = [seconds_text(status.seconds)] if status.seconds else []
    yield f"Solver: {', '.join([status.solver, *took])}" + (f"; cases: {cases}." if cases else ".")
    if plan.trace_seconds or plan.profile_seconds:
        yield f"Tracing took {seconds_text(plan.trace_seconds)}, costs {seconds_text(plan.profile_seconds)}."


def _comparison(facts: Facts) -> tuple[Block, ...]:
    if not facts.measured:
        return ()
    show = {"seconds": seconds_text, "bytes": nbytes_text}
    rows = tuple(
        (
            row.name,
            show[row.unit](row.predicted),
            show[row.unit](row.measured),
            change_text(row.measured, row.predicted),
        )
        for row in facts.comparisons
    )
    table = Table((("what", False), ("predicted", True), ("measured", True), ("off by", True)), rows)
    lines = [f"Medians of {plural(facts.measured.steps, 'step')}."]
    if single := facts.measured.single_device_seconds:
        lines.append(
            f"One device takes {seconds_text(single)} a step: "
            f"{ratio_text(single / facts.measured.step_seconds)} the speed of one device."
        )
    return (table, Lines(tuple(lines)))


def _links(plan: Plan) -> tuple[Block, ...]:
    drawn = pictures.topology(plan)
    if len(drawn) > 1:
        drawn += (Lines(("Collectives are counted as rings between neighbours.",)),)
    if not plan.links:
        return drawn
    rows: list[tuple[str, ...]] = []
    for link in plan.links:
        step = plan.microbatches * link.nbytes
        rows.append(
            (
                f"{link.source} > {link.target}",
                "activations",
                nbytes_text(link.nbytes),
                seconds_text(link.seconds),
                nbytes_text(step),
            )
        )
        if link.grad_nbytes:
            rows.append(
                (
                    f"{link.target} > {link.source}",
                    "gradients",
                    nbytes_text(link.grad_nbytes),
                    seconds_text(link.grad_seconds),
                    nbytes_text(plan.microbatches * link.grad_nbytes),
                )
            )
    columns = (("stages", False), ("what", False), ("a message", True), ("takes", True), ("a step", True))
    return (*drawn, Table(columns, tuple(rows)))


def _leaves(plan: Plan) -> tuple[Block, ...]:
    if not plan.leaves:
        return ()
    facts = tuple((name, share_text(share), how, why) for name, share, why, how in plan.leaves)
    columns = (("module", False), ("of the compute", True), ("runs", False), ("because", False))
    return (Lines(("These run as the model has them: no op inside is planned.",)), Table(columns, facts))


def _unwritten(plan: Plan) -> tuple[Block, ...]:
    found: list[Block] = []
    if plan.replicated_ops:
        rows = tuple((op, str(count), share_text(share), why) for op, count, share, why in plan.replicated_ops)
        found.append(Lines(("These ops have no rule: every device runs them whole.",)))
        columns = (("op", False), ("nodes", True), ("of the compute", True), ("because", False))
        found.append(Table(columns, rows))
    if plan.discovered_ops:
        found.append(Lines(("These rules were found by running the op on shards, forward and backward.",)))
        facts = tuple((op, str(count), ways) for op, count, ways in plan.discovered_ops)
        found.append(Table((("op", False), ("nodes", True), ("may be split", False)), facts))
    return tuple(found)
