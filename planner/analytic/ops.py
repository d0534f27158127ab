"""Seconds of the operations of a transformer on one device: matrix products, attention, elementwise traffic."""

from __future__ import annotations

from dataclasses import dataclass

from shardplan.planner.analytic.constants import Architecture, Constants, System, architecture
from shardplan.planner.cluster import DeviceKind


def peak_flops(kind: DeviceKind, precision: str) -> float:
    """Peak of matrix products in a row's precision. fp32: TF32 where there is such, as NVIDIA's containers set it."""
    return kind.peak_flops("tf32" if precision == "fp32" and "tf32" in kind.flops else precision)


@dataclass(frozen=True, slots=True)
class Chip:
    """A device kind at work in one precision. peak: operations per second of matrix products; peak16: of attention,
    which is never in 8 bits. item: bytes of an activation."""

    kind: DeviceKind
    of: Architecture
    system: System
    imbalance: float
    expert_cast_seconds: float
    precision: str
    peak: float
    peak16: float
    item: int

    @staticmethod
    def of_kind(kind: DeviceKind, precision: str, zero: int, constants: Constants) -> Chip:
        item = 4 if precision == "fp32" else 2
        peak = peak_flops(kind, precision)
        peak16 = peak_flops(kind, "bf16") if precision == "fp8" else peak
        of = constants.architectures[architecture(kind)]
        system, cast = constants.system(zero, kind), constants.expert_cast_seconds
        return Chip(kind, of, system, constants.imbalance, cast, precision, peak, peak16, item)

    def product(self, m: float, n: float, k: float, count: float = 1.0, high: bool = False) -> float:
        """`count` products of [m, k] and [k, n], run as one grouped kernel. high: in 16 bits even under fp8.

        Arithmetic at the speed that such a shape reaches, or its traffic, whichever is longer.
        """
        if min(m, n, k, count) <= 0:
            return 0.0
        of, fp8 = self.of, self.precision == "fp8" and not high
        reach = (of.math_fp8 if fp8 else of.math) / (1 + of.half_m / m + of.half_n / n + of.half_k / k)
        reach *= of.grouped if count > 1 else 1.0
        arithmetic = 2.0 * m * n * k * count / ((self.peak if fp8 else self.peak16) * reach)
        item = 1 if fp8 else self.item
        moved = (item * (m * k + k * n) + self.item * m * n) * count
        # Casting to 8 bits reads and writes the operand once more.
        casting = self._moving(3.0 * m * k * count) if fp8 else 0.0
        if fp8 and count > 1:
            casting += self.expert_cast_seconds * count
        return max(arithmetic, self._moving(moved)) + casting + of.launch_seconds

    def traffic(self, nbytes: float) -> float:
        """An elementwise kernel that reads and writes so many bytes."""
        return self._moving(nbytes) + self.of.launch_seconds if nbytes > 0 else 0.0

    def _moving(self, nbytes: float) -> float:
        return nbytes / (self.kind.memory_bytes_per_s * self.of.traffic)

    def attention(self, batch: float, heads: float, queries: float, keys: float, dim: float, flash: bool) -> float:
        """Forward of causal attention, without its projections."""
        if flash:
            work = 2.0 * batch * heads * queries * keys * dim  # two products, half of each masked
            return self._fused(work, self.of.attention, keys, dim)
        scores = batch * heads * queries * keys
        products = 2 * self._batched(batch * heads, queries, keys, dim)
        # Scaled and masked softmax, dropout with its mask.
        return products + self.traffic(2 * self.item * scores) + self.traffic((2 * self.item + 1) * scores)

    def attention_backward(
        self, batch: float, heads: float, queries: float, keys: float, dim: float, flash: bool
    ) -> float:
        """Backward of the same: five products instead of two where it is fused (scores are made again), else four."""
        if flash:
            work = 5.0 * batch * heads * queries * keys * dim
            return self._fused(work, self.of.attention_backward, keys, dim)
        scores = batch * heads * queries * keys
        products = 4 * self._batched(batch * heads, queries, keys, dim)
        return products + self.traffic(3 * self.item * scores) + self.traffic((2 * self.item + 1) * scores)

    def _fused(self, work: float, reach: float, keys: float, dim: float) -> float:
        """Fused attention; heads narrower than 128 fill the units less (64: nine tenths)."""
        reach *= min(1.0, 1.125 * dim / (dim + 16)) / (1 + self.of.half_seq / keys)
        reach *= self.of.eager if self.system.eager else 1.0
        return work / (self.peak16 * reach) + self.of.launch_seconds

    def _batched(self, count: float, queries: float, keys: float, dim: float) -> float:
        """One batched product with [queries, keys] scores on one side."""
        of = self.of
        reach = of.math / (1 + of.half_m / queries + of.half_n / keys + of.half_k / dim)
        arithmetic = 2.0 * count * queries * keys * dim / (self.peak16 * reach)
        return (
            max(arithmetic, self._moving(self.item * count * (queries * keys + 2 * queries * dim))) + of.launch_seconds
        )
