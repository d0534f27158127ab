"""The architectures of the zoo.

A family is a module of this folder, named in `FAMILIES`, that ends with ``ENTRIES = entries("family", maker, ...)``. A
maker takes nothing and returns a `tests.models.Case`: a tiny model from a config or from plain modules, a global batch
of 8 samples, and a loss_fn or None. Nothing is downloaded; dropout is 0 unless dropout is what is tested; dimensions
that one would split divide by 4. Makers draw weights and batches from torch's global generator, which is seeded before.

An entry that needs more than its maker is written ``Entry(...)`` by hand.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.utils import _pytree as pytree

from tests.models import Case

FAMILIES = (
    "decoders",
    "encoders",
    "encoder_decoders",
    "experts",
    "state_space",
    "vision",
    "audio",
    "multimodal",
    "diffusion",
    "recurrent",
    "graphs",
    "recommendation",
    "plain",
    "generative",
    "routing",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One architecture.

    name: unique. dtype: what parameters and floating inputs are cast to (double shows wrong sums that single hides;
    models that compute a part in a fixed type and then fail in double say torch.float32). tolerance: relative error of
    loss and gradients that counts as equal; None: by dtype. transformer: whether the share of FLOPs that tp splits has
    a floor (see docs/zoo.md).
    """

    name: str
    family: str
    make: Callable[[], Case]
    dtype: torch.dtype = torch.float64
    tolerance: float | None = None
    transformer: bool = False

    @property
    def summary(self) -> str:
        """First sentence of the maker's docstring."""
        return (self.make.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ").strip()

    @property
    def allowed(self) -> float:
        """Relative error that counts as equal."""
        return self.tolerance or (2e-6 if self.dtype == torch.float64 else 2e-5)

    def case(self, seed: int = 0) -> Case:
        """The case in training mode and in the entry's dtype, the same numbers for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            case = self.make()
        case.model.train().to(self.dtype)
        batch = pytree.tree_map_only(
            torch.Tensor, lambda t: t.to(self.dtype) if t.is_floating_point() else t, case.batch
        )
        return replace(case, batch=batch)


def entries(
    family: str,
    *makers: Callable[[], Case],
    single: tuple[str, ...] = (),
    transformers: bool = False,
    tolerances: dict[str, float] | None = None,
) -> tuple[Entry, ...]:
    """Entries named as their makers. single: names to run in float32. tolerances: by name. transformers: all of them
    are."""
    return tuple(
        Entry(
            make.__name__,
            family,
            make,
            torch.float32 if make.__name__ in single else torch.float64,
            (tolerances or {}).get(make.__name__),
            transformers,
        )
        for make in makers
    )


def zoo() -> dict[str, Entry]:
    """All entries by name, in the order of the families."""
    found: dict[str, Entry] = {}
    for family in FAMILIES:
        for entry in importlib.import_module(f"tests.zoo.{family}").ENTRIES:
            if entry.name in found:
                raise ValueError(f"two entries are called {entry.name}")
            found[entry.name] = entry
    return found
