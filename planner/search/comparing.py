"""What makes one plan slower than another, in words with numbers."""

from __future__ import annotations

from collections.abc import Sequence

from shardplan.planner.plan import StagePlan

_LEAST = 0.005
"""Of the faster plan's step: what is less is not named."""
_MOST = 2


def spent(step_seconds: float, stages: Sequence[StagePlan], microbatches: int) -> dict[str, float]:
    """Where the seconds of a step go on the stage that is busy longest; they add up to the step."""
    busy = [microbatches * (s.forward_seconds + s.backward_seconds) + s.once_seconds for s in stages]
    stage = stages[max(range(len(stages)), key=lambda index: busy[index])]
    ops = [sum(seconds[side] for seconds in stage.op_seconds.values()) for side in range(3)]
    found = {
        "computing": microbatches * (ops[0] + ops[1]),
        "recomputing": microbatches * ops[2],
        "messages within the stage": microbatches * sum(stage.communication_seconds),
        "work once a step": stage.once_seconds,
    }
    each = stage.forward_seconds + stage.backward_seconds - sum(ops) - sum(stage.communication_seconds)
    found["launching ops and adding gradients"] = microbatches * max(each, 0.0)
    found["waiting for other stages"] = step_seconds - sum(found.values())
    return found


def causes(mine: dict[str, float], best: dict[str, float]) -> str:
    """Of what the slower plan has more, the largest first; empty where nothing stands out. Both as `spent` gives."""
    step = sum(best.values())
    more = sorted(((mine[name] - best[name], name) for name in mine), reverse=True)
    return ", ".join(f"{seconds * 1e3:.3g} ms more {name}" for seconds, name in more[:_MOST] if seconds > _LEAST * step)
