"""Whole weights in safetensors files, in the layout that Hugging Face models are shared in.

One file, or a directory of ``model-00001-of-00003.safetensors`` and ``model.safetensors.index.json``. Ranks read their
slices of them; `save` writes them tensor by tensor, each by one rank, so that no process ever holds the model.
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
from shardplan.runtime.tensor_files import Stored, data_of, make_file, nbytes_of, places, read_header, writable

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_CHUNK_NBYTES = 1 << 26
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
    """Collective. tensors: names, shapes and dtypes in order; values: functions that give them, in that order, on one
    rank each (None elsewhere), which writes it at its place, and are collective themselves. others: further files of
    the directory. All ranks see one file system.

    The directory has its name once it is whole; an older one is replaced. Raises CheckpointError on every rank if any
    rank could not write.
    """
    target = Path(path)
    staging = target.with_name(f".{target.name}.saving")
    unwritable = [name for name, _, dtype in tensors if not writable(dtype)]
    if unwritable:
        raise CheckpointError(f"safetensors has no dtype for {', '.join(unwritable[:5])}")
    title, files = f"cannot write {target}", _Files(staging, in_files(tensors, max_nbytes))
    agree(None if rank else attempt(lambda: files.begin(target, others)), title)
    failure: str | None = None
    for (name, _, _), value in zip(tensors, values, strict=True):  # to the end, whatever goes wrong: all give parts
        found = attempt(partial(files.take, name, value, failure is None))
        failure = failure or found
    failure = attempt(files.close) or failure
    try:
        agree(failure, title)
        agree(None if rank else attempt(lambda: files.end(target, others)), title)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise


class _Files:
    """The files of a directory, of which every rank writes some tensors."""

    def __init__(self, staging: Path, files: list[list[Announced]]) -> None:
        self.staging = staging
        self.files = files
        self.names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        if len(files) == 1:
            self.names = [SINGLE]
        self._places = {name: (i, place) for i, file in enumerate(files) for name, place in places(file).items()}
        self._open: dict[int, int] = {}

    def begin(self, target: Path, others: Mapping[str, bytes]) -> None:
        if target.exists():
            kept = [p.name for p in target.iterdir() if p.suffix != ".safetensors" and p.name not in {INDEX, *others}]
            if kept:
                raise CheckpointError(f"{target} holds other files, which would be lost", sorted(kept)[:5])
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)
        for name, file in zip(self.names, self.files, strict=True):
            make_file(self.staging / name, file)

    def take(self, name: str, value: Callable[[], torch.Tensor | None], wanted: bool) -> None:
        """Write a tensor, if this rank is the one that gets it."""
        tensor = value()
        if tensor is None or not wanted:
            return
        index, place = self._places[name]
        if index not in self._open:
            self._open[index] = os.open(self.staging / self.names[index], os.O_WRONLY)
        data = data_of(tensor)
        while len(data):
            count = os.pwrite(self._open[index], data[:_CHUNK_NBYTES], place)
            data, place = data[count:], place + count

    def close(self) -> None:
        """Put what this rank wrote on the disk."""
        try:
            for handle in self._open.values():
                os.fsync(handle)
        finally:
            for handle in self._open.values():
                os.close(handle)
            self._open.clear()

    def end(self, target: Path, others: Mapping[str, bytes]) -> None:
        for name, data in others.items():
            write_atomically(self.staging / name, data)
        if len(self.files) > 1:
            total = sum(nbytes_of(shape, dtype) for file in self.files for _, shape, dtype in file)
            where = {name: self.names[i] for i, file in enumerate(self.files) for name, _, _ in file}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            write_atomically(self.staging / INDEX, json.dumps(index, indent=2).encode())
        sync(self.staging)
        publish(self.staging, target)
