"""The op-level problem as plain data: what the integer program and its brute-force check read.

Sets        ops o (parameters included) with options k in K(o); values v = (o, r): result r of op o.
Data        cost[o,k]: price of running o by option k; state[o,k,r]: the state in which it leaves result r;
            need[o,k]: pairs (value, state) that option k reads; price[v,s,t]: price of converting v from s to t.
Choice      one option per op. A value is converted once to each state that somebody needs it in.

Prices are vectors (`Price`); an objective is their weighted sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Price:
    """forward_seconds, backward_seconds: per microbatch. once_seconds: per step. parameter_nbytes: parameters with
    gradients and optimizer state; activation_nbytes: kept per microbatch; transient_nbytes: while it runs.
    regather_seconds: of backward, where it does not run the forward again (which then has them); gathered_nbytes: held
    while the whole segment runs, other than transient ones it adds up. A column's price has the former in
    backward_seconds; its transient_nbytes contain its gathered_nbytes, of which activations are part where it computes
    them again.
    """

    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    once_seconds: float = 0.0
    parameter_nbytes: float = 0.0
    activation_nbytes: float = 0.0
    transient_nbytes: float = 0.0
    regather_seconds: float = 0.0
    gathered_nbytes: float = 0.0

    def __add__(self, other: Price) -> Price:
        return Price(
            self.forward_seconds + other.forward_seconds,
            self.backward_seconds + other.backward_seconds,
            self.once_seconds + other.once_seconds,
            self.parameter_nbytes + other.parameter_nbytes,
            self.activation_nbytes + other.activation_nbytes,
            max(self.transient_nbytes, other.transient_nbytes),
            self.regather_seconds + other.regather_seconds,
            self.gathered_nbytes + other.gathered_nbytes,
        )

    def vector(self) -> tuple[float, ...]:
        """What adds up (all but transient bytes)."""
        return (
            self.forward_seconds,
            self.backward_seconds,
            self.once_seconds,
            self.parameter_nbytes,
            self.activation_nbytes,
            self.regather_seconds,
            self.gathered_nbytes,
        )

    @property
    def seconds(self) -> float:
        """Per microbatch, forward and backward."""
        return self.forward_seconds + self.backward_seconds


@dataclass(frozen=True, slots=True)
class Weights:
    """Objective: forward * forward_seconds + backward_seconds + once * once_seconds
    + nbytes * (parameter_nbytes + in_flight * activation_nbytes + gathered * gathered_nbytes). forward: 2 where
    backward computes it again; where it does not, regather_seconds count as well."""

    once: float = 0.0
    nbytes: float = 0.0
    in_flight: float = 1.0
    forward: float = 1.0
    gathered: float = 0.0

    def of(self, price: Price) -> float:
        held = price.parameter_nbytes + self.in_flight * price.activation_nbytes
        held += self.gathered * price.gathered_nbytes
        seconds = self.forward * price.forward_seconds + price.backward_seconds
        seconds += self._regather() * price.regather_seconds
        return seconds + self.once * price.once_seconds + self.nbytes * held

    def vector(self) -> tuple[float, ...]:
        """Factors of what `Price.vector` gives."""
        held = self.nbytes, self.nbytes * self.in_flight
        return self.forward, 1.0, self.once, *held, self._regather(), self.nbytes * self.gathered

    def again(self) -> Weights:
        """The same where activations are computed again: what they take is then held while the segment runs."""
        return replace(self, forward=2.0, in_flight=self.gathered)

    def _regather(self) -> float:
        return 1.0 if self.forward == 1.0 else 0.0


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
    -> Price; a triple that is missing is impossible, equal states are free. states: names, for people.

    The tensors at the two ends lie in one of several layouts, which others decide: enter is the op (-1: none) whose
    option number is the layout of what comes in; leave is (value, its states by layout), or None.
    """

    names: tuple[str, ...]
    ops: tuple[tuple[Option, ...], ...]
    conversions: Mapping[tuple[Value, int, int], Price]
    states: tuple[str, ...]
    enter: int = -1
    leave: tuple[Value, tuple[int, ...]] | None = None

    @property
    def ends(self) -> tuple[int, int]:
        """Number of layouts of what enters and of what leaves."""
        return len(self.ops[self.enter]) if self.enter >= 0 else 1, len(self.leave[1]) if self.leave else 1

    def between(self, enters: int, leaves: int) -> tuple[SegmentProblem, tuple[tuple[int, ...], ...]]:
        """The problem with its ends fixed, and per op the options that are left (their numbers here)."""
        kept = [tuple(range(len(options))) for options in self.ops]
        if self.enter >= 0:
            kept[self.enter] = (enters,)
        if self.leave is not None:
            (op, result), states = self.leave
            wanted = states[leaves]
            kept[op] = tuple(k for k in kept[op] if self.ops[op][k].states[result] == wanted)
        ops = tuple(tuple(o[k] for k in keep) for o, keep in zip(self.ops, kept, strict=True))
        return replace(self, ops=ops, enter=-1, leave=None), tuple(kept)

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
