"""What a model's parameters and buffers start from: its own values, files, or an initialisation that ranks run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardplan.errors import CheckpointError, UsageError
from shardplan.rewrite.program import Program
from shardplan.runtime import weight_files
from shardplan.runtime.meta import initialize, origin
from shardplan.runtime.supply import Supply
from shardplan.runtime.tensor_files import Stored

Weights = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Init = Callable[[nn.Module], Any]
LISTED = 20


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by first name (tied ones once), in a fixed order."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def supply_of(
    model: nn.Module,
    weights: Weights | None,
    init: Init | None,
    seed: int,
    programs: Mapping[str, Program],
    alike: bool,
) -> Supply:
    """Where every tensor of a model comes from: `weights` if given, else its own values, else how it is made.

    init: initialises one module; for models on the meta device only. alike: all ranks have devices of one kind.
    Raises UsageError naming what has neither values nor an initialisation, CheckpointError for weights that are not of
    this model.
    """
    own = tensors_of(model)
    if init is not None and not any(tensor.is_meta for tensor in own.values()):
        raise UsageError("init= is for a model on the meta device; this one has values", hints=["leave init away"])
    stored = stored_of(model, weights) if weights is not None else {}
    if any(tensor.is_meta and name not in stored for name, tensor in own.items()):
        initialize(model, init, seed)
    whole = {name: tensor for name, tensor in own.items() if name not in stored and not tensor.is_meta}
    recipes = {}
    for name, tensor in own.items():
        if name not in stored and name not in whole:
            recipe = origin(tensor)
            if recipe is not None:
                recipes[name] = recipe
    persistent = set(dict(model.named_parameters())) | set(model.state_dict(keep_vars=True))
    read = {spec.name for program in programs.values() for spec in (*program.parameters, *program.buffers)}
    needed = {name for name in own if name in persistent or name in read}
    missing = [name for name in own if name in needed and name not in {*stored, *whole, *recipes}]
    if missing:
        raise UsageError(
            f"{len(missing)} tensors are on the meta device and nothing says which values they have",
            [f"{name} ({_owner(model, name)})" for name in missing[:LISTED]],
            [
                "build the model with shardplan.meta_model(factory): what its constructor computes is then known",
                "init=f with f(module), which initialises the parameters of one module",
                "weights=: a safetensors file, or a directory of them",
            ],
        )
    return Supply(whole, stored, recipes, alike)


def _owner(model: nn.Module, name: str) -> str:
    return type(model.get_submodule(name.rpartition(".")[0])).__name__


def stored_of(model: nn.Module, weights: Weights) -> dict[str, Stored]:
    """First name of every tensor of the model -> where it is in the files. Raises CheckpointError."""
    found = weight_files.find(weights)
    names = _names(model)
    persistent = set(model.state_dict(keep_vars=True)) | set(dict(model.named_parameters()))
    known = {alias for aliases in names.values() for alias in aliases}
    found = _with_prefix(found, {alias for alias in known if alias in persistent})
    tensors = tensors_of(model)
    wrong: list[str] = []
    stored: dict[str, Stored] = {}
    for name, aliases in names.items():
        held = next((found[alias] for alias in aliases if alias in found), None)
        if not any(alias in persistent for alias in aliases):
            continue  # the model computes it
        if held is None:
            wrong.append(f"missing: {name}")
            continue
        stored[name] = held
        tensor = tensors[name]
        if held.shape != tuple(tensor.shape):
            wrong.append(f"{name}: {list(held.shape)}, the model has {list(tensor.shape)}")
        elif not _converts(held.dtype, tensor.dtype):
            wrong.append(f"{name}: {_text(held.dtype)}, the model has {_text(tensor.dtype)}")
    wrong += [f"unexpected: {name}" for name in found if name not in known]
    if wrong:
        more = [f"and {len(wrong) - LISTED} more"] if len(wrong) > LISTED else []
        raise CheckpointError(f"{_where(weights)} does not hold the weights of this model", [*wrong[:LISTED], *more])
    return stored


def _names(model: nn.Module) -> dict[str, list[str]]:
    """First name of every tensor -> all its names, itself first."""
    groups: dict[int, list[str]] = {}
    for name, value in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        groups.setdefault(id(value), []).append(name)
    return {names[0]: names for names in groups.values()}


def _with_prefix(found: dict[str, Stored], wanted: set[str]) -> dict[str, Stored]:
    """Under the model's names, if the two differ by a prefix that all names of one side have ("model.") and nothing
    else; else as they are."""
    prefix = ""
    while found and wanted and not set(found) & wanted:
        stored_first, own_first = _first_part(found), _first_part(wanted)
        if stored_first:
            found = {name.removeprefix(stored_first): value for name, value in found.items()}
        elif own_first:
            prefix += own_first
            wanted = {name.removeprefix(own_first) for name in wanted}
        else:
            break
    return {prefix + name: value for name, value in found.items()}


def _first_part(names: Iterable[str]) -> str:
    """What all names have before their first dot, with the dot; "" where they differ."""
    parts = {name.partition(".")[0] + "." if "." in name else "" for name in names}
    return parts.pop() if len(parts) == 1 else ""


def _converts(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether reading into the model's dtype only rounds. Quantised numbers mean nothing without their scales."""
    floating = stored.is_floating_point and wanted.is_floating_point
    return stored == wanted or (floating and stored.itemsize > 1 and wanted.itemsize > 1)


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _where(weights: Weights) -> str:
    return str(weights) if isinstance(weights, (str, os.PathLike)) else f"these {len(weights)} files"


def state_dict_problems(model: nn.Module, whole: Mapping[str, torch.Tensor]) -> list[str]:
    """What is missing, unexpected or of another shape in a state dict of the unsplit model."""
    names = _names(model)
    own = tensors_of(model)
    known = {alias: own[name] for name, aliases in names.items() for alias in aliases}
    persistent = model.state_dict(keep_vars=True)
    wrong = [f"missing: {name}" for name in own if name in persistent and name not in whole]
    wrong += [f"unexpected: {name}" for name in whole if name not in known]
    wrong += [
        f"{name}: {list(value.shape)}, the model has {list(known[name].shape)}"
        for name, value in whole.items()
        if name in known and value.shape != known[name].shape
    ]
    return wrong[:LISTED]


def first_names(model: nn.Module) -> dict[str, str]:
    """Any name of a parameter or buffer -> its first name."""
    return {alias: name for name, aliases in _names(model).items() for alias in aliases}


def to_write(model: nn.Module) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every tensor of a state dict, tied ones once."""
    persistent = model.state_dict(keep_vars=True)
    names = [name for name in tensors_of(model) if name in persistent]
    return [(name, tuple(persistent[name].shape), persistent[name].dtype) for name in names]


def names_by_rank(programs: Mapping[str, Program], world_size: int) -> list[set[str]]:
    """Names of the parameters and buffers that every rank needs."""
    needed: list[set[str]] = [set() for _ in range(world_size)]
    for program in programs.values():
        for spec in (*program.parameters, *program.buffers):
            for stage in spec.stages:
                for rank in program.placement[stage].ranks:
                    needed[rank].add(spec.name)
    return needed


def config_files(model: nn.Module) -> dict[str, bytes]:
    """Files that a model's configuration writes of itself (``config.save_pretrained``), by name."""
    import tempfile

    write = getattr(getattr(model, "config", None), "save_pretrained", None)
    if not callable(write):
        return {}
    with tempfile.TemporaryDirectory() as directory:
        write(directory)
        return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir()) if path.is_file()}
