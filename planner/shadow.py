"""A shadow of a model: the same modules holding fake tensors, so that tracing needs no memory and touches nothing."""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from shardplan.errors import UsageError
from shardplan.planner.precision import lowered


class CannotCopy(Exception):
    """The modules of the model cannot be deep-copied."""


def make_fake_mode() -> Any:
    """Fake tensors with sizes that stay symbolic only where they depend on data."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    shape_env = ShapeEnv(tracked_fakes=[], trace_asserts=True)
    return FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True, export=True)


def fake_like(fake_mode: Any, value: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A fake tensor of the same shape and strides (and dtype, unless one is given); meta becomes CPU."""
    device = torch.device("cpu") if value.device.type == "meta" else value.device
    with fake_mode:
        if value.layout != torch.strided:
            raise UsageError(f"sparse tensors are not supported (layout {value.layout})")
        return torch.empty_strided(value.shape, value.stride(), dtype=dtype or value.dtype, device=device)


def _fakes(model: nn.Module, fake_mode: Any, dtype: torch.dtype | None) -> dict[int, torch.Tensor]:
    """id of every parameter and buffer -> its fake. dtype: of the parameters that `precision.lowered` names."""
    found: dict[int, torch.Tensor] = {}
    chosen = lowered(model) if dtype is not None else set()
    for value in [*model.parameters(), *model.buffers()]:
        fake = fake_like(fake_mode, value, dtype if id(value) in chosen else None)
        is_parameter = isinstance(value, nn.Parameter)
        found[id(value)] = nn.Parameter(fake, requires_grad=value.requires_grad) if is_parameter else fake
    return found


@contextlib.contextmanager
def shadow(model: nn.Module, fake_mode: Any, copied: bool, dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
    """The model with fake weights. copied: a copy of its modules; else the model itself, put right afterwards. dtype:
    see `planner.precision`.

    Raises CannotCopy.
    """
    fakes = _fakes(model, fake_mode, dtype)
    if copied:
        memo: dict[int, Any] = dict(fakes)
        for module in model.modules():
            memo.update({id(v): v for v in vars(module).values() if isinstance(v, torch.Tensor)})
        try:
            made = copy.deepcopy(model, memo)
        except Exception as error:
            raise CannotCopy(str(error)) from error
        for module in made.modules():
            if isinstance(module, nn.SyncBatchNorm):
                # Its own forward communicates where a process group is there; a plan does that for any batch norm.
                module.forward = types.MethodType(nn.modules.batchnorm._BatchNorm.forward, module)
        yield made
        return
    undo: list[tuple[Any, str, Any]] = []
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module in model.modules():
            tables: tuple[Any, ...] = (module._parameters, module._buffers)
            for table in tables:
                for name, value in table.items():
                    if value is not None:
                        undo.append((table, name, value))
                        table[name] = fakes[id(value)]
        yield model
    finally:
        for table, name, value in undo:
            table[name] = value
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Hugging Face models: ``config.use_cache`` off for as long as the block runs."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            configs[id(config)] = config
    before = [(config, config.use_cache) for config in configs.values()]
    try:
        for config, _ in before:
            config.use_cache = False
        yield
    finally:
        for config, value in before:
            config.use_cache = value
