"""What a report is made of: paragraphs, tables, bars, timelines, curves and maps, each shown by every renderer."""

from __future__ import annotations

from dataclasses import dataclass

from shardplan.planner.report.words import nbytes_text
from shardplan.planner.timeline import Timeline

PARTS: tuple[str, ...] = ("parameters", "gradients", "optimizer", "activations", "buffers", "reserve")


@dataclass(frozen=True, slots=True)
class Lines:
    """Sentences, each on its own line."""

    items: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """columns: (heading, whether its cells are numbers)."""

    columns: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Bar:
    """Memory of one device (group). parts: (name, bytes); limit_nbytes 0: none known."""

    name: str
    parts: tuple[tuple[str, int], ...]
    limit_nbytes: int
    measured_nbytes: int | None = None

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.parts)

    @property
    def text(self) -> str:
        limit = f" of {nbytes_text(self.limit_nbytes)}" if self.limit_nbytes else ""
        over = f", {nbytes_text(self.nbytes - self.limit_nbytes)} OVER" if 0 < self.limit_nbytes < self.nbytes else ""
        seen = f", measured {nbytes_text(self.measured_nbytes)}" if self.measured_nbytes is not None else ""
        return f"{nbytes_text(self.nbytes)}{limit}{over}{seen}"

    @property
    def parts_text(self) -> str:
        return ", ".join(f"{name} {nbytes_text(nbytes)}" for name, nbytes in self.parts if nbytes)


@dataclass(frozen=True, slots=True)
class Bars:
    """Bars on one scale: to the largest limit, or to the largest peak where that is tiny beside the limits."""

    bars: tuple[Bar, ...]

    @property
    def scale_nbytes(self) -> int:
        peak = max((max(bar.nbytes, bar.measured_nbytes or 0) for bar in self.bars), default=0)
        limit = max((bar.limit_nbytes for bar in self.bars), default=0)
        return (peak if 0 < 20 * peak < limit else max(peak, limit)) or 1

    @property
    def note(self) -> str:
        """What to say where the limits are off the scale, else empty."""
        if self.scale_nbytes >= max((bar.limit_nbytes for bar in self.bars), default=0):
            return ""
        return f"The bars end at {nbytes_text(self.scale_nbytes)}, far below the limit."


@dataclass(frozen=True, slots=True)
class Chart:
    """A timeline to be drawn on a scale of `end_seconds`, the same for all timelines of a report."""

    timeline: Timeline
    end_seconds: float


@dataclass(frozen=True, slots=True)
class Share:
    """One bar of seconds. parts: (name, colour class, seconds); text: what stands at its end."""

    name: str
    parts: tuple[tuple[str, str, float], ...]
    text: str

    @property
    def seconds(self) -> float:
        return sum(seconds for _, _, seconds in self.parts)


@dataclass(frozen=True, slots=True)
class Shares:
    """Bars of seconds on one scale."""

    rows: tuple[Share, ...]

    @property
    def scale_seconds(self) -> float:
        return max((row.seconds for row in self.rows), default=0.0) or 1.0

    @property
    def names(self) -> tuple[tuple[str, str], ...]:
        """(colour class, name) of the parts, each once, in order."""
        return tuple(dict.fromkeys((colour, name) for row in self.rows for name, colour, _ in row.parts))


@dataclass(frozen=True, slots=True)
class Curve:
    """Bytes in use over a step: points (seconds, bytes from then on). limit_nbytes 0: none known."""

    name: str
    points: tuple[tuple[float, int], ...]
    limit_nbytes: int

    @property
    def peak(self) -> tuple[float, int]:
        """(seconds, bytes) of the highest point."""
        return max(self.points, key=lambda point: point[1])


@dataclass(frozen=True, slots=True)
class Curves:
    """Curves over the same time."""

    curves: tuple[Curve, ...]
    end_seconds: float


@dataclass(frozen=True, slots=True)
class Topology:
    """nodes: per node (number, devices as (rank, kind, stage or -1)); inside: node -> bytes that its devices send each
    other in a step; between: (from, to) nodes -> bytes."""

    nodes: tuple[tuple[int, tuple[tuple[int, str, int], ...]], ...]
    inside: dict[int, float]
    between: dict[tuple[int, int], float]


@dataclass(frozen=True, slots=True)
class Map:
    """Which part of every layer the devices hold. columns: (device, stage); rows: (layer, its bytes, per column (start,
    share) of the layer that the device holds, in parts of one, share 0: nothing). note: what the columns leave out."""

    columns: tuple[tuple[str, int], ...]
    rows: tuple[tuple[str, int, tuple[tuple[float, float], ...]], ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Plot:
    """A curve of numbers over numbers. points: (x, y, words), by x; marked: the x of this plan. even: y at x if it grew
    evenly from the marked point, drawn beside it."""

    name: str
    x_name: str
    y_name: str
    points: tuple[tuple[float, float, str], ...]
    marked: float
    even: bool = False


@dataclass(frozen=True, slots=True)
class Reasons:
    """The same in sentences, for a terminal, and in columns, for a page."""

    sentences: tuple[str, ...]
    table: Table


Block = Reasons | Lines | Table | Bars | Chart | Shares | Curves | Topology | Map | Plot


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with blocks; sections without blocks are left out."""

    title: str
    blocks: tuple[Block, ...]
