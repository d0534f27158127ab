"""What memory costs at least, before any column is made: activations are computed again until the rest fits.

Of stage s with q_s microbatches in flight, memory M_s and at least W_s transient bytes, over its segments i:
sum (P_i + q_s a_i) + W_s <= M_s. Divided by q_s and added up over the stages,

    sum_i a_i  <=  sum_s (M_s - W_s) / q_s - P / max q,

with a_i the activations that segment i keeps of a microbatch: at least A_i, or E_i of what enters where it computes
them again, for at least F_i seconds. Least sum F_i under that row is a knapsack; its relaxation takes segments by
rising F_i / (A_i - E_i), the last one in part (`Curve`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Lever:
    """Of one segment and microbatch, from below: A, E, F (inf: not allowed) and transient bytes."""

    kept_nbytes: float
    entering_nbytes: float
    again_seconds: float
    transient_nbytes: float


@dataclass(frozen=True, slots=True)
class Curve:
    """kept_nbytes: sum of A. saved_nbytes: of it, after each further segment that computes again; seconds: that this
    takes. transients: least and most of the segments."""

    kept_nbytes: float
    saved_nbytes: np.ndarray
    seconds: np.ndarray
    transients: tuple[float, float]

    def least(self, parameter_nbytes: float, limit_nbytes: float, flights: Sequence[int]) -> float:
        """Seconds of a microbatch that computing again takes at least, on all stages together; inf: nothing fits.
        flights: microbatches held per stage; parameter_nbytes: of all stages."""
        room = limit_nbytes - self.transients[len(flights) == 1]
        left = room * sum(1.0 / q for q in flights) - parameter_nbytes / max(flights)
        needed = self.kept_nbytes - left
        if needed <= 0:
            return 0.0
        if needed > self.saved_nbytes[-1] * (1 + 1e-9):
            return math.inf
        return float(np.interp(needed, self.saved_nbytes, self.seconds))


def curve(levers: Iterable[Lever]) -> Curve:
    every = list(levers)
    useful = [v for v in every if v.kept_nbytes > v.entering_nbytes and math.isfinite(v.again_seconds)]
    useful.sort(key=lambda v: v.again_seconds / (v.kept_nbytes - v.entering_nbytes))
    saved = np.cumsum([0.0, *(v.kept_nbytes - v.entering_nbytes for v in useful)])
    seconds = np.cumsum([0.0, *(v.again_seconds for v in useful)])
    transients = [v.transient_nbytes for v in every]
    return Curve(sum(v.kept_nbytes for v in every), saved, seconds, (min(transients), max(transients)))
