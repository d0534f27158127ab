"""How a tensor is made, as data: the operations that gave its values, to be run again where the values are needed.

A tape is a list of steps over numbered storages. A tensor is a `View` of a storage, so that views, aliases and in-place
operations need no steps of their own. A `Recipe` is the part of a tape that one tensor depends on. Every random step
has a seed of its own, derived from the recipe's seed and the step's place on the tape: a tensor has the same values
whoever makes it, alone or with others.
"""

from __future__ import annotations

import hashlib
import operator
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True, slots=True)
class View:
    """A tensor in a storage. storage: its number on the tape; offset and stride in elements of dtype."""

    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Here:
    """Stands for the device that a recipe is run on, among the arguments of a step."""


@dataclass(frozen=True, slots=True)
class Step:
    """One operation. op: name of an operator overload ("aten.normal_.default"), or "literal", which makes its argument.

    args, kwargs: its arguments, with View for tensors and Here for the device. made: views of the storages that it
    makes, by position among the tensors it returns. reads, writes: storages. number: place on the tape. random: draws
    random numbers.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    made: tuple[tuple[int, View], ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    number: int
    random: bool = False


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one tensor is made. nbytes: of every storage that the steps name. seed: of its random numbers."""

    steps: tuple[Step, ...]
    nbytes: Mapping[int, int]
    result: View
    seed: int

    def make(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The whole tensor, on a device; holds no more than the steps need. Random state is left as it was."""
        device = torch.device(device)
        storages: dict[int, torch.UntypedStorage] = {}
        cards = [device.index or 0] if device.type == "cuda" else []
        with torch.random.fork_rng(cards, enabled=any(step.random for step in self.steps)), torch.no_grad():
            for step in self.steps:
                if step.random:
                    torch.manual_seed(_mix(self.seed, step.number))
                self._run(step, storages, device)
            return self._tensor(self.result, storages, device)

    def _run(self, step: Step, storages: dict[int, torch.UntypedStorage], device: torch.device) -> None:
        if step.op == "literal":
            # A copy: later steps may write into it, and the recipe may be run again.
            returned: Any = step.args[0].to(device, copy=True)
        else:

            def given(leaf: Any) -> Any:
                if isinstance(leaf, View):
                    return self._tensor(leaf, storages, device)
                return device if isinstance(leaf, Here) else leaf

            args, kwargs = pytree.tree_map(given, (step.args, dict(step.kwargs)))
            returned = _operator(step.op)(*args, **kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, torch.Tensor)]
        for position, view in step.made:
            made = tensors[position]
            same = made.stride() == view.stride and made.storage_offset() == view.offset and made.dtype == view.dtype
            if same and made.untyped_storage().nbytes() == self.nbytes[view.storage]:
                storages[view.storage] = made.untyped_storage()
            else:
                self._tensor(view, storages, device).copy_(made)

    def _tensor(self, view: View, storages: dict[int, torch.UntypedStorage], device: torch.device) -> torch.Tensor:
        storage = storages.get(view.storage)
        if storage is None:
            storage = storages[view.storage] = torch.UntypedStorage(self.nbytes[view.storage], device=device)
        empty = torch.empty(0, dtype=view.dtype, device=device)
        return empty.set_(storage, view.offset, view.shape, view.stride)  # pyright: ignore[reportArgumentType]


@dataclass(slots=True)
class Tape:
    """Steps in the order in which they ran. writers: storage -> its steps, each with whether the step writes all of the
    storage without reading it."""

    seed: int
    steps: list[Step] = field(default_factory=list)
    nbytes: dict[int, int] = field(default_factory=dict)
    writers: dict[int, list[tuple[int, bool]]] = field(default_factory=dict)

    def add(self, step: Step, whole: Iterable[int]) -> None:
        """whole: storages that the step writes completely, without a look at what was there."""
        replaced = set(whole)
        self.steps.append(step)
        for storage in {*step.writes, *(view.storage for _, view in step.made)}:
            self.writers.setdefault(storage, []).append((step.number, storage in replaced))

    def recipe(self, result: View) -> Recipe:
        """The steps that the tensor depends on as things stand."""
        needed: set[int] = set()
        scanned: set[tuple[int, int]] = set()
        named = {result.storage}
        work = [(result.storage, len(self.steps))]
        while work:
            storage, before = work.pop()
            named.add(storage)
            writers = self.writers.get(storage, [])
            for number, whole in reversed(writers[: bisect_left(writers, (before, False))]):
                if (storage, number) in scanned:
                    break
                scanned.add((storage, number))
                if number not in needed:
                    needed.add(number)
                    step = self.steps[number]
                    work += [(other, number) for other in {*step.reads, *step.writes} if other != storage or not whole]
                if whole:
                    break
        steps = tuple(self.steps[number] for number in sorted(needed))
        for step in steps:
            leaves = pytree.tree_leaves((step.args, dict(step.kwargs)))
            named |= {leaf.storage for leaf in leaves if isinstance(leaf, View)}
            named |= {view.storage for _, view in step.made}
        return Recipe(steps, {storage: self.nbytes[storage] for storage in sorted(named)}, result, self.seed)


def _operator(name: str) -> Any:
    return reduce(getattr, name.split("."), torch.ops)


def _mix(seed: int, number: int) -> int:
    digest = hashlib.blake2b(f"{operator.index(seed)}:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
