"""From a plan and what was measured of it to `Evidence`: what the uncorrected model is off by, term by term.

Seconds of ops come from steps in which every op was timed, which takes longer; they are scaled so that a stage's sum is
what its forwards and backwards take untimed. What replaces an op (`rewrite.kernels`) is compared in one sum with the
ops that were predicted and not seen. The terms are then closed against the whole step: messages between stages, or, in
bounds, the rest of a step take up what the simulation of measured instructions leaves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from shardplan.planner.costs.calibration import Evidence, Pair
from shardplan.planner.plan import Plan
from shardplan.planner.reductions import shown_seconds
from shardplan.planner.report.measured import Measured
from shardplan.planner.simulate import StageTimes, messages_of, simulate

COLLECTIVES, GRADIENTS, START = "collectives", "gradients", "start"
_MESSAGE = (0.4, 2.5)
_REST_SHARE = 0.15


def evidence_of(plan: Plan, measured: Measured, stages: Iterable[int] | None = None) -> Evidence:
    """What the measurement says of the devices of some stages (default: all).

    Raises ValueError where the measurement lacks what this needs, or is of other stages than the plan's.
    """
    if not len(plan.stages) == len(measured.ops) == len(measured.computing) == len(measured.phases):
        raise ValueError(f"measured {len(measured.ops)} stages of a plan with {len(plan.stages)}")
    if not all(stage.op_seconds for stage in plan.stages):
        raise ValueError("the plan does not say what it predicts of its ops")
    mine = list(range(len(plan.stages)) if stages is None else stages)
    seen = [_Stage(plan, measured, index) for index in mine]
    message, rest = _closed(plan, measured)
    return Evidence(
        plan.fingerprint,
        f"{plan.degrees()} {plan.schedule}",
        _ops(plan, seen),
        _mean(s.start[0] for s in seen),
        _mean(s.start[1] for s in seen),
        rest,
        _ratio(sum(s.seen("optimizer") for s in seen), sum(s.stage.optimizer_seconds for s in seen), plan, "optimizer"),
        _ratio(sum(s.seen("reduce") for s in seen), sum(s.reduce for s in seen), plan, "reduce"),
        _ratio(sum(s.communicated for s in seen), sum(s.communication for s in seen), plan, "collective"),
        message,
        _memory(plan, measured, mine),
    )


class _Stage:
    """One stage, predicted and measured. ops: class -> measured forward and backward seconds (again included), scaled.
    start: seconds of a forward and of a backward besides its ops and collectives; outside: of collectives, where the
    seconds of its instructions do not contain them."""

    def __init__(self, plan: Plan, measured: Measured, index: int) -> None:
        self.plan, self.stage = plan, plan.stages[index]
        self.phases, self.computing = measured.phases[index], measured.computing[index]
        timed = measured.ops[index]
        collectives = [seconds for name, seconds in timed.items() if name.startswith(COLLECTIVES)]
        self.communicated = sum(map(sum, collectives))
        computed = {name: (s[0], s[1] + s[2]) for name, s in timed.items() if not name.startswith(COLLECTIVES)}
        # Where the thread's time is not known, an instruction's seconds contain its collectives.
        by_clock = self.phases == self.computing
        spoken = [(s[0], s[1] + s[2]) for s in collectives]
        inside = spoken if by_clock else []
        self.outside = (0.0, 0.0) if by_clock else (sum(s[0] for s in spoken), sum(s[1] for s in spoken))
        whole = self.seen("forward"), self.seen("backward") + self.seen("weight")
        scales = []
        for side in range(2):
            total = sum(s[side] for s in (*computed.values(), *inside))
            scale = whole[side] / total if total > 0 else 1.0
            scales.append(scale if not collectives or by_clock else min(scale, 1.0))
        self.ops: dict[str, Pair] = {n: (s[0] * scales[0], s[1] * scales[1]) for n, s in computed.items()}
        start, gradients = self.ops.pop(START, (0.0, 0.0)), self.ops.pop(GRADIENTS, (0.0, 0.0))
        self.start = start[0], start[1] + max(gradients[1] - self.stage.adding_seconds, 0.0)

    def seen(self, phase: str) -> float:
        return self.computing.get(phase, 0.0)

    @property
    def reduce(self) -> float:
        """Predicted seconds of waiting for sums of gradients."""
        return shown_seconds(self.stage, self.plan.overheads.get("step", 0.0))

    @property
    def communication(self) -> float:
        return sum(self.stage.communication_seconds)


def _ops(plan: Plan, stages: list[_Stage]) -> dict[str, Pair]:
    """Class -> measured over predicted."""
    measured: dict[str, list[float]] = {}
    predicted: dict[str, list[float]] = {}
    for stage in stages:
        for name, pair in stage.ops.items():
            _add(measured, name, pair)
        for name, (ahead, back, again) in stage.stage.op_seconds.items():
            used = [plan.calibration.get(f"op {name} {side}", _other(plan, side)) for side in ("forward", "backward")]
            _add(predicted, name, (ahead / used[0], back / used[1] + again / used[0]))
    common = {name for name in measured if name in predicted}
    replaced = _sum(measured, common)
    missed = _sum(predicted, common)
    pooled = _pair(replaced, missed) if any(replaced) else None
    found: dict[str, Pair] = {}
    for name, values in predicted.items():
        if name in common:
            found[name] = _pair(measured[name], values)
        elif pooled is not None:
            found[name] = pooled
    return {name: pair for name, pair in sorted(found.items()) if not all(map(math.isnan, pair))}


def _add(totals: dict[str, list[float]], name: str, pair: Pair) -> None:
    held = totals.setdefault(name, [0.0, 0.0])
    for side in range(2):
        held[side] += pair[side]


def _sum(totals: dict[str, list[float]], without: set[str]) -> list[float]:
    return [sum(values[side] for name, values in totals.items() if name not in without) for side in range(2)]


def _pair(measured: list[float], predicted: list[float]) -> Pair:
    ahead, back = (m / p if p > 0 and m > 0 else math.nan for m, p in zip(measured, predicted, strict=True))
    return ahead, back


def _other(plan: Plan, side: str) -> float:
    return plan.calibration.get(f"op other {side}", 1.0)


def _ratio(measured: float, predicted: float, plan: Plan, factor: str) -> float | None:
    """Measured over what the uncorrected model predicts."""
    return measured / predicted * plan.calibration.get(factor, 1.0) if measured > 0 and predicted > 0 else None


def _mean(values: Iterable[float]) -> float:
    given = list(values)
    return sum(given) / len(given) if given else 0.0


def _memory(plan: Plan, measured: Measured, stages: list[int]) -> float | None:
    ratios = []
    for index in stages if measured.peak_nbytes else ():
        memory = plan.stages[index].memory
        predicted = memory.peak_nbytes - memory.reserve
        peak = max(measured.peak_nbytes[rank] for rank in plan.stages[index].ranks)
        if predicted > 0 and peak > 0:
            ratios.append(peak / predicted)
    return max(ratios, default=None)


def _closed(plan: Plan, measured: Measured) -> tuple[float | None, float]:
    """(Factor on messages between stages, seconds of a step besides its instructions), so that the measured
    instructions make up the measured step."""
    seen = [_Stage(plan, measured, index) for index in range(len(plan.stages))]
    times = [_times(stage) for stage in seen]
    rest = max(stage.seen("rest") for stage in seen)
    used = plan.calibration.get("message", 1.0)

    def step(factor: float) -> float:
        links = messages_of(plan.links)
        slower = {
            pair: link._replace(seconds=link.seconds * factor / used, latency=link.latency * factor / used)
            for pair, link in links.items()
        }
        return simulate(plan.instructions, times, slower).step_seconds

    message = None
    if plan.links:
        low, high = _MESSAGE
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if step(middle) + rest < measured.step_seconds else (low, middle)
        message = low
    left = measured.step_seconds - step(message or 1.0)
    return message, min(max(left, 0.3 * rest), rest + _REST_SHARE * measured.step_seconds)


def _times(stage: _Stage) -> StageTimes:
    """A stage's instructions as measured: computing by its thread, collectives by the clock."""
    weight = stage.seen("weight")
    return StageTimes(
        stage.seen("forward") + stage.outside[0],
        stage.seen("backward") + weight + stage.outside[1],
        weight_seconds=weight,
        reduce_seconds=stage.seen("reduce"),
        optimizer_seconds=stage.seen("optimizer"),
    )
