"""What a run measured, in the form that the report sets beside the prediction."""

from __future__ import annotations

from dataclasses import dataclass

from shardplan.planner.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Measured:
    """Medians over `steps` training steps after warm-up.

    step_seconds: wall time of a step, the slowest rank's. stage_seconds: per stage, seconds of a step in which it
    computes (forwards, backwards, reduction, optimizer), waiting left out; empty if not taken.
    peak_nbytes: per device by rank, above what the process held before the model was loaded; empty if not taken.
    phases: per stage, seconds of "forward", "backward" and "weight" per microbatch, "reduce", "optimizer", "wait" (for
    messages) and "rest" (besides instructions) per step; computing: the same, of the time in which its thread computed
    where that is known. ops: per stage, class of ops or collective -> seconds of a microbatch: forward, backward, and
    forward again in backward.
    single_device_seconds: the same step on one device, None if not taken. timeline: of one step, on the clock of the
    first rank.
    """

    step_seconds: float
    stage_seconds: tuple[float, ...] = ()
    peak_nbytes: tuple[int, ...] = ()
    single_device_seconds: float | None = None
    steps: int = 1
    timeline: Timeline | None = None
    phases: tuple[dict[str, float], ...] = ()
    computing: tuple[dict[str, float], ...] = ()
    ops: tuple[dict[str, tuple[float, float, float]], ...] = ()

    def __post_init__(self) -> None:
        if self.step_seconds <= 0 or self.steps < 1:
            raise ValueError(f"a measurement needs steps and time, not {self.steps} steps in {self.step_seconds} s")
