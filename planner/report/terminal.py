"""The report as text: rich on a terminal, plain elsewhere. ASCII only, so that any terminal and log can show it."""

from __future__ import annotations

import io
from collections.abc import Iterable

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from shardplan.planner.plan import Plan
from shardplan.planner.report.blocks import (
    PARTS,
    Bars,
    Block,
    Chart,
    Curves,
    Lines,
    Map,
    Plot,
    Reasons,
    Section,
    Shares,
    Table,
    Topology,
)
from shardplan.planner.report.document import document
from shardplan.planner.report.drawings import node_lines, traffic_lines
from shardplan.planner.report.facts import facts
from shardplan.planner.report.measured import Measured
from shardplan.planner.report.what_if import WhatIf
from shardplan.planner.report.words import nbytes_text, ranges, seconds_text, share_text
from shardplan.planner.timeline import Track

_PART_STYLES: dict[str, str] = dict(
    zip(PARTS, ("blue", "magenta", "cyan", "green", "yellow", "bright_black"), strict=True)
)
_LETTERS = {"forward": "F", "backward": "B", "weight": "W", "reduce": "R", "optimizer": "O"}
_STYLES = {"F": "blue", "B": "green", "W": "cyan", "R": "yellow", "O": "magenta", ".": "bright_black"}
_LETTER_STYLES = {"a": "blue", "b": "green", "c": "cyan", "d": "magenta", "e": "white", "f": "yellow", "#": "blue"}
_MOST_ROWS = 16


def render_terminal(
    plan: Plan, console: Console, measured: Measured | None = None, what_if: tuple[WhatIf, ...] = ()
) -> None:
    """Print the report to a rich console; its width and colours are the console's."""
    found = facts(plan, measured, what_if)
    console.print(Text(found.verdict, style="bold"))
    for section in document(found):
        console.print(_section(section, console.width))


def render_text(plan: Plan, measured: Measured | None = None, width: int = 100) -> str:
    """The report as plain text without colours or trailing blanks."""
    buffer = io.StringIO()
    render_terminal(plan, Console(file=buffer, width=width, color_system=None, force_terminal=False), measured)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _section(section: Section, width: int) -> Group:
    blocks: list[object] = [Text(f"\n{section.title}", style="bold")]
    for block in section.blocks:
        blocks += (Padding(part, (0, 0, 0, 2)) for part in _block(block, width - 2))  # type: ignore[arg-type]
    return Group(*blocks)  # type: ignore[arg-type]


def _block(block: Block, width: int) -> Iterable[object]:
    if isinstance(block, Lines):
        yield from (Text(item) for item in block.items)
    elif isinstance(block, Reasons):
        yield from map(_reason, block.sentences)
    elif isinstance(block, Table):
        yield _table(block, width)
    elif isinstance(block, Bars):
        yield from _bars(block, width)
    elif isinstance(block, Shares):
        yield from _shares(block, width)
    elif isinstance(block, Curves):
        yield from _peaks(block)
    elif isinstance(block, Topology):
        yield from map(Text, (*node_lines(block), *traffic_lines(block)))
    elif isinstance(block, Map):
        yield _table(_held(block), width)
        if block.note:
            yield Text(block.note, style="bright_black")
    elif isinstance(block, Plot):
        yield from _plot(block, width)
    else:
        yield from _chart(block, width)


def _reason(sentence: str) -> Text:
    """What was decided stands out."""
    head, colon, rest = sentence.partition(": ")
    return Text.assemble((head + colon, "bold"), rest)


def _table(table: Table, width: int) -> RichTable:
    made = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for (heading, number), room in zip(table.columns, _widths(table, width), strict=True):
        justify = "right" if number else "left"
        made.add_column(Text(heading), justify=justify, no_wrap=number, overflow="fold", width=room)
    for row in table.rows:
        made.add_row(*map(Text, row))
    return made


def _widths(table: Table, width: int) -> list[int]:
    """Widths of columns. Where they do not fit, text columns shrink to their longest word, then the first one (names,
    which are one word each) to 24, then all to what is left."""
    texts = [[heading, *(row[at] for row in table.rows)] for at, (heading, _) in enumerate(table.columns)]
    widths = [max(map(len, column)) for column in texts]
    words = [max(len(word) for text in column for word in text.split() or [""]) for column in texts]
    excess = sum(widths) + 2 * (len(widths) - 1) - width
    shrinking = [at for at, (_, number) in enumerate(table.columns) if not number]
    short = [max(24, widths[0] * 3 // 5), *(min(width, max(word, 20)) for width, word in zip(widths, words))][
        : len(words)
    ]
    for leasts in (short, words, [24, *words[1:]], [8] * len(words)):
        for at in reversed(shrinking):
            taken = max(min(excess, widths[at] - leasts[at]), 0)
            widths[at] -= taken
            excess -= taken
    return widths


def _bars(bars: Bars, width: int) -> Iterable[Text | Padding]:
    names = max(len(bar.name) for bar in bars.bars)
    texts = max(len(bar.text) for bar in bars.bars)
    room = max(width - names - texts - 4, 10)
    scale = room / bars.scale_nbytes
    for bar in bars.bars[:_MOST_ROWS]:
        line = Text(f"{bar.name:<{names}} [")
        at, done = 0, 0
        for name, nbytes in bar.parts:
            done += nbytes
            stop = round(done * scale)
            # A part that rounds to nothing is still named in the line below.
            line.append(name[0] * (stop - at), style=_PART_STYLES[name])
            at = stop
        end = max(min(round(bar.limit_nbytes * scale), room) if bar.limit_nbytes else room, at)
        line.append("." * (end - at), style="bright_black")
        line.append("]" + " " * (room - end))
        line.append(f" {bar.text}", style="red" if 0 < bar.limit_nbytes < bar.nbytes else "")
        line.no_wrap = True
        yield line
        if bar.parts_text:
            yield Padding(Text(bar.parts_text, style="bright_black"), (0, 0, 0, names + 2))
    if bars.note:
        yield Text(bars.note)
    if len(bars.bars) > _MOST_ROWS:
        yield Text(f"... and {len(bars.bars) - _MOST_ROWS} more")


def _shares(shares: Shares, width: int) -> Iterable[Text]:
    """Bars of seconds; a letter stands for a part, named above the bars."""
    letters = {name: "abcdefghijklmnop"[at] for at, (colour, name) in enumerate(shares.names) if colour != "idle"}
    if len(letters) > 1:
        yield Text(", ".join(f"{letter} {name}" for name, letter in letters.items()), style="bright_black")
    names = max(len(row.name) for row in shares.rows)
    texts = max(len(row.text) for row in shares.rows)
    room = max(width - names - texts - 4, 10)
    for row in shares.rows[:_MOST_ROWS]:
        line = Text(f"{row.name:<{names}} [")
        at, done = 0, 0.0
        for name, _, seconds in row.parts:
            done += seconds
            stop = round(done / shares.scale_seconds * room)
            letter = letters.get(name, ".") if len(letters) > 1 else "#"
            line.append(letter * (stop - at), style=_LETTER_STYLES.get(letter, "bright_black"))
            at = stop
        line.append(" " * (room - at) + f"] {row.text}")
        line.no_wrap = True
        yield line
    if len(shares.rows) > _MOST_ROWS:
        yield Text(f"... and {len(shares.rows) - _MOST_ROWS} more")


def _peaks(curves: Curves) -> Iterable[Text]:
    """When memory is fullest; the curves themselves are in the HTML report and the trace."""
    for curve in curves.curves[:_MOST_ROWS]:
        at, peak = curve.peak
        yield Text(f"{curve.name}: {nbytes_text(peak)} from {seconds_text(at)} on")
    if len(curves.curves) > _MOST_ROWS:
        yield Text(f"... and {len(curves.curves) - _MOST_ROWS} more")


def _held(found: Map) -> Table:
    """Devices that hold as much of a layer stand together."""
    rows = []
    for part, nbytes, slices in found.rows:
        shares: dict[tuple[int, str], list[int]] = {}
        for (device, stage), (_, share) in zip(found.columns, slices, strict=True):
            if share > 0:
                shares.setdefault((stage, "whole" if share == 1 else share_text(share)), []).append(int(device))
        where = [f"{text} on {ranges(devices)}" for (_, text), devices in shares.items()]
        rows.append((part, nbytes_text(nbytes), ", ".join(where)))
    return Table((("layer", False), ("bytes each", True), ("on each device", False)), tuple(rows))


def _plot(plot: Plot, width: int) -> Iterable[Text]:
    """A bar per point; the curve itself is in the HTML report."""
    yield Text(f"{plot.y_name} over {plot.x_name}", style="bright_black")
    most = max(y for _, y, _ in plot.points) or 1.0
    names = [f"{x:g}" + (" (this plan)" if x == plot.marked else "") for x, _, _ in plot.points]
    texts = [f"{y:,.1f}" for _, y, _ in plot.points]
    room = max(width - max(map(len, names)) - max(map(len, texts)) - 4, 10)
    for name, text, (_, y, _) in zip(names, texts, plot.points, strict=True):
        bar = "#" * round(y / most * room)
        line = Text(f"{name:>{max(map(len, names))}} [{bar:<{room}}] {text}")
        line.no_wrap = True
        yield line


def _chart(chart: Chart, width: int) -> Iterable[Text]:
    timeline = chart.timeline
    tracks = [track for track in timeline.tracks if any(event.category in _LETTERS for event in track.events)]
    if not tracks or timeline.end_seconds <= 0:
        return
    yield Text(f"{timeline.name}, {seconds_text(timeline.end_seconds)} (F forward, B backward, R once a step, . idle)")
    names = max(len(track.name) for track in tracks)
    for track in tracks[:_MOST_ROWS]:
        line = Text(f"{track.name:<{names}} |")
        for letter in _buckets(track, chart.end_seconds, max(width - names - 3, 10)):
            line.append(letter, style=_STYLES[letter])
        line.append("|")
        line.no_wrap = True
        yield line
    if len(tracks) > _MOST_ROWS:
        yield Text(f"... and {len(tracks) - _MOST_ROWS} more")


def _buckets(track: Track, end: float, count: int) -> str:
    """For each of `count` equal slices of time the letter of what takes most of it."""
    shares: list[dict[str, float]] = [{} for _ in range(count)]
    for event in track.events:
        letter = _LETTERS.get(event.category)
        if letter is None:
            continue
        low, high = event.start_seconds / end * count, event.end_seconds / end * count
        for index in range(max(int(low), 0), min(int(high) + 1, count)):
            part = min(high, index + 1) - max(low, index)
            if part > 0:
                shares[index][letter] = shares[index].get(letter, 0.0) + part
    letters = []
    for found in shares:
        # Rounding must not let idle win over what fills the slice.
        idle = 1.0 - sum(found.values())
        best = max(found.items(), key=lambda item: item[1], default=(".", 0.0))
        letters.append("." if idle > best[1] + 1e-9 else best[0])
    return "".join(letters)


def print_report(plan: Plan, measured: Measured | None = None, what_if: tuple[WhatIf, ...] = ()) -> None:
    """Print to standard output."""
    render_terminal(plan, Console(), measured, what_if)


__all__ = ["print_report", "render_terminal", "render_text"]
