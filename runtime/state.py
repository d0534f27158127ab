"""The training state of one rank as parts of a checkpoint, and read back under any plan: parameters and buffers, what
the optimizer keeps for each parameter, its options by parameter, and the scheduler.

A tensor of the optimizer lies as its parameter does, or is one number, the same on all ranks.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from shardplan.errors import CheckpointError, NotSupported
from shardplan.rewrite.program import TensorSpec
from shardplan.runtime import optim
from shardplan.runtime.checkpoint import Part, Reader
from shardplan.runtime.parameters import Shards

_SCHEDULER = "scheduler"


def owned(shards: Shards) -> Iterator[TensorSpec]:
    """Specs of the tensors of which this rank writes its part: every element is written once."""
    for spec in shards.mine():
        if shards.owns(spec):
            yield spec


def parts(
    shards: Shards,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any,
    instead: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[Part]:
    """What this rank writes. instead: values of some parameters, by name, that are written in the place of theirs.
    Raises NotSupported for an optimizer whose state does not follow its parameters."""
    tensors = {**shards.tensors(), **(instead or {})}
    for spec in owned(shards):
        pieces = shards.pieces(spec)
        yield Part(f"model/{spec.name}", tensors[spec.name], spec.shape, pieces)
        parameter = shards.stepped.get(spec.name)
        if optimizer is None or parameter is None:
            continue
        for key, value in optim.state_of(optimizer, parameter):
            name = f"optimizer/{spec.name}/{key}"
            if value.shape == parameter.shape:
                yield Part(name, value, spec.shape, pieces)
            elif value.numel() == 1:
                yield Part(name, value, tuple(value.shape), [[(0, 1)]] * value.ndim)
            else:
                raise NotSupported(
                    f"the optimizer keeps {key} of shape {list(value.shape)} for {spec.name}{list(parameter.shape)}"
                )
    if scheduler is not None and shards.rank == _keeper(shards):
        yield _whole(_SCHEDULER, scheduler.state_dict())


def read(reader: Reader, shards: Shards, optimizer: torch.optim.Optimizer | None, scheduler: Any) -> None:
    """Take this rank's parts. Raises CheckpointError where something is missing."""
    tensors = shards.tensors()
    for spec in shards.mine():
        reader.read(f"model/{spec.name}", spec.shape, shards.pieces(spec), tensors[spec.name].data)
    if optimizer is not None:
        _read_optimizer(reader, shards, optimizer)
    if scheduler is not None:
        if _SCHEDULER not in reader.parts:
            raise CheckpointError("it holds no scheduler", [], ["it was saved without scheduler="])
        scheduler.load_state_dict(torch.load(io.BytesIO(reader.whole(_SCHEDULER).numpy().tobytes())))


def names(shards: Shards) -> dict[int, str]:
    """Names of this rank's parameters by their id."""
    return {id(parameter): name for name, parameter in shards.stepped.items()}


def _read_optimizer(reader: Reader, shards: Shards, optimizer: torch.optim.Optimizer) -> None:
    stored: dict[str, list[str]] = {}
    for name in reader.parts:
        if name.startswith("optimizer/"):
            parameter, _, key = name.removeprefix("optimizer/").rpartition("/")
            stored.setdefault(parameter, []).append(key)
    groups = reader.facts["groups"]
    if not groups:
        raise CheckpointError("it holds no optimizer state")
    optim.restore_options(optimizer, names(shards), groups)
    for name, parameter in shards.stepped.items():
        if not parameter.requires_grad:
            continue
        spec = shards.specs[name]
        state: dict[str, torch.Tensor] = {}
        for key in stored.get(name, ()):
            full = f"optimizer/{name}/{key}"
            if reader.shape(full) == spec.shape and spec.shape:
                state[key] = torch.empty(parameter.shape, dtype=reader.dtype(full), device=parameter.device)
                reader.read(full, spec.shape, shards.pieces(spec), state[key])
            else:
                state[key] = reader.whole(full)
        optim.restore(optimizer, parameter, state)


def _keeper(shards: Shards) -> int:
    """The rank that writes what all ranks with trainable parameters have alike."""
    stage = min(min(spec.stages) for spec in shards.program.parameters if spec.trainable)
    return shards.program.placement[stage].ranks[0]


def _whole(name: str, value: Any) -> Part:
    stream = io.BytesIO()
    torch.save(value, stream)
    tensor = torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)
    return Part(name, tensor, tuple(tensor.shape), [[(0, tensor.numel())]])
