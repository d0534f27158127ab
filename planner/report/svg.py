"""Drawings of the HTML report: pipeline timelines and memory bars as inline SVG, coloured by CSS classes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

from shardplan.planner.report.blocks import Bar, Bars
from shardplan.planner.report.words import nbytes_text, seconds_text
from shardplan.planner.timeline import Event, Timeline, Track

_WIDTH = 1000.0
_LABEL = 130.0
_ROW, _THIN, _GAP, _BREAK = 24.0, 9.0, 5.0, 26.0
_MOST_BARS = 1600
_MOST_LETTERS = 18
"""Of a track's name beside its row."""
_NUMBER = re.compile(r"\d+$")


class _Scale:
    """Seconds to horizontal positions, over one window or two with a break between them."""

    def __init__(self, windows: list[tuple[float, float]]) -> None:
        self.windows = windows
        room = _WIDTH - _LABEL - _BREAK * (len(windows) - 1)
        whole = sum(high - low for low, high in windows)
        self.factor = room / whole if whole > 0 else 0.0

    def spans(self, event: Event) -> Iterable[tuple[float, float]]:
        """(x, width) of the parts of the event that lie in the windows."""
        left = _LABEL
        for low, high in self.windows:
            start, end = max(event.start_seconds, low), min(event.end_seconds, high)
            if end > start:
                yield left + (start - low) * self.factor, (end - start) * self.factor
            left += (high - low) * self.factor + _BREAK

    def starts(self) -> Iterable[tuple[float, float, float]]:
        """(x, seconds at its start, seconds at its end) of every window."""
        left = _LABEL
        for low, high in self.windows:
            yield left, low, high
            left += (high - low) * self.factor + _BREAK


def timeline_svg(timeline: Timeline, end: float) -> str:
    """One row per track, from 0 to `end` seconds; long timelines show their beginning and end. Those on one scale are
    one group, which the script zooms together."""
    if timeline.end_seconds <= 0:
        return ""
    compute = [track for track in timeline.tracks if not _is_link(track)]
    links = [track for track in timeline.tracks if _is_link(track)]
    # A timeline that is cut has a scale of its own.
    windows = _windows(timeline)
    group = "own " + timeline.name if len(windows) > 1 else "one scale"
    scale = _Scale(windows if len(windows) > 1 else [(0.0, max(end, timeline.end_seconds))])
    parts: list[str] = []
    top = 4.0
    for track in compute:
        parts += _row(track, scale, top, _ROW, True)
        top += _ROW + _GAP
    for track in links:
        parts += _row(track, scale, top, _THIN, False)
        top += _THIN + _GAP
    parts += _axis(scale, top)
    label = f"{timeline.name} timeline of one step, {seconds_text(timeline.end_seconds)}"
    return (
        f'<svg class="timeline" role="img" aria-label="{escape(label)}" viewBox="0 0 {_WIDTH:.0f} {top + 22:.0f}" '
        f'data-left="{_LABEL:.0f}" data-group="{escape(group)}">' + "".join(parts) + "</svg>"
    )


def _is_link(track: Track) -> bool:
    return all(event.category == "transfer" for event in track.events)


def _windows(timeline: Timeline) -> list[tuple[float, float]]:
    end = timeline.end_seconds
    events = [event for track in timeline.tracks for event in track.events]
    if len(events) <= _MOST_BARS:
        return [(0.0, end)]
    first = sorted(event.start_seconds for event in events)[_MOST_BARS * 2 // 3]
    last = sorted(event.end_seconds for event in events)[-_MOST_BARS // 3]
    return [(0.0, first), (last, end)] if first < last else [(0.0, end)]


def _row(track: Track, scale: _Scale, top: float, height: float, named: bool) -> Iterable[str]:
    size = "" if named else ' class="small"'
    short = track.name if len(track.name) <= _MOST_LETTERS else track.name[: _MOST_LETTERS - 2] + ".."
    yield (
        f'<text x="0" y="{top + height / 2 + 4:.0f}"{size}>{escape(short)}<title>{escape(track.name)}</title></text>'
    )
    if named:
        yield f'<rect class="idle" x="{_LABEL:.0f}" y="{top:.0f}" width="{_WIDTH - _LABEL:.0f}" height="{height:.0f}"/>'
    for event in track.events:
        for x, width in scale.spans(event):
            name = escape(event.name)
            if width < 1.5:
                # Too thin for a pointer to meet: no tooltip, so that long timelines stay small.
                box = f'y="{top:.0f}" width="{width:.2f}" height="{height:.0f}"'
                yield f'<rect class="{event.category}" x="{x:.1f}" {box}/>'
                continue
            seconds = seconds_text(event.end_seconds - event.start_seconds)
            yield (
                f'<rect class="{event.category}" x="{x:.1f}" y="{top:.0f}" width="{max(width - 0.6, 1):.1f}" '
                f'height="{height:.0f}"><title>{name}, {seconds}</title></rect>'
            )
            number = _NUMBER.search(event.name)
            if named and number and width > 7 * len(number[0]) + 5:
                yield f'<text class="on" x="{x + width / 2:.1f}" y="{top + height / 2 + 4:.0f}">{number[0]}</text>'


def _axis(scale: _Scale, top: float) -> Iterable[str]:
    for x, low, high in scale.starts():
        right = x + (high - low) * scale.factor
        yield f'<line x1="{x:.1f}" y1="{top:.0f}" x2="{right:.1f}" y2="{top:.0f}"/>'
        yield f'<text class="small" x="{x:.1f}" y="{top + 14:.0f}">{seconds_text(low)}</text>'
        yield f'<text class="small end" x="{right:.1f}" y="{top + 14:.0f}">{seconds_text(high)}</text>'
    for x in list(scale.starts())[1:]:
        yield f'<rect class="cut" x="{x[0] - _BREAK:.1f}" y="0" width="{_BREAK:.1f}" height="{top:.0f}"/>'
        yield f'<text class="on cut-text" x="{x[0] - _BREAK / 2:.1f}" y="{top / 2:.0f}">...</text>'


def bar_svg(bar: Bar, bars: Bars) -> str:
    """A stacked bar that stretches to its box, with the limit as a line."""
    scale = _WIDTH / bars.scale_nbytes
    parts = []
    x = 0.0
    for name, nbytes in bar.parts:
        if nbytes:
            parts.append(
                f'<rect class="{name}" x="{x:.1f}" y="0" width="{nbytes * scale:.1f}" height="16">'
                f"<title>{name} {nbytes_text(nbytes)}</title></rect>"
            )
            x += nbytes * scale
    if bar.limit_nbytes:
        end = min(bar.limit_nbytes * scale, _WIDTH)
        parts.insert(0, f'<rect class="idle" x="0" y="0" width="{end:.1f}" height="16"/>')
        if bar.limit_nbytes <= bars.scale_nbytes:
            parts.append(f'<rect class="limit" x="{max(end - 3, 0):.1f}" y="0" width="3" height="16"/>')
    if bar.measured_nbytes is not None:
        at = min(bar.measured_nbytes * scale, _WIDTH)
        parts.append(f'<rect class="seen" x="{max(at - 2, 0):.1f}" y="0" width="4" height="16"/>')
    label = f"memory of {bar.name}: {bar.text}"
    return (
        f'<svg class="bar" role="img" aria-label="{escape(label)}" viewBox="0 0 {_WIDTH:.0f} 16" '
        f'preserveAspectRatio="none">' + "".join(parts) + "</svg>"
    )
