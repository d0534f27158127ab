"""Whole weights in safetensors files, in the layout that Hugging Face models are shared in.

One file, or a directory of ``model-00001-of-00003.safetensors`` and ``model.safetensors.index.json``. Ranks read their
slices of them; `save` writes them tensor by tensor, so that no process ever holds the model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from shardplan.errors import CheckpointError
from shardplan.planner.plan import write_atomically
from shardplan.runtime.checkpoint import agree, attempt
from shardplan.runtime.saving import publish, sync
from shardplan.runtime.tensor_files import FileWriter, Stored, nbytes_of, read_header, writable

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
Announced = tuple[str, tuple[int, ...], torch.dtype]
"""Name, shape and dtype of a tensor that is to be written."""


def find(weights: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> dict[str, Stored]:
    """Name -> where it is. weights: a file, a directory, or a list of files. Raises CheckpointError."""
    found: dict[str, Stored] = {}
    files = _files(Path(weights)) if isinstance(weights, (str, os.PathLike)) else [Path(path) for path in weights]
    if not files:
        raise CheckpointError("no weight files are given")
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"there is no file {file}")
        for name, stored in read_header(file.absolute()).items():
            if name in found:
                raise CheckpointError(f"{name} is in two files", [found[name].file, str(file)])
            found[name] = stored
    return found


def _files(path: Path) -> list[Path]:
    if not path.exists():
        previous = path.with_name(f".{path.name}.previous")
        if not previous.exists():
            raise CheckpointError(f"there is no {path}")
        path = previous  # stopped between two renames: the older one is whole
    if path.is_file():
        if not path.name.endswith(".json"):
            return [path]
        index = path
    elif (path / INDEX).is_file():
        index = path / INDEX
    elif (path / SINGLE).is_file():
        return [path / SINGLE]
    else:
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{path} holds no safetensors files", [], ["save the weights as safetensors"])
        return files
    try:
        names = json.loads(index.read_text())["weight_map"].values()
        return [index.parent / name for name in sorted(set(names))]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read", [f"{type(error).__name__}: {error}"]) from error


def in_files(tensors: Sequence[Announced], max_nbytes: int) -> list[list[Announced]]:
    """The tensors, in order, in files of at most so many bytes; a larger tensor has a file of its own."""
    files: list[list[Announced]] = [[]]
    held = 0
    for tensor in tensors:
        nbytes = nbytes_of(tensor[1], tensor[2])
        if files[-1] and held + nbytes > max_nbytes:
            files.append([])
            held = 0
        files[-1].append(tensor)
        held += nbytes
    return files


def save(
    path: str | os.PathLike[str],
    tensors: Sequence[Announced],
    values: Iterable[Callable[[], torch.Tensor | None]],
    max_nbytes: int,
    others: Mapping[str, bytes],
    rank: int,
) -> None:
    """Collective; rank 0 writes. tensors: names, shapes and dtypes in order; values: functions that give them, in that
    order, on rank 0 (None elsewhere), and are collective themselves. others: further files of the directory.

    The directory has its name once it is whole; an older one is replaced. Raises CheckpointError on every rank if rank
    0 could not write.
    """
    target = Path(path)
    staging = target.with_name(f".{target.name}.saving")
    unwritable = [name for name, _, dtype in tensors if not writable(dtype)]
    if unwritable:
        raise CheckpointError(f"safetensors has no dtype for {', '.join(unwritable[:5])}")
    writer = _Writer(staging, in_files(tensors, max_nbytes))
    failure = attempt(lambda: writer.begin(target, others)) if rank == 0 else None
    for value in values:  # to the end, whatever goes wrong here: the other ranks send their parts
        wanted = failure is None
        found = attempt(partial(writer.take, value, wanted))
        failure = failure or found
    if rank == 0 and failure is None:
        failure = attempt(lambda: writer.end(others))
    if rank == 0 and failure is None:
        failure = attempt(lambda: publish(staging, target))
    if rank == 0 and failure is not None:
        writer.abandon()
    agree(failure, f"cannot write {target}")


class _Writer:
    """The files of a directory, one after the other."""

    def __init__(self, staging: Path, files: list[list[Announced]]) -> None:
        self.staging = staging
        self.files = files
        self.names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        if len(files) == 1:
            self.names = [SINGLE]
        self.left = 0
        self.current = -1
        self.open: FileWriter | None = None

    def begin(self, target: Path, others: Mapping[str, bytes]) -> None:
        if target.exists():
            kept = [p.name for p in target.iterdir() if p.suffix != ".safetensors" and p.name not in {INDEX, *others}]
            if kept:
                raise CheckpointError(f"{target} holds other files, which would be lost", sorted(kept)[:5])
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)

    def take(self, value: Callable[[], torch.Tensor | None], wanted: bool) -> None:
        tensor = value()
        if tensor is not None and wanted:
            self.write(tensor)

    def write(self, tensor: torch.Tensor) -> None:
        if self.open is None:
            self.current += 1
            self.left = len(self.files[self.current])
            self.open = FileWriter(self.staging / self.names[self.current], self.files[self.current])
        self.open.write(tensor)
        self.left -= 1
        if self.left == 0:
            self.open.close()
            self.open = None

    def end(self, others: Mapping[str, bytes]) -> None:
        assert self.open is None and self.current == len(self.files) - 1, "tensors are missing"
        for name, data in others.items():
            write_atomically(self.staging / name, data)
        if len(self.files) > 1:
            total = sum(nbytes_of(shape, dtype) for file in self.files for _, shape, dtype in file)
            places = {name: self.names[i] for i, file in enumerate(self.files) for name, _, _ in file}
            index = {"metadata": {"total_size": total}, "weight_map": places}
            write_atomically(self.staging / INDEX, json.dumps(index, indent=2).encode())
        sync(self.staging)

    def abandon(self) -> None:
        if self.open is not None:
            self.open.abandon()
        shutil.rmtree(self.staging, ignore_errors=True)
