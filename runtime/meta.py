"""Models without values: parameters on the meta device whose values are made where, and only where, they are needed.

`meta_model(factory)` builds one and keeps how every parameter is made; `initialize` does the same for a model that was
built on the meta device already, from the initialisation that its modules have of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from shardplan.errors import UsageError
from shardplan.runtime.recording import Recorder, recording
from shardplan.runtime.tape import Recipe

_origins: Any = WeakIdKeyDictionary()


def origin(tensor: torch.Tensor) -> Recipe | None:
    """How a tensor of a model without values is made; None where that is not known."""
    return _origins.get(tensor)


def meta_model(factory: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build a model of any size without memory for its parameters.

    factory: makes the model as for one device, and initialises it. Its parameters come out on the meta device; the
    operations that initialise them are recorded and run later, on every rank for the parameters that it holds parts of
    (`auto_parallel`). Buffers and other tensors that the constructor computes have their values. Parameters that the
    factory sets from real tensors (loaded weights) stay real.
    seed: of random initialisation. The values depend on it and on the factory alone, not on the plan; they are not the
    numbers that ``torch.manual_seed(seed); factory()`` draws.

    Raises UsageError where the factory does not return a module, or needs the values of a tensor that it never set.
    """
    recorder = Recorder(seed)
    with recording(recorder):
        model = factory()
    if not isinstance(model, nn.Module):
        raise UsageError(f"the factory returned {type(model).__name__}, not an nn.Module")
    parameters = {id(parameter) for parameter in model.parameters()}
    for parameter in model.parameters():
        _keep(recorder, parameter)
    real: dict[int, Any] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = _real(buffer, recorder, parameters, real)
        for name, value in list(vars(module).items()):
            if name not in ("_parameters", "_buffers", "_modules"):
                found = _real(value, recorder, parameters, real)
                if found is not value:
                    vars(module)[name] = found
    return model


def initialize(model: nn.Module, init: Callable[[nn.Module], Any] | None, seed: int) -> None:
    """Record how the meta tensors of a model get values: by every module's ``reset_parameters()``, then
    ``_init_weights(module)`` of the nearest module around it that has one (or its ``init_weights()``), then `init`, all
    from the inside out. Tensors that have values, or a recorded origin, keep them.

    Raises UsageError where one of these fails.
    """
    tensors = [*model.parameters(), *model.buffers()]
    unknown = [tensor for tensor in tensors if tensor.is_meta and origin(tensor) is None]
    if not unknown:
        return
    recorder = Recorder(seed, protected=[tensor for tensor in tensors if not tensor.is_meta])
    for tensor in unknown:
        recorder.adopt(tensor)
    wanted = {id(tensor) for tensor in unknown}
    with recording(recorder), torch.no_grad():
        for name, module in _inside_out(model):
            if any(id(tensor) in wanted for tensor in (*module.parameters(), *module.buffers())):
                reset = _method(module, ("reset_parameters", "_reset_parameters"), 0)
                if reset is not None:
                    _call(name, reset)
        for name, module, owner in _owned(model):
            per_module = _method(owner, ("_init_weights",), 1)
            if per_module is not None:
                _call(name, per_module, module)
            elif owner is module:
                at_once = _method(owner, ("init_weights", "initialize_weights", "_init_weights"), 0)
                if at_once is not None:
                    _call(name, at_once)
        if init is not None:
            for name, module in _inside_out(model):
                _call(name, init, module)
    for tensor in unknown:
        _keep(recorder, tensor)


def _keep(recorder: Recorder, tensor: torch.Tensor) -> None:
    if recorder.holds(tensor):
        recipe = recorder.recipe(tensor)
        if recipe is not None:
            _origins[tensor] = recipe


def _real(value: Any, recorder: Recorder, parameters: set[int], done: dict[int, Any]) -> Any:
    """The same value with real tensors for recorded ones, parameters apart; containers are looked through."""
    if isinstance(value, torch.Tensor):
        if id(value) in parameters or not recorder.holds(value):
            return value
        if id(value) not in done:
            # The tensor itself is kept, so that its id stays its own.
            recipe = recorder.recipe(value)
            done[id(value)] = value, value if recipe is None else recipe.make()
        return done[id(value)][1]
    if type(value) in (list, tuple):
        found = [_real(item, recorder, parameters, done) for item in value]
        return value if all(a is b for a, b in zip(found, value, strict=True)) else type(value)(found)
    if type(value) is dict:
        held = {key: _real(item, recorder, parameters, done) for key, item in value.items()}
        return value if all(held[key] is item for key, item in value.items()) else held
    return value


def _inside_out(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        yield from _inside_out(child, f"{prefix}.{name}" if prefix else name)
    yield prefix, model


def _owned(model: nn.Module, prefix: str = "", owner: nn.Module | None = None) -> Iterator[tuple[str, nn.Module, Any]]:
    """Every module, from the inside out, with the nearest one around it (or itself) that initialises others."""
    names = ("_init_weights", "init_weights", "initialize_weights")
    if owner is None or any(callable(getattr(model, name, None)) for name in names):
        owner = model
    for name, child in model.named_children():
        yield from _owned(child, f"{prefix}.{name}" if prefix else name, owner)
    yield prefix, model, owner


def _method(module: nn.Module, names: tuple[str, ...], count: int) -> Callable[..., Any] | None:
    """The first of these methods that takes `count` arguments."""
    for name in names:
        method = getattr(module, name, None)
        if callable(method):
            required = [
                p
                for p in inspect.signature(method).parameters.values()
                if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
            ]
            if len(required) == count:
                return method
    return None


def _call(name: str, function: Callable[..., Any], *arguments: Any) -> None:
    try:
        function(*arguments)
    except Exception as error:
        what = getattr(function, "__name__", type(function).__name__)
        raise UsageError(
            f"{what} of {name or 'the model'} failed: {type(error).__name__}: {error}",
            hints=["build the model with shardplan.meta_model(factory), or give it values"],
        ) from error
