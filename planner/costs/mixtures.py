"""A mixture of experts (`planner.mixture`) as the calls that it consists of on one rank, and what it keeps.

Pairs are taken to be even over the experts: a rank that has e of E experts and sees n pairs runs n e / E of them.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from shardplan.planner.mixture import MIXTURE, SENT_MIXTURE, Ref, Step, own_experts, run_steps, substituted
from shardplan.planner.rules.localize import LocalCall, Slot
from shardplan.planner.trace import TensorInfo

aten = torch.ops.aten
_INDEX = 8
"""Bytes of a position."""


def is_mixture(call: LocalCall) -> bool:
    return call.target is MIXTURE or call.target is SENT_MIXTURE


def sent_nbytes(call: LocalCall) -> tuple[float, float]:
    """Bytes of one pair's rows and its result over all pairs of a rank that sends them: there, and back again."""
    pairs, rows = call.inputs[0].shape[0], len(call.args[4])
    there = call.inputs[0].nbytes + sum(
        pairs * math.prod(value.shape[1:]) * value.dtype.itemsize for value in call.inputs[1 : 1 + rows]
    )
    return float(there), float(call.outputs[0].nbytes)


def parts(call: LocalCall) -> tuple[LocalCall, ...]:
    """Calls that take what the mixture takes, together."""
    sent = call.target is SENT_MIXTURE
    return _parts(str(call.args[0]), int(call.args[1]), len(call.args[4]), call.inputs, call.outputs, sent)


def kept_nbytes(call: LocalCall) -> float:
    """Bytes that stay until backward, arguments and result aside."""
    return _kept(str(call.args[0]), int(call.args[1]), len(call.args[4]), call.inputs, call.target is SENT_MIXTURE)


def _share(steps: str, experts: int, rows: int, inputs: tuple[TensorInfo, ...], sent: bool) -> tuple[int, int]:
    """Pairs and experts of this rank. sent: it is sent as many pairs as it has."""
    own = own_experts(steps, experts, [value.shape for value in inputs[1 + rows :]])
    return inputs[0].shape[0] if sent else max(inputs[0].shape[0] * own // experts, 1), own


@lru_cache(maxsize=4096)
def _parts(
    steps: str,
    experts: int,
    rows: int,
    inputs: tuple[TensorInfo, ...],
    outputs: tuple[TensorInfo, ...],
    sent: bool,
) -> tuple[LocalCall, ...]:
    count, own = _share(steps, experts, rows, inputs, sent)
    at = TensorInfo((count,), torch.int64)
    found = [LocalCall(aten.sort.stable, (Slot(0),), {"stable": True}, (at,), (at, at))]
    known: dict[Ref, TensorInfo] = {Ref("i", 0): at, Ref("o", 0): TensorInfo((own,), torch.int32)}
    for i, source in enumerate(inputs[1 : 1 + rows]):
        taken = known[Ref("r", i)] = TensorInfo((count, *source.shape[1:]), source.dtype, source.needs_grad)
        found.append(LocalCall(aten.index.Tensor, (Slot(0), [Slot(1)]), {}, (source, at), (taken,)))
    for i, tensor in enumerate(inputs[1 + rows :]):
        known[Ref("h", i)] = tensor
    made = 0

    def seen(step: Step, value: Any) -> None:
        nonlocal made
        grads = any(known[ref].needs_grad for ref in step.refs() if ref in known)
        results = [value] if isinstance(value, torch.Tensor) else list(value)
        if isinstance(value, torch.Tensor):
            known[Ref("s", made)] = _info(value, grads)
        else:  # its parts are what later steps read
            known[Ref("s", made)] = TensorInfo((), torch.float32, grads)
        made += 1
        if isinstance(step.target, torch._ops.OpOverload):
            found.append(_call(step, known, tuple(_info(v, grads) for v in results)))

    with torch.no_grad():
        ids, ends, *given = (_meta(known[r]) for r in (Ref("i", 0), Ref("o", 0), *_refs("r", rows)))
        held = [_meta(known[r]) for r in _refs("h", len(inputs) - 1 - rows)]
        run_steps(steps, given, ids, ends, held, seen)
    last = known[Ref("s", made - 1)]
    found.append(LocalCall(aten.index.Tensor, (Slot(0), [Slot(1)]), {}, (last, at), outputs))
    return tuple(found)


def _call(step: Step, known: dict[Ref, TensorInfo], outputs: tuple[TensorInfo, ...]) -> LocalCall:
    inputs: list[TensorInfo] = []

    def slot(ref: Ref) -> Slot:
        inputs.append(known[ref])
        return Slot(len(inputs) - 1)

    args, kwargs = substituted((step.args, step.kwargs), slot)
    return LocalCall(step.target, args, kwargs, tuple(inputs), outputs)


def _refs(kind: str, count: int) -> list[Ref]:
    return [Ref(kind, i) for i in range(count)]


def _info(value: torch.Tensor, grads: bool) -> TensorInfo:
    return TensorInfo(tuple(value.shape), value.dtype, grads and value.dtype.is_floating_point)


def _meta(value: TensorInfo) -> torch.Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


@lru_cache(maxsize=4096)
def _kept(steps: str, experts: int, rows: int, inputs: tuple[TensorInfo, ...], sent: bool) -> float:
    if not any(value.needs_grad for value in inputs):
        return 0.0
    count, own = _share(steps, experts, rows, inputs, sent)
    memories: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        memories[_memory(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    def made(value: TensorInfo, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=value.dtype).requires_grad_(value.needs_grad)

    with FakeTensorMode(), torch.enable_grad():
        taken = [made(v, (count, *v.shape[1:])) for v in inputs[1 : 1 + rows]]
        held = [made(v, v.shape) for v in inputs[1 + rows :]]
        ids, ends = torch.empty(count, dtype=torch.int64), torch.empty(own, dtype=torch.int32)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            run_steps(steps, taken, ids, ends, held)
        for tensor in (*held, ids, ends):
            memories.pop(_memory(tensor), None)
    return float(sum(memories.values()) + math.prod((_INDEX, count, rows + 1)))


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
