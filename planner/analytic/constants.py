"""What real GPUs and real training systems make of their data sheets: the fitted numbers of the analytic model.

Fitted by ``benchmarks/published.py --fit`` to published training throughput, on top of curves of shape that were fitted
to published operator timings. A constant belongs to an architecture or to all of them; none belongs to a row, a model
or a publication.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shardplan.planner.cluster import DeviceKind


@dataclass(frozen=True, slots=True)
class Architecture:
    """math: share of the 16-bit peak that large matrix products reach. math_fp8: of the 8-bit peak.

    half_m, half_n, half_k: size of a dim at which a product reaches half of that. attention: share of the peak that
    fused attention reaches in forward, attention_backward in backward, both for long sequences (causal work counted
    half); half_seq: sequence length at which they reach half. traffic: share of the memory bandwidth that elementwise
    kernels reach. launch_seconds: of one kernel.
    """

    math: float
    math_fp8: float
    half_m: float
    half_n: float
    half_k: float
    attention: float
    attention_backward: float
    half_seq: float
    traffic: float
    launch_seconds: float


ARCHITECTURES: dict[str, Architecture] = {
    "volta": Architecture(0.66, 0.66, 60, 60, 60, 0.40, 0.30, 512, 0.78, 8e-6),
    "ampere": Architecture(0.80, 0.80, 60, 60, 90, 0.50, 0.42, 512, 0.75, 6e-6),
    "ada": Architecture(0.70, 0.60, 60, 60, 90, 0.45, 0.38, 512, 0.75, 6e-6),
    "hopper": Architecture(0.70, 0.58, 120, 120, 180, 0.50, 0.42, 700, 0.72, 6e-6),
    "blackwell": Architecture(0.68, 0.55, 200, 200, 300, 0.50, 0.40, 1000, 0.70, 6e-6),
}


@dataclass(frozen=True, slots=True)
class Constants:
    """architectures: by name. Of the systems:

    tp_overlap, tp_overlap_backward: share of a layer's tensor-parallel communication that hides behind its matrix
    products. dp_overlap: share of a backward behind which gradients may be reduced; fsdp_slack: share of the shorter of
    computation and parameter gathering that stays visible although they overlap. step_seconds: what a step takes
    beside. imbalance: tokens of the busiest expert over the mean. pointwise_forward, pointwise_backward: bytes moved
    by norms, residuals and activations, as a multiple of the least that fused kernels move.
    """

    architectures: dict[str, Architecture] = field(default_factory=lambda: dict(ARCHITECTURES), hash=False)
    tp_overlap: float = 0.0
    tp_overlap_backward: float = 0.5
    dp_overlap: float = 0.7
    fsdp_slack: float = 0.15
    imbalance: float = 1.1
    pointwise_forward: float = 1.3
    pointwise_backward: float = 1.3
    step_seconds: float = 0.01


DEFAULT = Constants()


def architecture(kind: DeviceKind) -> str:
    """The architecture that a described GPU looks like, by its number types and speeds."""
    if "fp8" not in kind.flops:
        return "ampere" if "bf16" in kind.flops else "volta"
    if kind.memory_bytes_per_s < 1.5e12:
        return "ada"
    return "blackwell" if kind.flops["fp8"] > 3e15 else "hopper"
