"""Constraints: what the user decided, in words that the search honours or refuses; never ignored.

Globs are matched against parameter names, module paths and segment names. A glob that matches nothing is an error that
names the nearest matches.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from shardplan.errors import NoMatch, UsageError
from shardplan.planner.units import parse_nbytes


@dataclass(frozen=True, slots=True)
class Pin:
    """Everything that matches lies on pipeline stage `stage`."""

    glob: str
    stage: int

    def __post_init__(self) -> None:
        if self.stage < 0:
            raise UsageError(f"pin({self.glob!r}): a stage is not negative, not {self.stage}")

    def __str__(self) -> str:
        return f"pin({self.glob!r}, stage={self.stage})"


@dataclass(frozen=True, slots=True)
class Split:
    """Every parameter that matches is split along dimension `dim` over the tensor-parallel axis."""

    glob: str
    dim: int

    def __str__(self) -> str:
        return f"split({self.glob!r}, dim={self.dim})"


@dataclass(frozen=True, slots=True)
class Replicated:
    """Every parameter that matches is whole on every rank of the tensor-parallel axis."""

    glob: str

    def __str__(self) -> str:
        return f"replicate({self.glob!r})"


@dataclass(frozen=True, slots=True)
class Together:
    """All that match lie on one pipeline stage."""

    globs: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.globs) < 2:
            raise UsageError("together needs at least two globs")

    def __str__(self) -> str:
        return f"together({', '.join(map(repr, self.globs))})"


@dataclass(frozen=True, slots=True)
class Degrees:
    """Fixed degrees of data, tensor and pipeline parallelism; None leaves one to the search."""

    dp: int | None = None
    tp: int | None = None
    pp: int | None = None

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "pp"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"degrees: {name} is at least 1, not {value}")

    def __str__(self) -> str:
        given = [f"{n}={getattr(self, n)}" for n in ("dp", "tp", "pp") if getattr(self, n) is not None]
        return f"degrees({', '.join(given)})"


@dataclass(frozen=True, slots=True)
class WithinNode:
    """The groups of a mesh axis do not leave a node."""

    axis: str

    def __post_init__(self) -> None:
        if self.axis not in ("tp", "dp"):
            raise UsageError(f'within_node: the axis is "tp" or "dp", not {self.axis!r}')

    def __str__(self) -> str:
        return f"within_node({self.axis!r})"


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """At most `nbytes` on a device, or on all (device None)."""

    nbytes: int
    device: int | None = None

    def __str__(self) -> str:
        return f"memory({self.nbytes}" + (f", device={self.device})" if self.device is not None else ")")


@dataclass(frozen=True, slots=True)
class Zero:
    """Every parameter that matches and has replicas is stored at this level (`planner.storage`; 0: as it is used)."""

    level: int
    glob: str = "*"

    def __post_init__(self) -> None:
        if isinstance(self.level, bool) or self.level not in (0, 1, 2, 3):
            raise UsageError(f"zero: a level is 0, 1, 2 or 3, not {self.level!r}")

    def __str__(self) -> str:
        return f"zero({self.level}" + (f", {self.glob!r})" if self.glob != "*" else ")")


@dataclass(frozen=True, slots=True)
class Leaf:
    """The submodule of that name is kept whole as one op (honoured when tracing)."""

    name: str

    def __str__(self) -> str:
        return f"leaf({self.name!r})"


Constraint = Pin | Split | Replicated | Together | Degrees | WithinNode | MemoryLimit | Zero | Leaf


def pin(glob: str, stage: int) -> Pin:
    """What matches lies on this pipeline stage."""
    return Pin(glob, stage)


def split(glob: str, dim: int) -> Split:
    """Parameters that match are split along `dim` over the tensor-parallel axis."""
    return Split(glob, dim)


def replicate(glob: str) -> Replicated:
    """Parameters that match are whole on every rank of the tensor-parallel axis."""
    return Replicated(glob)


def together(*globs: str) -> Together:
    """All that match lie on one stage."""
    return Together(globs)


def degrees(dp: int | None = None, tp: int | None = None, pp: int | None = None) -> Degrees:
    """Degrees that the search may not change."""
    return Degrees(dp, tp, pp)


def within_node(axis: str) -> WithinNode:
    """Groups of this mesh axis stay inside a node."""
    return WithinNode(axis)


def memory(limit: int | str, device: int | None = None) -> MemoryLimit:
    """A memory limit such as "72 GiB", for one device or for all."""
    return MemoryLimit(parse_nbytes(limit) if isinstance(limit, str) else limit, device)


def zero(level: int, glob: str = "*") -> Zero:
    """Parameters that match are stored in parts over their replicas: optimizer state (1), gradients too (2), the
    parameters themselves too (3), or nothing (0)."""
    return Zero(level, glob)


def leaf(name: str) -> Leaf:
    """Keep a submodule whole."""
    return Leaf(name)


def matches(glob: str, names: Iterable[str]) -> list[str]:
    """Names that match the glob, or that lie below a module that does. Raises NoMatch with the nearest names."""
    known = list(dict.fromkeys(names))
    found = [name for name in known if fnmatchcase(name, glob) or fnmatchcase(name, glob + ".*")]
    if not found:
        near = difflib.get_close_matches(glob, known, n=3, cutoff=0.3)
        raise NoMatch(f"{glob!r} matches nothing", [f"of {len(known)} names"], [f"did you mean {n!r}?" for n in near])
    return found
