"""Plan.explain: what parameters and ops do on each axis, in words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from shardplan.errors import NoMatch, UsageError
from shardplan.planner.placement import MICROBATCH_AXIS, Placement, R, conversion
from shardplan.planner.plan import NodeSummary, Plan
from shardplan.planner.report.facts import SUMMED, axis_sizes, itemsize, parse_tensor, placement_words
from shardplan.planner.report.why import reasons_of
from shardplan.planner.report.words import nbytes_text, ranges

_SOURCES = ("param", "buffer", "constant", "input")
_WORDS = {
    "all_reduce": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "slice": "own slice kept",
}


_STORED = {
    1: "whole on every device; optimizer state in parts of dim {dim}: once a step the gradient is reduce-scattered and "
    "the updated parts are all-gathered",
    2: "whole on every device; gradient and optimizer state in parts of dim {dim}: the gradient is reduce-scattered in "
    "every backward, the updated parts are all-gathered once a step",
    3: "in parts of dim {dim}: all-gathered for every forward and backward of its segment, the gradient is "
    "reduce-scattered",
}


def explain(plan: Plan, pattern: str) -> str:
    """See `Plan.explain`. Raises NoMatch; UsageError for a plan without node summaries."""
    return "\n".join(line for item in matching(plan, pattern) for line in _node(plan, *item)) + "\n"


def matching(plan: Plan, pattern: str) -> list[tuple[str, NodeSummary]]:
    """Nodes of the graph, in its order. The glob is matched against node names, parameter names and module paths; a
    module stands for everything inside it. Raises NoMatch; UsageError for a plan without node summaries."""
    if not plan.nodes:
        raise UsageError("this plan holds no node summaries to explain", hints=["plan again with this version"])
    found = [item for item in plan.nodes.items() if _matches(pattern, *item)]
    if not found:
        names = sorted({n.name for n in plan.nodes.values() if n.name} | set(plan.nodes))
        close = difflib.get_close_matches(pattern, names, 3, 0.4)
        raise NoMatch(f"nothing in the plan matches {pattern!r}", hints=[f"did you mean {name!r}?" for name in close])
    return sorted(found, key=lambda item: item[1].order)


def _matches(pattern: str, node: str, summary: NodeSummary) -> bool:
    names = [node, summary.name]
    return any(name and (fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")) for name in names)


def _node(plan: Plan, node: str, summary: NodeSummary) -> Iterable[str]:
    stages = f"stage {ranges(summary.stages)}" if summary.stages else "no stage"
    outputs = ", ".join(summary.outputs) or "no tensor"
    if summary.op in _SOURCES:
        yield f"{summary.name}: {summary.op} {outputs}, {stages}"
    else:
        where = f" in {summary.name}" if summary.name else ""
        yield f"{node}: {summary.op}{where} -> {outputs}, {stages}"
    axes = {axis: max(sizes[stage] for stage in summary.stages or (0,)) for axis, sizes in axis_sizes(plan).items()}
    if plan.microbatches > 1 and summary.op not in ("param", "buffer"):
        axes = {MICROBATCH_AXIS: plan.microbatches, **axes}
    lines = [
        f"  {axis}/{size}: {text}" for axis, size in axes.items() if size > 1 for text in _axis(plan, node, axis, size)
    ]
    yield from lines or ["  the same on every device"]
    if summary.op == "param":
        yield from (f"  why: {reason}" for reason in reasons_of(plan, summary.name))


def _axis(plan: Plan, node: str, axis: str, size: int) -> Iterable[str]:
    summary = plan.nodes[node]
    strategy = plan.strategy(axis, node)
    if summary.op in _SOURCES:
        placement = strategy.outputs[0] if strategy and strategy.outputs else R
        if axis == MICROBATCH_AXIS and placement.is_shard:
            yield f"dim {placement.dim} cut into {size} microbatches"
        elif placement.is_shard and summary.outputs:
            yield f"{placement_words(placement, summary.op)} split: {_local(summary.outputs[0], placement, size)} each"
        elif (stored := plan.storage.get(summary.name)) is not None and stored.axis == axis:
            yield _STORED[stored.level].format(dim=stored.dim)
        else:
            words = placement_words(placement, summary.op)
            yield "whole on every device, the gradient is summed once a step" if words == SUMMED else words
        return
    if strategy is None:
        yield "replicated: every device computes the whole"
        strategy_inputs: tuple[Placement, ...] = (R,) * len(summary.inputs)
    else:
        what = {"-": "replicated", "d": "replicated, summed gradients"}.get(
            strategy.name, f"split over letter {strategy.name}"
        )
        extra = (f", as {strategy.impl}" if strategy.impl else "") + (", divided by the axis size" * strategy.scale)
        ins = " ".join(map(str, strategy.inputs))
        yield f"{what}{extra}: {ins} -> {' '.join(map(str, strategy.outputs))}"
        strategy_inputs = strategy.inputs
    for position, (reference, wanted) in enumerate(zip(summary.inputs, strategy_inputs)):
        maker, _, index = reference.partition("#")
        made_by = plan.strategy(axis, maker)
        given = made_by.outputs[int(index or 0)] if made_by and made_by.outputs else R
        producer = plan.nodes.get(maker)
        differentiable = bool(producer and producer.differentiable)
        done = conversion(given, wanted, differentiable)
        steps = [f"{_WORDS[done.forward]} in forward"] if done.forward in _WORDS else []
        if done.backward in _WORDS and differentiable:
            parameter = producer is not None and producer.op == "param" and done.backward == "all_reduce"
            steps.append(f"{_WORDS[done.backward]} of its gradient" + (" in backward" if not parameter else ""))
        if steps and axis != MICROBATCH_AXIS:
            size_text = f" ({_nbytes(producer, int(index or 0))})" if producer else ""
            yield f"  argument {position} from {maker}{size_text} {given} -> {wanted}: {', '.join(steps)}"


def _local(tensor: str, placement: Placement, size: int) -> str:
    dtype, shape = parse_tensor(tensor)
    local = [extent // size if dim == placement.dim else extent for dim, extent in enumerate(shape)]
    return f"{dtype}[{','.join(map(str, local))}]"


def _nbytes(producer: NodeSummary, index: int) -> str:
    if index >= len(producer.outputs):
        return "?"
    dtype, shape = parse_tensor(producer.outputs[index])
    nbytes = itemsize(dtype)
    for extent in shape:
        nbytes *= extent
    return nbytes_text(nbytes)
