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

    half_m, half_n, half_k: size of a dim at which a product reaches half of that. grouped: share of it that the grouped
    products of several experts reach. attention: share of the peak that
    fused attention reaches in forward, attention_backward in backward, both for long sequences (causal work counted
    half); half_seq: sequence length at which they reach half. eager: share of that which the kernels of eager PyTorch
    reach, which were mostly written for the generation before. traffic: share of the memory bandwidth that elementwise
    kernels reach. launch_seconds: of one kernel.
    """

    math: float
    math_fp8: float
    half_m: float
    half_n: float
    half_k: float
    grouped: float
    attention: float
    attention_backward: float
    half_seq: float
    eager: float
    traffic: float
    launch_seconds: float


ARCHITECTURES: dict[str, Architecture] = {
    "volta": Architecture(0.72, 0.72, 60, 200, 200, 0.8, 0.40, 0.30, 512, 1.0, 0.92, 8e-6),
    "ampere": Architecture(0.764, 0.84, 120, 200, 120, 0.87, 0.515, 0.42, 103, 0.75, 0.75, 6e-6),
    "ada": Architecture(0.70, 0.60, 120, 200, 120, 0.85, 0.45, 0.38, 554, 0.75, 0.75, 6e-6),
    "hopper": Architecture(0.72, 0.624, 120, 200, 200, 0.8, 0.578, 0.415, 1330, 0.39, 0.75, 6e-6),
    "blackwell": Architecture(0.7, 0.512, 120, 200, 300, 0.7, 0.315, 0.381, 1000, 0.4, 0.75, 6e-6),
}


@dataclass(frozen=True, slots=True)
class System:
    """What a kind of training system adds.

    tp_overlap, tp_overlap_backward: share of a layer's tensor-parallel communication that hides behind its matrix
    products. dp_overlap: share of a backward (of a forward) behind which gradients may be reduced (parameters be
    gathered). gather_slack: share of the shorter of computation and parameter gathering that stays visible although
    they overlap (ZeRO 3). pointwise_forward, pointwise_backward: bytes moved by norms, residuals and activations, as a
    multiple of the least that fused kernels move. eager: runs PyTorch's attention kernels. step_seconds: what a step
    takes beside.
    """

    tp_overlap: float
    tp_overlap_backward: float
    dp_overlap: float
    gather_slack: float
    pointwise_forward: float
    pointwise_backward: float
    eager: bool
    step_seconds: float


@dataclass(frozen=True, slots=True)
class Constants:
    """architectures: by name. fused: systems like Megatron-LM, which share at most the optimizer (ZeRO 0 and 1); early:
    the same on GPUs before Hopper, when gradients were reduced after the last backward; sharded: those like PyTorch
    FSDP and DeepSpeed (ZeRO 2 and 3). imbalance: tokens of the busiest expert over the mean. expert_cast_seconds: of
    one expert's operand that is scaled and cast to 8 bits by itself (a handful of small kernels, as long as they take
    to launch)."""

    architectures: dict[str, Architecture] = field(default_factory=lambda: dict(ARCHITECTURES), hash=False)
    early: System = System(0.464, 0.423, 0.0, 0.1, 1.89, 1.0, False, 0.0)
    fused: System = System(0.524, 0.495, 1.0, 0.1, 2.24, 1.01, False, 0.01)
    sharded: System = System(0.1, 0.7, 0.9, 0.4, 1.0, 1.28, True, 0.00978)
    imbalance: float = 1.1
    expert_cast_seconds: float = 5.5e-5

    def system(self, zero: int, kind: DeviceKind) -> System:
        """The kind of system that trains at this ZeRO level on such devices."""
        if zero >= 2:
            return self.sharded
        return self.fused if "fp8" in kind.flops else self.early


DEFAULT = Constants()


def architecture(kind: DeviceKind) -> str:
    """The architecture that a described GPU looks like, by its number types and speeds."""
    if "fp8" not in kind.flops:
        return "ampere" if "bf16" in kind.flops else "volta"
    if kind.memory_bytes_per_s < 1.5e12:
        return "ada"
    return "blackwell" if kind.flops["fp8"] > 3e15 else "hopper"
