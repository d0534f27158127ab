"""Bytes that are alive while a segment runs, op by op, forward and backward.

A stage's code releases a value after its last reader; autograd keeps what it saved (`search.memory`) until the backward
of the op that saved it; a gradient lives from the first backward that makes it until the op that made the value has run
backwards. A view is the memory that it looks at. Values that lie differently from how an op reads them are converted
once: a tensor of its own. Sizes are those of one rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import fx

from shardplan.planner.costs.roofline import is_view
from shardplan.planner.memory_curve import block
from shardplan.planner.placement import D, Placement, R
from shardplan.planner.propagate import placed
from shardplan.planner.rules import LocalCall, Strategy, local_call
from shardplan.planner.search.memory import Keeps, copies, root
from shardplan.planner.trace import is_tensor, mutated, needs_grad, resolve, tensor_args

if TYPE_CHECKING:
    from shardplan.planner.search.columns import Columns

aten = torch.ops.aten
_TWO_IN_ONE = {aten.cross_entropy_loss.default, aten.binary_cross_entropy_with_logits.default}
"""Ops that autograd takes apart: between their parts lies a gradient as large as the first argument."""
_PASS_GRADIENTS_ON = {aten.add.Tensor, aten.clone.default, aten.contiguous.default}
Key = tuple[fx.Node, int, Placement | None]
"""Memory of a result; or, with a placement, of its conversion."""


@dataclass(frozen=True, slots=True)
class SegmentBytes:
    """kept: from the end of a microbatch's forward to its backward. forward: the most in the forward above what was
    there before. first: the most in the first microbatch's backward, kept and its own gradients of parameters included,
    but for those that have their place elsewhere (buckets); later: the same with all of them elsewhere. gradients: of
    its parameters, as in first."""

    kept: float = 0.0
    forward: float = 0.0
    first: float = 0.0
    later: float = 0.0
    gradients: float = 0.0


@dataclass(slots=True)
class _Step:
    """One op. made: memory that it takes for results and conversions; read: memory that it looks at; saved: what its
    backward needs; extra: bytes that autograd keeps besides; gradients: of arguments, (key, bytes, whether it is the
    result's gradient itself); parameters: of gradients of parameters, moved: of those that are moved to a bucket;
    scratch: bytes that its forward and its backward need besides."""

    made: dict[Key, float] = field(default_factory=dict)
    read: set[Key] = field(default_factory=set)
    saved: set[Key] = field(default_factory=set)
    extra: float = 0.0
    results: tuple[Key, ...] = ()
    gradients: list[tuple[Key, float, bool]] = field(default_factory=list)
    parameters: float = 0.0
    moved: float = 0.0
    scratch: tuple[float, float] = (0.0, 0.0)


def segment_bytes(
    columns: Columns,
    nodes: Iterable[fx.Node],
    chosen: Mapping[str, Strategy],
    recomputed: bool,
    bucketed: Collection[fx.Node] = (),
    arriving: bool = False,
    cuda: bool = False,
) -> SegmentBytes:
    """nodes: the segment's ops in order; chosen: tp strategies by node; recomputed: whether its forward runs again in
    backward; bucketed: parameters whose gradients are moved to a place of their own; arriving: whether the gradients of
    its results are messages, which are not counted here; cuda: whether tensors take whole blocks."""
    steps, entering = _steps(columns, list(nodes), chosen, bucketed, cuda)
    if not columns.training:
        return SegmentBytes(0.0, _forward(steps, entering, columns.keeps, False)[1])
    kept, forward = _forward(steps, entering, columns.keeps, True)
    first, later, gradients = _backward(steps, kept, arriving)
    if not recomputed:
        return SegmentBytes(kept, forward, first, later, gradients)
    held, once = _forward(steps, entering, columns.keeps, False)
    # What enters is kept where the segments before do not.
    held += sum(nbytes for key, nbytes in entering.items() if not columns.keeps.is_kept(*key[:2]))
    return SegmentBytes(held, once, max(forward, first), max(forward, later), gradients)


def _steps(
    columns: Columns, nodes: list[fx.Node], chosen: Mapping[str, Strategy], bucketed: Collection[fx.Node], cuda: bool
) -> tuple[list[_Step], dict[Key, float]]:
    trace, keeps = columns.trace, columns.keeps
    inside = set(nodes)
    sizes: dict[Key, float] = {}
    entering: dict[Key, float] = {}
    steps = []
    for node in nodes:
        call = local_call(node, columns.chosen(node, chosen.get(node.name)), columns.mesh)
        step = _Step()
        strategy = chosen.get(node.name)
        saves = keeps.saves_of(node)
        for position, argument in enumerate(tensor_args(node)):
            if not is_tensor(argument):
                continue
            maker, index = root(argument)
            key: Key = (maker, index, None)
            source = trace.sources.get(maker.name)
            nbytes = block(call.inputs[position].nbytes, cuda)
            wanted = placed_input(strategy, position)
            lies = placed(chosen.get(resolve(argument)[0].name), resolve(argument)[1])
            if wanted not in (lies, D) and lies != D and (wanted.is_shard or lies != R):
                key = maker, index, wanted
                if key not in sizes:
                    step.made[key] = nbytes
            elif source is not None:
                if needs_grad(argument) and source.kind == "param" and maker in bucketed:
                    step.moved += nbytes
                elif needs_grad(argument) and source.kind == "param":
                    step.parameters += nbytes
                continue
            elif maker not in inside and key not in sizes and maker.op == "call_function":
                whole = columns.local_nbytes(_value(maker, index), placed(chosen.get(maker.name), index))
                entering[key] = block(whole, cuda)
            sizes.setdefault(key, nbytes)
            step.read.add(key)
            if columns.training and saves is not None and position < len(saves.inputs) and saves.inputs[position]:
                step.saved.add(key)
            if needs_grad(argument) and columns.training:
                step.gradients.append((key, nbytes, node.target in _PASS_GRADIENTS_ON))
        cost = columns.costs.op(call, 0)
        step.scratch = cost.forward_scratch, cost.backward_scratch
        if node.target in _TWO_IN_ONE and step.gradients and cost.source != "measured":
            step.scratch = step.scratch[0], step.gradients[0][1]
        _results(step, node, call, sizes, columns, cuda)
        steps.append(step)
    return steps, entering


def _results(
    step: _Step, node: fx.Node, call: LocalCall, sizes: dict[Key, float], columns: Columns, cuda: bool
) -> None:
    saves = columns.keeps.saves_of(node)
    looks = (is_view(node.target) and not copies(node)) or mutated(node)
    if looks:
        maker, index = root(node) if is_tensor(node) else (node, 0)
        step.results = ((maker, index, None),)
        return
    found = []
    for position, result in enumerate(call.outputs):
        key: Key = (node, position, None)
        found.append(key)
        sizes[key] = step.made[key] = block(result.nbytes, cuda)
        if columns.training and saves is not None and position < len(saves.outputs) and saves.outputs[position]:
            step.saved.add(key)
    step.results = tuple(found)
    if columns.training:
        step.extra = columns.keeps.extra_of(node, call)


def placed_input(strategy: Strategy | None, position: int) -> Placement:
    """Placement in which a strategy (None: replicated) reads an argument."""
    return R if strategy is None or position >= len(strategy.inputs) else strategy.inputs[position]


def _value(node: fx.Node, position: int) -> fx.Node:
    """The node that stands for a result."""
    if is_tensor(node):
        return node
    return next((user for user in node.users if resolve(user) == (node, position)), node)


def _forward(steps: list[_Step], entering: Mapping[Key, float], keeps: Keeps, keeping: bool) -> tuple[float, float]:
    """(Bytes kept behind, the most above what was there before). keeping: else only what leaves is kept."""
    last = {key: index for index, step in enumerate(steps) for key in (*step.read, *step.made)}
    leaving = set(steps[-1].results) if steps else set()
    saved = {key for step in steps for key in step.saved if key[2] is not None} if keeping else set()
    saved |= {
        k for step in steps for k in step.made if k[2] is None and keeps.is_kept(*k[:2]) and (keeping or k in leaving)
    }
    # What enters and is kept belongs to the segment, or the message, that brought it.
    alive = {key: nbytes for key, nbytes in entering.items() if not keeps.is_kept(*key[:2])}
    extra = most = 0.0
    for index, step in enumerate(steps):
        alive |= step.made
        extra += step.extra if keeping else 0.0
        most = max(most, sum(alive.values()) + extra + step.scratch[0])
        for key in [k for k in alive if last.get(k, -1) <= index and k not in saved and k not in leaving]:
            del alive[key]
    return sum(nbytes for key, nbytes in alive.items() if key in saved) + extra, most


def _backward(steps: list[_Step], kept: float, arriving: bool) -> tuple[float, float, float]:
    """(Most with gradients of parameters as they appear, most without them, their sum), buckets aside."""
    holders: dict[Key, int] = {}
    for index, step in enumerate(steps):
        for key in step.saved:
            holders.setdefault(key, index)  # the first op that saved it is the last that needs it
    sizes = {key: nbytes for step in steps for key, nbytes in step.made.items()}
    alive = kept
    gradients: dict[Key, float] = {}
    parameters = first = later = 0.0
    if steps:
        for key in steps[-1].results:
            gradients[key] = sizes.get(key, 0.0)
    messages = set(gradients) if arriving else set()
    for index in reversed(range(len(steps))):
        step = steps[index]
        mine = [key for key in step.results if key in step.made]
        incoming = sum(gradients.get(key, 0.0) for key in mine)
        made: dict[Key, float] = {}
        for key, nbytes, same in step.gradients:
            if key in step.results:
                continue  # a view: its gradient is one of what it looks at
            made[key] = 0.0 if same and key not in gradients and incoming >= nbytes else nbytes
        held = sum(nbytes for key, nbytes in gradients.items() if key not in messages)
        new = sum(made.values()) + step.scratch[1] + step.moved
        parameters += step.parameters
        first = max(first, alive + held + new + parameters)
        later = max(later, alive + held + new + step.parameters)
        for key, nbytes in made.items():
            if key not in gradients:
                passed = incoming if nbytes == 0.0 else nbytes
                gradients[key] = passed
                if nbytes == 0.0 and messages.intersection(mine):
                    messages.add(key)
                incoming -= passed if nbytes == 0.0 else 0.0
        for key in mine:
            gradients.pop(key, None)
        alive -= sum(sizes.get(key, 0.0) for key, holder in holders.items() if holder == index) + step.extra
    return first, later, parameters


def stage_bytes(segments: Iterable[SegmentBytes]) -> SegmentBytes:
    """Of a stage that runs segments one after another."""
    given = list(segments)
    before = 0.0
    behind = sum(s.gradients for s in given)
    gradients = behind
    forward = first = later = 0.0
    for segment in given:
        behind -= segment.gradients
        forward = max(forward, before + segment.forward)
        first = max(first, before + behind + segment.first)
        later = max(later, before + segment.later)
        before += segment.kept
    return SegmentBytes(before, forward, first, later, gradients)
