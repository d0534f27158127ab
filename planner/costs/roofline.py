"""Modelled seconds of an op: arithmetic at peak speed or traffic at peak bandwidth, whichever is longer, and a launch.

The roofline (Williams, Waterman, Patterson 2009) with an efficiency per kind of op. It serves where nothing can be
measured, and as the shape of the curve between measurements.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch

from shardplan.planner.cluster import DeviceKind
from shardplan.planner.costs import mixtures
from shardplan.planner.leaf_op import Leaf
from shardplan.planner.mixture import is_product
from shardplan.planner.rules.localize import LocalCall

aten = torch.ops.aten

_LINEAR = {aten.linear.default, aten.mm.default, aten.bmm.default, aten.matmul.default, aten.addmm.default,
           aten.baddbmm.default, aten.mv.default, aten.dot.default}  # fmt: skip
_ADDS_FIRST = {aten.addmm.default, aten.baddbmm.default}
_CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
                 aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding}  # fmt: skip
_TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
_ATTENTION = {aten.scaled_dot_product_attention.default}

# Share of the peak that large matrix products reach. Faster GPUs reach less of it (power, memory): fitted to published
# A100 and B200 timings with benchmarks/fit_ops.py.
_MATH_EFFICIENCY = {"cuda": 0.73, "cpu": 0.7}
_EFFICIENCY_AT_FLOPS = 312e12
_EFFICIENCY_LOSS = 0.123  # every time that the peak is e times as high
_EFFICIENCY_BOUNDS = (0.4, 0.78)
# Fused attention against matrix products, forward and backward.
_ATTENTION_EFFICIENCY = (0.75, 0.65)
_TRAFFIC_EFFICIENCY = 0.8
_LAUNCH_SECONDS = {"cuda": 4e-6, "cpu": 3e-6}
_VIEW_SECONDS = 2e-6
# Half of the peak is reached at this many operations: small matrices do not fill a GPU.
_HALF_FLOPS = {"cuda": 2e9, "cpu": 1e5}
# Passes over the operands in backward, for ops that are bound by traffic.
_BACKWARD_TRAFFIC = 1.5


def flops(call: LocalCall) -> float:
    """Multiplications and additions of the forward call; 0 for ops that do not multiply matrices."""
    if isinstance(call.target, Leaf):
        numbers = sum(math.prod(value.shape) for value in call.outputs)
        return call.target.flops * numbers / max(call.target.results, 1)
    if mixtures.is_mixture(call):
        return sum(map(flops, mixtures.parts(call)))
    out = math.prod(call.outputs[0].shape) if call.outputs else 0
    if is_product(call.target):
        left, right = (value.shape for value in call.inputs[:2])
        return 2.0 * (math.prod(left) * right[-1] if len(left) == len(right) == 2 else out * left[-1])
    if call.target in _LINEAR:
        first = call.inputs[1 if call.target in _ADDS_FIRST else 0].shape
        return 2.0 * out * (first[-1] if first else 1)
    if call.target in _CONVOLUTIONS:
        weight = call.inputs[1].shape
        return 2.0 * out * math.prod(weight[1:])
    if call.target in _TRANSPOSED:
        image, weight = (call.inputs[i].shape for i in range(2))
        return 2.0 * math.prod(image) * math.prod(weight[1:])
    if call.target in _ATTENTION:
        query, key, value = (call.inputs[i].shape for i in range(3))
        causal = call.kwargs.get("is_causal", call.args[5] if len(call.args) > 5 else False)
        pairs = math.prod(query[:-1]) * key[-2]
        return 2.0 * pairs * (query[-1] + value[-1]) * (0.5 if causal else 1.0)
    if call.target is aten.einsum.default:
        return _einsum(call)
    return 0.0


def _einsum(call: LocalCall) -> float:
    terms = str(call.args[0]).replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, call.inputs):
        head, dots, tail = term.partition("...")
        # Dims under an ellipsis are aligned at its right end and broadcast.
        hidden = [f".{i}" for i in reversed(range(len(operand.shape) - len(head) - len(tail)))] if dots else []
        for letter, extent in zip([*head, *hidden, *tail], operand.shape):
            sizes[letter] = max(sizes.get(letter, 1), extent)
    return 2.0 * math.prod(sizes.values())


@lru_cache(maxsize=4096)
def is_view(target: Any) -> bool:
    """Whether the op's result only looks at its argument's memory."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return getattr(target, "__name__", "") == "getitem"
    returned = [r.alias_info for r in schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)


def modelled_seconds(call: LocalCall, kind: DeviceKind) -> tuple[float, float]:
    """Forward and backward seconds of a call on a device that is only described."""
    if mixtures.is_mixture(call):
        found = [modelled_seconds(part, kind) for part in mixtures.parts(call)]
        return sum(ahead for ahead, _ in found), sum(back for _, back in found)
    differentiable = any(value.needs_grad for value in call.outputs)
    if is_view(call.target) and (not call.inputs or call.outputs[0].dtype == call.inputs[0].dtype):
        return _VIEW_SECONDS, _VIEW_SECONDS if differentiable else 0.0
    launch = _LAUNCH_SECONDS[kind.torch_device]
    traffic = sum(value.nbytes for value in (*call.inputs, *call.outputs))
    if call.target is aten.embedding.default and call.outputs:
        traffic = 2 * call.outputs[0].nbytes  # reads only the rows it needs
    moved = traffic / (kind.memory_bytes_per_s * _TRAFFIC_EFFICIENCY)
    work = flops(call)
    ahead, back = _ATTENTION_EFFICIENCY if call.target in _ATTENTION else (1.0, 1.0)
    forward = launch + max(_math_seconds(work / ahead, call, kind), moved)
    if not differentiable:
        return forward, 0.0
    if not work:
        return forward, launch + moved * _BACKWARD_TRAFFIC
    if call.target in _ATTENTION:
        return forward, launch + max(_math_seconds(2.5 * work / back, call, kind), 2 * moved)
    products = sum(value.needs_grad for value in call.inputs if len(value.shape) > 1)
    return forward, max(products, 1) * (launch + max(_math_seconds(work, call, kind), moved))


def _math_seconds(work: float, call: LocalCall, kind: DeviceKind) -> float:
    if not work:
        return 0.0
    dtype = next((value.dtype for value in call.inputs if value.dtype.is_floating_point), torch.float32)
    half = _HALF_FLOPS[kind.torch_device]
    peak = kind.peak_flops(dtype)
    return (work + half) / (peak * efficiency(peak, kind.torch_device))


def efficiency(peak_flops: float, torch_device: str) -> float:
    """Share of the peak that large matrix products reach on a device with that peak (operations per second)."""
    at_reference = _MATH_EFFICIENCY[torch_device]
    if torch_device != "cuda":
        return at_reference
    low, high = _EFFICIENCY_BOUNDS
    return min(max(at_reference - _EFFICIENCY_LOSS * math.log(peak_flops / _EFFICIENCY_AT_FLOPS), low), high)


def copy_seconds(nbytes: float, kind: DeviceKind) -> float:
    """Seconds to read and write so many bytes."""
    return _LAUNCH_SECONDS[kind.torch_device] + 2 * nbytes / (kind.memory_bytes_per_s * _TRAFFIC_EFFICIENCY)


def optimizer_seconds(nbytes: float, kind: DeviceKind) -> float:
    """Seconds of an AdamW step: reads parameter, gradient and two moments, writes three of them."""
    return 7 * nbytes / (kind.memory_bytes_per_s * _TRAFFIC_EFFICIENCY)
