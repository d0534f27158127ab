"""What the search asks about costs; implemented by `planner.costs` for measured and for described devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import fx

from shardplan.planner.rules.localize import LocalCall


@dataclass(frozen=True, slots=True)
class OpCost:
    """Seconds of one local op on one device, and bytes that it needs while it runs besides operands, results and what
    it keeps. source: "measured", "interpolated" or "modelled"."""

    forward_seconds: float
    backward_seconds: float
    source: str = "modelled"
    forward_scratch: float = 0.0
    backward_scratch: float = 0.0


@dataclass(frozen=True, slots=True)
class OpSaves:
    """What autograd keeps for backward when the op runs.

    inputs / outputs: which tensor arguments and results are kept alive (a tensor kept by several ops counts once).
    extra_nbytes_per_output_byte: bytes kept besides (masks, softmax statistics), relative to the results' bytes, so
    that local shapes scale it.
    """

    inputs: tuple[bool, ...]
    outputs: tuple[bool, ...]
    extra_nbytes_per_output_byte: float = 0.0


@dataclass(frozen=True, slots=True)
class Overheads:
    """What running a stage costs besides its ops, messages and sums.

    forward_seconds, backward_seconds: of every FORWARD and BACKWARD instruction; step_seconds: once a step (inputs,
    zeroing gradients, the loss of the whole batch). reduce: factor on the seconds of gradient reduction; collective: on
    those of collectives inside a stage (messages between stages are corrected where they are priced). memory: factor
    on a stage's peak, what is above 1 is held in reserve. factors: those that measured jobs gave, by name ("op
    aten.linear.default forward"), for the record; jobs: how many there were.
    """

    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    step_seconds: float = 0.0
    reduce: float = 1.0
    collective: float = 1.0
    memory: float = 1.0
    factors: Mapping[str, float] = field(default_factory=dict)
    jobs: int = 0


def coverage_of(costs: Iterable[OpCost]) -> dict[str, float]:
    """Share of the seconds of these ops by source."""
    seconds: dict[str, float] = {}
    for cost in costs:
        seconds[cost.source] = seconds.get(cost.source, 0.0) + cost.forward_seconds + cost.backward_seconds
    whole = sum(seconds.values())
    return {source: part / whole for source, part in seconds.items() if part} if whole else {}


class Costs(Protocol):
    """Prices. Devices are indices into the cluster's device list (= global ranks)."""

    def op(self, call: LocalCall, device: int) -> OpCost:
        """Forward and backward seconds of a local call (backward 0 where nothing needs a gradient)."""
        ...

    def saves(self, node: fx.Node) -> OpSaves:
        """What autograd keeps for this op (depends on op, flags and which arguments need gradients)."""
        ...

    def collective(self, kind: str, nbytes: int, ranks: tuple[int, ...]) -> float:
        """Seconds of one collective among `ranks`.

        kind: "all_reduce" | "all_gather" | "reduce_scatter" | "all_to_all". nbytes: bytes of the *whole* tensor on
        one rank: what is reduced, the gathered result, the input of the scatter, the local input of all-to-all.
        """
        ...

    def p2p(self, nbytes: int, source: int, target: int) -> float:
        """Seconds until `nbytes` sent by one rank have arrived at another."""
        ...

    def slowdown(self, kind: str, ranks: tuple[int, ...]) -> tuple[float, float]:
        """Shares of its speed that compute loses on the first of `ranks` and on the others while a message ("p2p",
        source and target) or a collective goes on beside it."""
        ...

    def copy(self, nbytes: int, device: int) -> float:
        """Seconds to read and write `nbytes` once on the device (slices, pads, gradient accumulation)."""
        ...

    def optimizer(self, nbytes: int, device: int) -> float:
        """Seconds of the optimizer step on one parameter of that many bytes."""
        ...

    def overheads(self, device: int) -> Overheads:
        """What running a stage on the device costs besides."""
        ...
