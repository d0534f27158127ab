"""The optimizer of one rank: what it may be, its global gradient norm, and its state by parameter name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shardplan.errors import NotSupported

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], Any]
_foreach_norm = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]
_foreach_mul_ = torch._foreach_mul_  # pyright: ignore[reportPrivateImportUsage]
_WHOLE_TENSOR = frozenset({"Adafactor", "Muon"})
_NUMBER = "number."
_SAVED = (bool, int, float, str, list, tuple, type(None))


def make(factory: OptimizerFactory, parameters: Sequence[nn.Parameter], sharded: bool) -> torch.optim.Optimizer | None:
    """The optimizer of this rank's trainable parameters (None where it has none).

    sharded: whether any of them is a part of a larger tensor. An optimizer that looks at whole tensors would then
    compute something else than on one device. Raises NotSupported for those known to; warns of classes not known.
    """
    if not parameters:
        return None
    optimizer = factory(parameters)
    name = type(optimizer).__name__
    known = type(optimizer).__module__.startswith("torch.optim")
    if known and name == "LBFGS":
        raise NotSupported("LBFGS evaluates the loss inside its step", hints=["use an optimizer without a closure"])
    if sharded and known and name in _WHOLE_TENSOR:
        raise NotSupported(
            f"{name} reads whole matrices, here a rank holds parts of them", hints=["AdamW and SGD are element-wise"]
        )
    if sharded and not known:
        warnings.warn(
            f"{name} steps on parts of tensors: exact only if it treats every element by itself", stacklevel=2
        )
    return optimizer


def advance(scheduler: Any, loss: torch.Tensor) -> None:
    """Move a scheduler after an optimizer step. loss: of the global batch, the same on every rank."""
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        scheduler.step(loss.item())
    else:
        scheduler.step()


def clip_gradients(held: Sequence[tuple[nn.Parameter, int]], limit: float, device: torch.device) -> torch.Tensor:
    """Scale gradients so that their norm over the whole model is at most `limit`. Collective. -> the norm before.

    held: this rank's parameters, each with the number of ranks on which every element of it lies (it counts once).
    """
    gradients = [p.grad for p, _ in held if p.grad is not None]
    total = torch.zeros((), dtype=torch.float64, device=device)
    if gradients:
        squares = torch.stack(_foreach_norm(gradients)).double().square()
        copies = torch.tensor([n for p, n in held if p.grad is not None], dtype=torch.float64).to(device)
        total = (squares / copies).sum()
    dist.all_reduce(total)
    norm = total.sqrt()
    if gradients:
        _foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0).to(gradients[0].dtype))
    return norm


def state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Iterator[tuple[str, torch.Tensor]]:
    """(key, value) of what the optimizer keeps for a parameter; Python numbers as tensors under a marked key."""
    for key, value in optimizer.state.get(parameter, {}).items():
        if torch.is_tensor(value):
            yield key, value
        elif isinstance(value, (bool, int, float)):
            yield _NUMBER + key, torch.tensor(value, dtype=torch.float64)
        elif value is not None:
            raise NotSupported(f"{type(optimizer).__name__} keeps a {type(value).__name__} ({key}) for a parameter")


def restore(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, stored: Mapping[str, torch.Tensor]) -> None:
    """Inverse of `state_of`."""
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    state: dict[str, Any] = {}
    for key, value in stored.items():
        if key.startswith(_NUMBER):
            state[key.removeprefix(_NUMBER)] = value.item()
        elif key != "step" or group.get("capturable") or group.get("fused"):
            state[key] = value.to(parameter.device)
        else:
            state[key] = value
    if state:
        optimizer.state[parameter] = state
    else:
        optimizer.state.pop(parameter, None)


def options(optimizer: torch.optim.Optimizer | None, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Settings of every parameter group (a scheduler moves them), with the names of its parameters. names: by id."""
    found = []
    for group in optimizer.param_groups if optimizer is not None else ():
        values = {
            k: float(v) if torch.is_tensor(v) else v for k, v in group.items() if k not in ("params", "param_names")
        }
        kept = {k: v for k, v in values.items() if isinstance(v, _SAVED)}
        found.append({"parameters": [names[id(p)] for p in group["params"]], "options": kept})
    return found


def restore_options(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], stored: Iterable[Mapping[str, Any]]
) -> None:
    """Give every parameter group the settings that its first parameter had when they were stored."""
    by_name = {name: group["options"] for group in stored for name in group["parameters"]}
    for group in optimizer.param_groups:
        set_options(group, by_name.get(names[id(group["params"][0])], {}))


def set_options(group: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Give a parameter group other settings, of those that it has."""
    for key, value in values.items():
        if torch.is_tensor(group.get(key)):
            group[key].fill_(value)
        elif key in group:
            group[key] = tuple(value) if isinstance(group[key], tuple) else value
