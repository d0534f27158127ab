"""Checkpoints: every rank writes the parts that it owns, and reads the parts that it needs, under any plan.

A checkpoint is a directory of one safetensors file a rank and ``index.json``, which says for every tensor which piece
of the whole each file holds. It is written under a temporary name, synced and renamed, so a torn one never has its name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from shardplan.errors import CheckpointError
from shardplan.planner.plan import write_atomically

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


def save(path: str | os.PathLike[str], parts: Iterable[Part], facts: Mapping[str, Any]) -> None:
    """Collective. parts: what this rank owns; facts: JSON values that rank 0 stores besides. Replaces an older one.

    Raises CheckpointError on every rank if any rank could not write (a full disk); the older checkpoint is then whole.
    """
    target = Path(path)
    staging = target.with_name(f".{target.name}.saving")
    rank, world = dist.get_rank(), dist.get_world_size()
    held = list(parts)
    if rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
    _agree(None if rank else _attempt(lambda: staging.mkdir(parents=True)), target)
    file = f"rank-{rank:05d}.safetensors"

    def write() -> None:
        save_file({p.name: p.tensor.detach().cpu().contiguous() for p in held}, staging / file)
        with open(staging / file, "rb+") as written:
            os.fsync(written.fileno())

    _agree(_attempt(write), target)
    mine = [{"name": p.name, "shape": p.shape, "pieces": p.pieces, "file": file} for p in held]
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, mine)

    def publish() -> None:
        index = {"format": FORMAT, "facts": dict(facts), "parts": [part for some in everyone for part in some]}
        write_atomically(staging / "index.json", json.dumps(index).encode())
        previous = target.with_name(f".{target.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        if target.exists():
            os.replace(target, previous)
        os.replace(staging, target)
        shutil.rmtree(previous, ignore_errors=True)

    _agree(None if rank else _attempt(publish), target)


def _attempt(action: Any) -> str | None:
    try:
        action()
    except (OSError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _agree(failure: str | None, target: Path) -> None:
    """All ranks fail together, so that none waits for another in the next step."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, failure)
    wrong = [f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text]
    if wrong:
        raise CheckpointError(f"cannot write {target}", wrong)


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

    def read(self, name: str, shape: tuple[int, ...], pieces: Pieces, into: torch.Tensor) -> None:
        """Fill `into` with the pieces of a tensor. shape: of the whole, as the model has it."""
        stored = self.parts.get(name)
        if stored is None:
            raise CheckpointError(f"{self.path} has no {name}")
        if tuple(stored[0]["shape"]) != tuple(shape):
            raise CheckpointError(f"{name} is {list(stored[0]['shape'])} in {self.path}, the model has {list(shape)}")
        filled = 0
        for part in stored:
            places = [_overlap(mine, theirs) for mine, theirs in zip(pieces, part["pieces"], strict=True)]
            if any(len(here) == 0 for here, _ in places):
                continue
            try:
                with safe_open(self.path / part["file"], framework="pt") as file:
                    tensor = file.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.path} is torn: {part['file']}", [str(error)]) from error
            if not shape:
                into.copy_(tensor)
                return
            here = torch.meshgrid(*(a for a, _ in places), indexing="ij")
            there = torch.meshgrid(*(b for _, b in places), indexing="ij")
            with torch.no_grad():
                into[here] = tensor[there].to(into.device, into.dtype)
            filled += here[0].numel()
        if filled < into.numel():
            raise CheckpointError(f"{self.path} holds only {filled} of {into.numel()} elements of {name}")


def _overlap(mine: list[tuple[int, int]], theirs: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (in mine, in theirs) of the indices that both hold."""
    left = torch.cat([torch.arange(a, b) for a, b in mine])
    right = torch.cat([torch.arange(a, b) for a, b in theirs])
    order = torch.argsort(right)
    found = torch.searchsorted(right[order], left).clamp_max(len(right) - 1)
    hit = right[order][found] == left
    return hit.nonzero().flatten(), order[found[hit]]
