"""Checkpoints: every rank writes the parts that it owns, and reads the parts that it needs, under any plan.

A checkpoint is a directory of one safetensors file a rank and ``index.json``, which says for every tensor which piece
of the whole each file holds. It is written under a temporary name, synced and renamed: a torn one never has its name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from shardplan.errors import CheckpointError
from shardplan.planner.plan import write_atomically
from shardplan.rewrite.parts import overlaps
from shardplan.runtime.tensor_files import OpenFiles

FORMAT = 1
Pieces = list[list[tuple[int, int]]]
"""Per dim, the (start, stop) runs of the whole tensor that a part holds, in order."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a named tensor on this rank. shape: of the whole. pieces: which part."""

    name: str
    tensor: torch.Tensor
    shape: tuple[int, ...]
    pieces: Pieces


def save(
    path: str | os.PathLike[str],
    parts: Iterable[Part],
    facts: Mapping[str, Any],
    lists: Mapping[str, list[Any]] | None = None,
) -> None:
    """Collective. parts: what this rank owns; facts: JSON values that rank 0 stores besides; lists: facts of which
    every rank has some. Replaces an older checkpoint.

    Raises CheckpointError on every rank if any rank could not write (a full disk); the older checkpoint is then whole.
    """
    target = Path(path)
    staging = target.with_name(f".{target.name}.saving")
    rank, world = dist.get_rank(), dist.get_world_size()
    held: list[Part] = []
    agree(attempt(lambda: held.extend(parts)), f"cannot save to {target}")
    if rank == 0:
        shutil.rmtree(staging, ignore_errors=True)

    def begin() -> None:
        if target.exists() and not (target / "index.json").is_file() and any(target.iterdir()):
            raise CheckpointError(f"{target} is no checkpoint, and what it holds would be lost")
        staging.mkdir(parents=True)

    agree(None if rank else attempt(begin), f"cannot write {target}")
    file = f"rank-{rank:05d}.safetensors"

    def write() -> None:
        save_file({p.name: p.tensor.detach().cpu().contiguous() for p in held}, staging / file)
        with open(staging / file, "rb+") as written:
            os.fsync(written.fileno())

    agree(attempt(write), f"cannot write {target}")
    mine = [
        {
            "name": p.name,
            "shape": p.shape,
            "dtype": str(p.tensor.dtype).removeprefix("torch."),
            "pieces": p.pieces,
            "file": file,
        }
        for p in held
    ]
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, (mine, lists or {}))

    def finish() -> None:
        merged = {key: [item for _, some in everyone for item in some[key]] for key in lists or {}}
        every_part = [part for some, _ in everyone for part in some]
        index = {"format": FORMAT, "facts": {**facts, **merged}, "parts": every_part}
        write_atomically(staging / "index.json", json.dumps(index).encode())
        sync(staging)
        publish(staging, target)

    agree(None if rank else attempt(finish), f"cannot write {target}")


def publish(staging: Path, target: Path) -> None:
    """Give a whole, synced directory its name; an older one of that name is replaced."""
    previous = target.with_name(f".{target.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if target.exists():
        os.replace(target, previous)
    os.replace(staging, target)
    sync(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def sync(directory: Path) -> None:
    """Put the names in a directory on the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def attempt(action: Callable[[], object]) -> str | None:
    """What was wrong, None if nothing."""
    # Whatever it was, the other ranks have to hear of it: they wait.
    try:
        action()
    except CheckpointError as error:
        return "\n".join((error.title, *error.details))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def agree(failure: str | None, title: str) -> None:
    """All ranks fail together, so that none waits for another in the next step."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, failure)
    wrong = [f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text]
    if wrong:
        raise CheckpointError(title, wrong)


def load(path: str | os.PathLike[str], read: Callable[[Reader], None]) -> dict[str, Any]:
    """Collective. `read` takes from the reader what this rank needs. -> the facts that were given to `save`.

    Raises CheckpointError on every rank if any rank could not read what it needs.
    """
    facts: dict[str, Any] = {}

    def read_all() -> None:
        with Reader(path) as reader:
            read(reader)
            facts.update(reader.facts)

    agree(attempt(read_all), f"cannot load {path}")
    return facts


class Reader:
    """A checkpoint to read parts from. Raises CheckpointError where it is missing, torn or of another format."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        previous = self.path.with_name(f".{self.path.name}.previous")
        if not self.path.exists() and previous.exists():
            self.path = previous  # stopped between two renames: the older one is whole
        try:
            index = json.loads((self.path / "index.json").read_text())
            if index["format"] != FORMAT:
                raise CheckpointError(f"{path} has format {index['format']}, this version reads {FORMAT}")
            self.facts: dict[str, Any] = index["facts"]
            self.parts: dict[str, list[dict[str, Any]]] = {}
            for part in index["parts"]:
                self.parts.setdefault(part["name"], []).append(part)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a whole checkpoint", [f"{type(error).__name__}: {error}"]) from error

        self._files = OpenFiles()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.__exit__()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self.parts[name][0]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return getattr(torch, self.parts[name][0]["dtype"])

    def read(self, name: str, shape: tuple[int, ...], pieces: Pieces, into: torch.Tensor) -> None:
        """Fill `into` with the pieces of a tensor; no more than those are read. shape: of the whole, as the model has
        it."""
        stored = self.parts.get(name)
        if stored is None:
            raise CheckpointError(f"{self.path} has no {name}")
        if self.shape(name) != tuple(shape):
            raise CheckpointError(f"{name} is {list(self.shape(name))} in {self.path}, the model has {list(shape)}")
        filled = 0
        with torch.no_grad():
            for part in stored:
                for here, there in overlaps(pieces, part["pieces"]):
                    into[here] = self._take(part["file"], name, there).to(into.device, into.dtype)
                    filled += into[here].numel()
        if filled < into.numel():
            raise CheckpointError(f"{self.path} holds only {filled} of {into.numel()} elements of {name}")

    def scalar(self, name: str) -> torch.Tensor:
        """A small tensor as it is stored, whole."""
        return self._take(self.parts[name][0]["file"], name, ())

    def _take(self, file: str, name: str, where: tuple[slice, ...]) -> torch.Tensor:
        return self._files.take(str(self.path / file), name, where)
