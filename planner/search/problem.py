"""The op-level problem as plain data: what the integer program and its brute-force check read.

Sets        ops o (parameters included) with options k in K(o); values v = (o, r): result r of op o.
Data        cost[o,k]: price of running o by option k; state[o,k,r]: the state in which it leaves result r;
            need[o,k]: pairs (value, state) that option k reads; price[v,s,t]: price of converting v from s to t.
Choice      one option per op. A value is converted once to each state that somebody needs it in.

Prices are vectors (`Price`); an objective is their weighted sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Price:
    """forward_seconds, backward_seconds: per microbatch. once_seconds: per step. parameter_nbytes: parameters with
    gradients and optimizer state; activation_nbytes: kept per microbatch; transient_nbytes: while it runs."""

    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    once_seconds: float = 0.0
    parameter_nbytes: float = 0.0
    activation_nbytes: float = 0.0
    transient_nbytes: float = 0.0

    def __add__(self, other: Price) -> Price:
        return Price(
            self.forward_seconds + other.forward_seconds,
            self.backward_seconds + other.backward_seconds,
            self.once_seconds + other.once_seconds,
            self.parameter_nbytes + other.parameter_nbytes,
            self.activation_nbytes + other.activation_nbytes,
            max(self.transient_nbytes, other.transient_nbytes),
        )

    @property
    def seconds(self) -> float:
        """Per microbatch, forward and backward."""
        return self.forward_seconds + self.backward_seconds


@dataclass(frozen=True, slots=True)
class Weights:
    """Objective: seconds + once * once_seconds + nbytes * (parameter_nbytes + in_flight * activation_nbytes)."""

    once: float = 0.0
    nbytes: float = 0.0
    in_flight: float = 1.0

    def of(self, price: Price) -> float:
        held = price.parameter_nbytes + self.in_flight * price.activation_nbytes
        return price.seconds + self.once * price.once_seconds + self.nbytes * held


Value = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run an op. states: of its results, as indices into `SegmentProblem.states`; needs: what it reads."""

    price: Price
    states: tuple[int, ...]
    needs: tuple[tuple[Value, int], ...]
    label: str = ""


@dataclass(frozen=True, slots=True)
class SegmentProblem:
    """ops: options per op, in an order in which values are made before they are read. conversions: (value, from, to)
    -> Price; a triple that is missing is impossible, equal states are free. states: names, for people."""

    names: tuple[str, ...]
    ops: tuple[tuple[Option, ...], ...]
    conversions: Mapping[tuple[Value, int, int], Price]
    states: tuple[str, ...]

    def convert(self, value: Value, source: int, target: int) -> Price | None:
        """Price of a conversion, or None where there is none."""
        return _FREE if source == target else self.conversions.get((value, source, target))


_FREE = Price()


def total_price(problem: SegmentProblem, choice: Sequence[int]) -> Price | None:
    """Price of a whole choice, recomputed from the data alone. None where a needed conversion does not exist."""
    total = Price()
    needed: set[tuple[Value, int]] = set()
    for options, k in zip(problem.ops, choice, strict=True):
        total += options[k].price
        needed.update(options[k].needs)
    for value, target in sorted(needed):
        source = problem.ops[value[0]][choice[value[0]]].states[value[1]]
        price = problem.convert(value, source, target)
        if price is None:
            return None
        total += price
    return total
