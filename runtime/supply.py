"""Where the values of parameters and buffers come from, so that every rank makes or reads no more than its own part."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from shardplan.errors import UsageError
from shardplan.rewrite.parts import runs
from shardplan.runtime.progress import Items
from shardplan.runtime.tape import Recipe
from shardplan.runtime.tensor_files import OpenFiles, Stored

Pieces = Sequence[Sequence[tuple[int, int]]]


@dataclass(frozen=True, slots=True)
class Supply:
    """Sources by name; where a name has several, the first of whole, stored, recipes counts.

    whole: tensors. stored: tensors in safetensors files. recipes: how to make them. alike: all ranks have devices of
    one kind, so that each runs recipes on its own and still makes the same numbers; else they run on the CPU.
    told: whether to say how far making and reading is.
    """

    whole: Mapping[str, torch.Tensor] = field(default_factory=dict)
    stored: Mapping[str, Stored] = field(default_factory=dict)
    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    alike: bool = False
    told: bool = False

    def names(self) -> set[str]:
        """What has a source."""
        return {*self.whole, *self.stored, *self.recipes}

    def only(self, names: Collection[str]) -> Supply:
        """Of these names."""
        return Supply(
            {name: value for name, value in self.whole.items() if name in names},
            {n: value for n, value in self.stored.items() if n in names and n not in self.whole},
            {
                name: value
                for name, value in self.recipes.items()
                if name in names and name not in self.whole and name not in self.stored
            },
            self.alike,
            self.told,
        )

    @contextmanager
    def open(self, device: torch.device) -> Iterator[Values]:
        with OpenFiles() as files, Items("tensors made or read", len(self.names()), self.told) as items:
            yield Values(self, files, device, items)


class Values:
    """The tensors of a supply while its files are open, on one device."""

    def __init__(self, supply: Supply, files: OpenFiles, device: torch.device, items: Items) -> None:
        self._items = items
        self._supply = supply
        self._files = files
        self._device = device

    def part(self, name: str, shape: tuple[int, ...], pieces: Pieces, dtype: torch.dtype) -> torch.Tensor:
        """A part of a tensor of that shape, in memory of its own. Raises UsageError where there is no source,
        CheckpointError where a file cannot be read."""
        self._items.done()
        extents = [sum(stop - start for start, stop in dim) for dim in pieces]
        made = torch.empty(extents, dtype=dtype, device=self._device)
        if 0 in extents:
            return made
        with torch.no_grad():
            if name not in self._supply.whole and name in self._supply.stored:
                stored = self._supply.stored[name]
                for there, here in runs(pieces):
                    made[here] = self._files.take(stored.file, stored.name, there).to(self._device, dtype)
            else:
                whole = self._make(name)
                assert tuple(whole.shape) == tuple(shape), f"{name}: {whole.shape} for {shape}"
                for there, here in runs(pieces):
                    made[here] = whole[there].to(self._device, dtype)
        return made

    def whole(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """All of a tensor."""
        return self.part(name, shape, [[(0, extent)] for extent in shape], dtype)

    def _make(self, name: str) -> torch.Tensor:
        given = self._supply.whole.get(name)
        if given is not None:
            if given.is_meta:
                raise UsageError(
                    f"{name} is on the meta device and has no values", hints=["give a state dict that has values"]
                )
            return given.detach()
        recipe = self._supply.recipes.get(name)
        if recipe is None:
            raise UsageError(f"{name} has no values and nothing that makes them")
        return recipe.make(self._device if self._supply.alike else "cpu")
