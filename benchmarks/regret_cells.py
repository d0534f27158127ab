"""The cells of `benchmarks.regret`, and the plans by hand that a person would try in each.

The table was chosen before anything was measured. Steps on one device take 100-300 ms, so that all cells fit into the
time that the suite may take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from benchmarks.cluster import Links, nodes, uniform
from benchmarks.emulated import Wanted

CHOSEN = "planner"
SHARED = 0.45
"""Of a core, for each of four ranks on two cores."""
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Cell:
    """A job (`jobs.make`) under links, on ranks with these shares of a core. limit_nbytes: of memory per rank."""

    job: str
    links: Links
    shares: tuple[float, ...]
    limit_nbytes: int | None = None

    @property
    def key(self) -> str:
        parts = [self.job, f"{len(self.shares)} ranks", self.links.name]
        if len(set(self.shares)) > 1:
            parts.append("speeds " + ":".join(f"{share:g}" for share in self.shares))
        if self.limit_nbytes is not None:
            parts.append(f"at most {self.limit_nbytes / _MIB:g} MiB")
        return " | ".join(parts)

    def wanted(self) -> tuple[Wanted, ...]:
        """The planner's plan first, then its best of every other arrangement, then those by hand."""
        made = list(_two(self)) if len(self.shares) == 2 else list(_four())
        return (Wanted(CHOSEN, zero="auto"), *made)


def _degrees(dp: int, tp: int, pp: int) -> dict[str, int]:
    return {"dp": dp, "tp": tp, "pp": pp}


def _two(cell: Cell) -> Iterator[Wanted]:
    for dp, tp, pp in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)):
        yield Wanted(f"planner, dp{dp} tp{tp} pp{pp}", _degrees(dp, tp, pp), zero="auto")
    yield Wanted("single", _degrees(1, 1, 1), 1)
    yield Wanted("data parallel", _degrees(2, 1, 1), 1)
    yield Wanted("ZeRO-3", _degrees(2, 1, 1), 1, zero=3)
    yield Wanted("tensor parallel", _degrees(1, 2, 1), 1)
    uneven = len(set(cell.shares)) > 1
    cuts = (0.5, 0.6, 0.7, 0.8) if uneven else (0.4, 0.5, 0.6)
    for microbatches, cut in product((2, 4, 8), cuts):
        yield Wanted(f"pipeline m{microbatches} cut {cut:g}", _degrees(1, 1, 2), microbatches, cut=cut)


def _four() -> Iterator[Wanted]:
    across = (0, 2, 1, 3)
    """The first axis runs where the second did."""
    for dp, tp, pp in ((4, 1, 1), (2, 1, 2), (1, 1, 4)):
        yield Wanted(f"planner, dp{dp} tp{tp} pp{pp}", _degrees(dp, tp, pp), zero="auto")
    yield Wanted("single", _degrees(1, 1, 1), 1)
    yield Wanted("data parallel", _degrees(4, 1, 1), 1)
    yield Wanted("ZeRO-3", _degrees(4, 1, 1), 1, zero=3)
    yield Wanted("tensor parallel", _degrees(1, 4, 1), 1)
    for microbatches in (4, 8):
        yield Wanted(f"pipeline m{microbatches}", _degrees(1, 1, 4), microbatches)
        yield Wanted(f"half pipeline m{microbatches}", _degrees(1, 1, 2), microbatches)
    for microbatches, order in product((2, 4), ((), across)):
        placed = ", across" if order else ""
        yield Wanted(f"dp2 pp2 m{microbatches}{placed}", _degrees(2, 1, 2), microbatches, order=order)
        yield Wanted(f"tp2 pp2 m{microbatches}{placed}", _degrees(1, 2, 2), microbatches, order=order)
    for order in ((), across):
        yield Wanted(f"dp2 tp2{', across' if order else ''}", _degrees(2, 2, 1), 1, order=order)


_SMALL = ("wide@4x32", "usual@8x32", "deep@8x64", "images@8", "experts@8x64", "translation@8x32")
_LINKS = (
    uniform(2), uniform(2, 1000), uniform(2, 200), uniform(2, 50), uniform(2, 1000, 1), uniform(2, 1000, 5),
)  # fmt: skip
_EVEN, _SLOWER = (1.0, 1.0), (1.0, 0.5)


def _cells() -> Iterator[Cell]:
    for job, links in product(_SMALL, _LINKS):
        yield Cell(job, links, _EVEN)
    for job, links in product(("usual@32x16", "wide@16x16", "images@4"), (uniform(2), uniform(2, 1000))):
        yield Cell(job, links, _EVEN)
    for job, limit in (("usual@8x32", 80), ("wide@4x32", 160), ("translation@8x32", 48)):
        yield Cell(job, uniform(2, 1000), _EVEN, limit * _MIB)
    for job in ("usual@8x32", "deep@8x64", "images@8"):
        yield Cell(job, uniform(2, 1000), _SLOWER)
    for job in ("usual@8x32", "deep@8x64", "wide@4x32", "translation@8x32"):
        yield Cell(job, nodes(4, 2, 0, 200, 1), (SHARED,) * 4)
    for job in ("usual@8x32", "images@8"):
        yield Cell(job, uniform(4, 1000), (SHARED,) * 4)


CELLS = tuple(_cells())
SMOKE = (Cell("images@4x16", uniform(2, 1000), _EVEN),)
