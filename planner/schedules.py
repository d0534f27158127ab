"""Pipeline schedules as instruction lists.

A schedule is made in two steps. `compute_order` says in which order a stage runs its forwards and backwards; `weave`
puts the messages in: sends right after the compute that makes the value, receives posted one compute ahead of the one
that needs them, so that

* between an ordered pair of stages both sides list the same messages in the same order;
* a receive is posted before its position can block on anything of that time, so that the list finishes even where a
  send completes only once its receive is posted (`planner.simulate.check` proves it for every list).

Gradients of a skip edge over ``d`` stages come ``d - 1`` backwards before they are used: the far stage runs ahead by
that much. Their receives are posted as early, or the far stage could wait in its send for a stage that itself waits to
send to it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache

from shardplan.errors import NotSupported, UsageError
from shardplan.planner.instructions import Instruction, Op, Schedule

KINDS = ("gpipe", "1f1b")
_LATER = ("interleaved", "zb")
_BACKWARDS = (Op.BACKWARD, Op.BACKWARD_INPUT)

Edge = tuple[int, int]
"""(source stage, target stage) of an activation; source < target."""


def build(
    kind: str,
    stages: int,
    microbatches: int,
    edges: Collection[Edge],
    training: bool = True,
    grad_edges: Collection[Edge] | None = None,
) -> Schedule:
    """The instruction list of a step, one line per stage (stage s is position s).

    kind: "gpipe" or "1f1b"; without training both are the same list of forwards. edges: which stages send activations
    to which, skip edges included; a message carries every tensor of one microbatch between two stages. grad_edges:
    those whose gradients go back (target to source), default all. In training every stage ends with ``REDUCE_GRADS``
    and ``OPTIMIZER_STEP``.

    Raises UsageError on a kind, count or edge that makes no sense, NotSupported on a schedule of a later version.
    """
    if kind in _LATER:
        raise NotSupported(f"schedule {kind!r} is not available yet", hints=[f"use one of {', '.join(KINDS)}"])
    if kind not in KINDS:
        raise UsageError(f"unknown schedule {kind!r}", hints=[f"use one of {', '.join(KINDS)}"])
    if stages < 1 or microbatches < 1:
        raise UsageError(f"a schedule needs a stage and a microbatch, not {stages} and {microbatches}")
    wrong = sorted(edge for edge in edges if not 0 <= edge[0] < edge[1] < stages)
    if wrong:
        raise UsageError(f"activations go to later stages of {stages}, not along {wrong}")
    if grad_edges is not None and not set(grad_edges) <= set(edges):
        raise UsageError(f"gradients without activations: {sorted(set(grad_edges) - set(edges))}")
    back = frozenset(edges if grad_edges is None else grad_edges) if training else frozenset[Edge]()
    return _build(kind, stages, microbatches, frozenset(edges), training, back)


@lru_cache(maxsize=32)
def _build(
    kind: str, stages: int, microbatches: int, edges: frozenset[Edge], training: bool, grad_edges: frozenset[Edge]
) -> Schedule:
    lines = []
    for stage in range(stages):
        line = weave(compute_order(kind, stage, stages, microbatches, training), edges, grad_edges)
        if training:
            line += (Instruction(Op.REDUCE_GRADS, stage), Instruction(Op.OPTIMIZER_STEP, stage))
        lines.append(line)
    return tuple(lines)


def in_flight(kind: str, stage: int, stages: int, microbatches: int) -> int:
    """Most microbatches whose activations a stage holds at once in training."""
    return microbatches if kind == "gpipe" else min(microbatches, stages - stage)


def compute_order(kind: str, stage: int, stages: int, microbatches: int, training: bool) -> tuple[Instruction, ...]:
    """Forwards and backwards of one stage, without messages.

    "1f1b" (Narayanan et al. 2019, PipeDream-flush): ``stages - 1 - stage`` forwards ahead, then one forward and one
    backward in turn, then the backwards that are left. "gpipe" (Huang et al. 2019): all forwards, all backwards.
    """
    forwards = [Instruction(Op.FORWARD, stage, microbatch) for microbatch in range(microbatches)]
    if not training:
        return tuple(forwards)
    backwards = [Instruction(Op.BACKWARD, stage, microbatch) for microbatch in range(microbatches)]
    ahead = microbatches if kind == "gpipe" else min(microbatches, stages - 1 - stage)
    order = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards):
        order += (forward, backward)
    return (*order, *backwards[microbatches - ahead :])


def weave(
    computes: Sequence[Instruction], edges: Iterable[Edge], grad_edges: Iterable[Edge]
) -> tuple[Instruction, ...]:
    """Puts the messages of a position into the order of its computes (of one or more stages). See module docstring."""
    sources: dict[int, list[int]] = {}
    targets: dict[int, list[int]] = {}
    for source, target in sorted(edges):
        sources.setdefault(target, []).append(source)
        targets.setdefault(source, []).append(target)
    grad_sources: dict[int, list[int]] = {}
    grad_targets: dict[int, list[int]] = {}
    for source, target in sorted(grad_edges):
        grad_sources.setdefault(source, []).append(target)
        grad_targets.setdefault(target, []).insert(0, source)

    posts: list[list[Instruction]] = [[] for _ in computes]
    seen: dict[int, list[int]] = {}
    for index, compute in enumerate(computes):
        stage, microbatch = compute.stage, compute.microbatch
        if compute.op is Op.FORWARD:
            for peer in sources.get(stage, ()):
                posts[max(index - 1, 0)].append(Instruction(Op.RECV_ACT, stage, microbatch, peer))
        elif compute.op in _BACKWARDS:
            backwards = seen.setdefault(stage, [])
            backwards.append(index)
            for peer in grad_sources.get(stage, ()):
                early = max(peer - stage - 1, 1)
                slot = backwards[max(len(backwards) - early, 0)]
                posts[max(slot - 1, 0)].append(Instruction(Op.RECV_GRAD, stage, microbatch, peer))

    line: list[Instruction] = []
    for compute, posted in zip(computes, posts, strict=True):
        stage, microbatch = compute.stage, compute.microbatch
        line += posted
        line.append(compute)
        # The nearest stage first: it is the next to need the value.
        if compute.op is Op.FORWARD:
            line += (Instruction(Op.SEND_ACT, stage, microbatch, peer) for peer in targets.get(stage, ()))
        elif compute.op in _BACKWARDS:
            line += (Instruction(Op.SEND_GRAD, stage, microbatch, peer) for peer in grad_targets.get(stage, ()))
    return tuple(line)
