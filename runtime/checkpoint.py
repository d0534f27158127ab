"""Checkpoints: every rank writes the parts that it owns, and reads the parts that it needs, under any plan.

A checkpoint is a directory of one safetensors file a rank and ``index.json``, which says for every tensor which piece
of the whole each file holds, and how long every file is and its CRC-32. It is written under a temporary name, synced
and renamed (`runtime.saving`): a torn one never has its name, and one that was damaged later is found out before
anything is read from it.

A directory of checkpoints holds ``step-00000120`` and so on; loading it means the last one that is whole.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardplan.errors import CheckpointError
from shardplan.planner.plan import write_atomically
from shardplan.planner.transfers import overlaps
from shardplan.runtime.tensor_files import OpenFiles

FORMAT = 2
INDEX = "index.json"
Pieces = list[list[tuple[int, int]]]
"""Per dim, the (start, stop) runs of the whole tensor that a part holds, in order."""
_STEP = re.compile(r"step-(\d+)$")
_CHUNK_NBYTES = 1 << 22

log = logging.getLogger("shardplan")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a named tensor on this rank. shape: of the whole. pieces: which part."""

    name: str
    tensor: torch.Tensor
    shape: tuple[int, ...]
    pieces: Pieces


# -- names -------------------------------------------------------------------------------------------------------------


def of_step(directory: str | os.PathLike[str], step: int) -> Path:
    """Where the checkpoint of a step lies in a directory of checkpoints."""
    return Path(directory) / f"step-{step:08d}"


def in_directory(directory: Path) -> list[Path]:
    """The checkpoints of a directory of checkpoints, the last step first."""
    found: dict[int, Path] = {}
    for entry in directory.iterdir() if directory.is_dir() else ():
        name = entry.name.removeprefix(".").removesuffix(".previous")
        match = _STEP.match(name)
        if match is not None and not entry.name.endswith(".saving"):
            found[int(match[1])] = entry.with_name(name)
    return [found[step] for step in sorted(found, reverse=True)]


def candidates(path: Path) -> list[Path]:
    """What loading `path` may mean, in order. Raises CheckpointError where nothing is there."""
    if (place(path) / INDEX).is_file():
        return [path]
    found = in_directory(path)
    if not found:
        raise CheckpointError(f"{path} is not a whole checkpoint", ["it has no index.json, and no step-* in it"])
    return found


def place(path: Path) -> Path:
    """Where a checkpoint of that name lies: between the two renames of `runtime.saving` the older one, which is whole,
    has another name."""
    previous = path.with_name(f".{path.name}.previous")
    return previous if not path.exists() and previous.exists() else path


# -- all ranks together ------------------------------------------------------------------------------------------------


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


def agree(failure: str | None, title: str, group: Any = None) -> None:
    """All ranks fail together, so that none waits for another in the next step. group: None for all ranks' own."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, failure, group=group)
    wrong = [f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text]
    if wrong:
        raise CheckpointError(title, wrong)


def load(path: str | os.PathLike[str], read: Callable[[Reader], None]) -> dict[str, Any]:
    """Collective. `read` takes from the reader what this rank needs. path: of a checkpoint, or of a directory of them:
    then the last whole one, with a warning for every later one. -> the facts that were given when it was saved.

    Every file is compared with its checksum by one of the ranks. Raises CheckpointError on every rank if there is no
    whole checkpoint, or any rank could not read what it needs.
    """
    names: list[str] = []
    failure = None
    if dist.get_rank() == 0:
        failure = attempt(lambda: names.extend(map(str, candidates(Path(path)))))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (failure, names))
    failure, names = everyone[0]
    if failure is not None:
        raise CheckpointError(*_title_and_details(failure))
    damaged: list[str] = []
    for name in names:
        try:
            agree(attempt(lambda name=name: check(name, dist.get_rank(), dist.get_world_size())), f"{name} is damaged")
        except CheckpointError as error:
            if len(names) == 1:
                raise
            damaged += [error.title, *error.details]
            if dist.get_rank() == 0:
                log.warning("%s; an earlier one is tried", "; ".join((error.title, *error.details)))
            continue
        return _load(name, read)
    raise CheckpointError(f"{path} holds no whole checkpoint", damaged)


def _load(path: str, read: Callable[[Reader], None]) -> dict[str, Any]:
    facts: dict[str, Any] = {}

    def read_all() -> None:
        with Reader(path) as reader:
            read(reader)
            facts.update(reader.facts)

    agree(attempt(read_all), f"cannot load {path}")
    return facts


def _title_and_details(text: str) -> tuple[str, list[str]]:
    title, *details = text.splitlines()
    return title, details


# -- one checkpoint ----------------------------------------------------------------------------------------------------


def write_index(
    directory: Path, facts: Mapping[str, Any], parts: list[dict[str, Any]], files: Mapping[str, Mapping[str, int]]
) -> None:
    """files: by name, {"nbytes", "crc32"}."""
    body = {"format": FORMAT, "facts": dict(facts), "files": dict(files), "parts": parts}
    text = json.dumps(body)
    write_atomically(directory / INDEX, json.dumps({"crc32": zlib.crc32(text.encode()), "index": text}).encode())


def read_index(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Raises CheckpointError where it is missing, damaged or of another format."""
    try:
        held = json.loads((place(Path(path)) / INDEX).read_text())
        if "index" not in held:
            raise CheckpointError(f"{path} has format {held.get('format')}, this version reads {FORMAT}")
        if zlib.crc32(held["index"].encode()) != held["crc32"]:
            raise ValueError("the index does not have its checksum")
        index = json.loads(held["index"])
        if index["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {index['format']}, this version reads {FORMAT}")
        return index
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint", [f"{type(error).__name__}: {error}"]) from error


def check(path: str | os.PathLike[str], share: int = 0, shares: int = 1) -> None:
    """Compare every `shares`-th file with its length and checksum. Raises CheckpointError naming what is wrong."""
    files = read_index(path)["files"]
    for name in sorted(files)[share::shares]:
        file, expected = place(Path(path)) / name, files[name]
        try:
            nbytes = file.stat().st_size
            if nbytes != expected["nbytes"]:
                raise CheckpointError(f"{name} is torn: {nbytes} bytes of {expected['nbytes']}")
            if crc32_of(file) != expected["crc32"]:
                raise CheckpointError(f"{name} is damaged: it does not have its checksum")
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read", [f"{type(error).__name__}: {error}"]) from error


def crc32_of(file: Path) -> int:
    found = 0
    with open(file, "rb") as opened:
        while chunk := opened.read(_CHUNK_NBYTES):
            found = zlib.crc32(chunk, found)
    return found


class Reader:
    """A checkpoint to read parts from. Raises CheckpointError where it is missing, torn or of another format."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        index = read_index(path)
        self.path = place(Path(path))
        self.facts: dict[str, Any] = index["facts"]
        self.parts: dict[str, list[dict[str, Any]]] = {}
        for part in index["parts"]:
            self.parts.setdefault(part["name"], []).append(part)
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

    def whole(self, name: str) -> torch.Tensor:
        """A tensor that one rank stored whole."""
        return self._take(self.parts[name][0]["file"], name, ())

    def _take(self, file: str, name: str, where: tuple[slice, ...]) -> torch.Tensor:
        return self._files.take(str(self.path / file), name, where)
