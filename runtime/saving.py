"""Writing checkpoints, in the caller's time or in the background.

A save has two halves. The first, in the caller's time, takes the parts of this rank: a copy if the rest is to run in
the background, so that training may go on. The second writes and syncs one file a rank, and once all ranks have, rank 0
adds the index, renames the directory and removes checkpoints that are no longer wanted. It talks over a process group
of its own (gloo, whatever the job uses), so it is never in the way of a step.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from shardplan.errors import CheckpointError
from shardplan.runtime.checkpoint import INDEX, Part, agree, attempt, in_directory, write_index
from shardplan.runtime.groups import default_timeout
from shardplan.runtime.tensor_files import FileWriter


@dataclass(frozen=True, slots=True)
class Order:
    """What to save. facts: JSON values that rank 0 stores besides; lists: facts of which every rank has some.

    keep: how many checkpoints of the target's directory stay, the new one included; 0: all.
    """

    target: Path
    facts: Mapping[str, Any]
    lists: Mapping[str, list[Any]]
    keep: int = 0

    @property
    def staging(self) -> Path:
        return self.target.with_name(f".{self.target.name}.saving")


class Saver:
    """Saves of one rank, one after another. Every method is collective; a failure is raised on every rank."""

    def __init__(self) -> None:
        self._group: Any = None
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._target: Path | None = None

    @property
    def running(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, order: Order, parts: Callable[[], Iterable[Part]], wait: bool) -> None:
        """parts: gives what this rank owns. wait: False returns as soon as the parts are copied.

        Replaces an older checkpoint of that name. Raises CheckpointError on every rank if any rank could not give its
        parts or, here or at the next call of this saver, could not write (a full disk); the older one is then whole.
        """
        self.wait()
        held: list[Part] = []
        agree(attempt(lambda: held.extend(_taken(parts(), copy=not wait))), f"cannot save to {order.target}")
        if self._group is None:
            # In the background a collective of the job's own group would come between those of a step.
            self._group = dist.new_group(backend="gloo", timeout=default_timeout())
        self._target = order.target
        if wait:
            self._write(order, held)
            return
        self._thread = threading.Thread(target=self._run, args=(order, held), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save that is being written. Raises its CheckpointError, once."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Wait for the save that is being written and let go of the process group. Raises as `wait`."""
        try:
            self.wait()
        finally:
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None

    def _run(self, order: Order, held: list[Part]) -> None:
        try:
            self._write(order, held)
        except CheckpointError as error:
            self._failure = error
        except Exception as error:  # another rank is gone
            self._failure = CheckpointError(f"cannot write {order.target}", [f"{type(error).__name__}: {error}"])

    def _write(self, order: Order, held: list[Part]) -> None:
        rank, title = dist.get_rank(), f"cannot write {order.target}"
        try:
            agree(None if rank else attempt(lambda: _begin(order)), title, self._group)
            file = f"rank-{rank:05d}.safetensors"
            written: list[dict[str, int]] = []
            failure = attempt(lambda: written.append(write_parts(order.staging / file, held)))
            everyone: list[Any] = [None] * dist.get_world_size()
            mine = failure, file, written, [_entry(part, file) for part in held], order.lists
            dist.all_gather_object(everyone, mine, group=self._group)
            wrong = [f"rank {other}: {found[0]}" for other, found in enumerate(everyone) if found[0]]
            if wrong:
                raise CheckpointError(title, wrong)
            agree(None if rank else attempt(lambda: _finish(order, everyone)), title, self._group)
        except CheckpointError:
            if rank == 0:
                shutil.rmtree(order.staging, ignore_errors=True)  # what a full disk needs most is room
            raise


def _taken(parts: Iterable[Part], copy: bool) -> Iterable[Part]:
    for part in parts:
        tensor = part.tensor.detach()
        moved = tensor.to("cpu")
        yield replace(part, tensor=moved.clone() if copy and moved.data_ptr() == tensor.data_ptr() else moved)


def _entry(part: Part, file: str) -> dict[str, Any]:
    dtype = str(part.tensor.dtype).removeprefix("torch.")
    return {"name": part.name, "shape": part.shape, "dtype": dtype, "pieces": part.pieces, "file": file}


def write_parts(file: Path, held: list[Part]) -> dict[str, int]:
    """A safetensors file on the disk. -> {"nbytes", "crc32"} of it."""
    writer = FileWriter(file, [(part.name, tuple(part.tensor.shape), part.tensor.dtype) for part in held])
    try:
        for part in held:
            writer.write(part.tensor)
        writer.close()
    except BaseException:
        writer.abandon()
        raise
    return {"nbytes": writer.nbytes, "crc32": writer.crc32}


def _begin(order: Order) -> None:
    target = order.target
    if target.exists() and not (target / INDEX).is_file() and any(target.iterdir()):
        raise CheckpointError(f"{target} is no checkpoint, and what it holds would be lost")
    shutil.rmtree(order.staging, ignore_errors=True)
    if order.keep and target.parent.is_dir():
        for entry in target.parent.glob(".step-*.saving"):  # of a job that was ended while it saved
            shutil.rmtree(entry, ignore_errors=True)
    order.staging.mkdir(parents=True)


def _finish(order: Order, everyone: list[Any]) -> None:
    merged = {key: [item for *_, lists in everyone for item in lists[key]] for key in order.lists}
    files = {file: written[0] for _, file, written, _, _ in everyone}
    parts = [entry for _, _, _, entries, _ in everyone for entry in entries]
    write_index(order.staging, {**order.facts, **merged}, parts, files)
    sync(order.staging)
    publish(order.staging, order.target)
    if order.keep:
        for old in in_directory(order.target.parent)[order.keep :]:
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(old.with_name(f".{old.name}.previous"), ignore_errors=True)


def publish(staging: Path, target: Path) -> None:
    """Give a whole, synced directory its name; an older one of that name is replaced."""
    previous = target.with_name(f".{target.name}.previous")
    if target.exists():  # else the previous one is the only whole one
        shutil.rmtree(previous, ignore_errors=True)
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
