"""When gradients are summed over ranks: in buckets, while the last microbatch's backward goes on.

`spread` says for a stage at which share of that backward a bucket is complete and how long its sum takes;
`planner.simulate` lays the sums end to end behind these moments, as the runtime does (`runtime.reduction`).
`bucket_nbytes` chooses how much is summed at a time: large buckets pay the latency of a link less often, but the last
one is summed when backward is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from shardplan.planner.plan import BUCKET_NBYTES, StagePlan
from shardplan.planner.simulate import Reductions, StageTimes

_MOST = 64  # sums that are simulated by themselves; neighbours of more are taken together
_SIZES = tuple(1 << power for power in range(20, 29))
_WORTH = 0.01


def times_of(stage: StagePlan, activation_nbytes: int = 0, fixed_nbytes: int = 0) -> StageTimes:
    """What the simulator has to know of a stage. The part of once_seconds that is not known to overlap follows."""
    summed = sum(seconds for _, seconds in stage.reductions)
    return StageTimes(
        stage.forward_seconds,
        stage.backward_seconds,
        min(stage.weight_seconds, stage.backward_seconds),
        reduce_seconds=max(stage.once_seconds - summed, 0.0),
        reductions=stage.reductions,
        reducing=stage.reducing,
        activation_nbytes=activation_nbytes,
        fixed_nbytes=fixed_nbytes,
    )


def shown_seconds(stage: StagePlan, besides: float = 0.0) -> float:
    """Seconds of a stage's ``REDUCE_GRADS``: of the sums what does not hide behind backward. besides: seconds of its
    once_seconds that are neither sums nor the optimizer's."""
    backward, done = times_of(stage).summed(0.0, stage.backward_seconds)
    summed = sum(seconds for _, seconds in stage.reductions)
    return done - min(backward, done) + max(stage.once_seconds - stage.optimizer_seconds - besides - summed, 0.0)


def goes_alone(nbytes: float, bucket: float) -> bool:
    """Whether a gradient of that size is summed by itself, where it is, and not moved to a bucket with others."""
    return 4 * nbytes >= bucket


def spread(segments: Sequence[tuple[float, float, float]], nbytes: int) -> Reductions:
    """(backward seconds, seconds of summing its gradients, their bytes) per segment in the order of the forward ->
    (share of the backward, seconds of the sum) per bucket, in the order in which they are summed.

    A segment's gradients become final evenly over its backward.
    """
    whole = sum(backward for backward, _, _ in segments)
    total = sum(size for _, _, size in segments)
    if total <= 0:
        return ()
    count = min(max(round(total / nbytes), 1), _MOST)
    step = total / count
    found: list[tuple[float, float]] = []
    elapsed = held = seconds = 0.0
    for backward, summing, size in reversed(segments):
        left = size
        while left > 0:
            part = min(left, step - held)
            left -= part
            held += part
            seconds += summing * part / size
            if held >= step * (1 - 1e-9):
                done = elapsed + backward * (1 - left / size)
                found.append((min(done / whole, 1.0) if whole > 0 else 1.0, seconds))
                held = seconds = 0.0
        elapsed += backward
    if seconds > 0:
        found.append((1.0, seconds))
    return tuple(found)


def bucket_nbytes(stages: Iterable[tuple[float, float]], collective: Callable[[int], float]) -> int:
    """The bucket size with which the slowest stage's sums end first, the usual one unless another is clearly better.

    stages: (bytes of gradients to be summed, seconds of the last backward). collective: bytes -> seconds of a sum.
    """
    held = [(nbytes, backward) for nbytes, backward in stages if nbytes > 0]
    if not held:
        return BUCKET_NBYTES

    def end(size: int) -> float:
        def one(nbytes: float, backward: float) -> float:
            count = max(round(nbytes / size), 1)
            each = collective(round(nbytes / count))
            return max(backward + each, backward / count + count * each)

        return max(one(*stage) for stage in held)

    usual = end(BUCKET_NBYTES)
    best = min(_SIZES, key=lambda size: (end(size), -size))
    return best if end(best) < (1 - _WORTH) * usual else BUCKET_NBYTES
