"""Line and bar charts as SVG text, for docs/benchmarks.md: no library, the same bytes for the same figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 720.0, 360.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 70.0, 190.0, 34.0, 46.0
_COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#6b7280", "#be185d")

Points = Sequence[tuple[float, float]]


def lines(
    title: str, x_name: str, y_name: str, curves: Mapping[str, Points], log_x: bool = False, log_y: bool = False
) -> str:
    """Curves through (x, y), named at the right; points have their figures as tooltips."""
    every = [point for points in curves.values() for point in points]
    across = _Axis([x for x, _ in every], _LEFT, _WIDTH - _RIGHT, log_x)
    up = _Axis([y for _, y in every], _HEIGHT - _BOTTOM, _TOP, log_y, zero=not log_y)
    parts = _frame(title, x_name, y_name, across, up)
    for number, (name, points) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        spots = [(across.at(x), up.at(y)) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>')
        for (x, y), (at, value) in zip(spots, points, strict=True):
            told = escape(f"{name}: {_figure(at)}, {_figure(value)}")
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{told}</title></circle>')
        parts += _named(name, number, colour)
    return _whole(parts, title)


def scatter(title: str, x_name: str, y_name: str, groups: Mapping[str, Points]) -> str:
    """Points by group on two logarithmic axes of one scale, with the diagonal."""
    values = [value for points in groups.values() for point in points for value in point]
    across = _Axis(values, _LEFT, _WIDTH - _RIGHT, True)
    up = _Axis(values, _HEIGHT - _BOTTOM, _TOP, True)
    parts = _frame(title, x_name, y_name, across, up)
    low, high = min(values), max(values)
    ends = f'x1="{across.at(low):.1f}" y1="{up.at(low):.1f}" x2="{across.at(high):.1f}" y2="{up.at(high):.1f}"'
    parts.append(f'<line {ends} stroke="#9ca3af" stroke-dasharray="4 3"/>')
    for number, (name, points) in enumerate(groups.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        for x, y in points:
            parts.append(
                f'<circle cx="{across.at(x):.1f}" cy="{up.at(y):.1f}" r="2.5" fill="{colour}" fill-opacity="0.6"/>'
            )
        parts += _named(name, number, colour)
    return _whole(parts, title)


def bars(title: str, unit: str, values: Mapping[str, float]) -> str:
    """Horizontal bars, one a name, with their figures."""
    most = max(values.values(), default=1.0) or 1.0
    room, height = _WIDTH - 330.0, 34.0 + 24.0 * len(values)
    parts = [f'<text x="10" y="20" font-weight="bold">{escape(title)}</text>']
    for number, (name, value) in enumerate(values.items()):
        y = 34.0 + 24.0 * number
        parts.append(f'<text x="230" y="{y + 13:.1f}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<rect x="240" y="{y:.1f}" width="{room * value / most:.1f}" height="17" '
            f'fill="{_COLOURS[0] if number == 0 else _COLOURS[6]}"/>'
        )
        parts.append(
            f'<text x="{246 + room * value / most:.1f}" y="{y + 13:.1f}">{_figure(value)} {escape(unit)}</text>'
        )
    return _whole(parts, title, height + 8)


class _Axis:
    """Values to positions between two ends, with its ticks."""

    def __init__(self, values: Sequence[float], start: float, stop: float, log: bool, zero: bool = False) -> None:
        self.start, self.stop, self.log = start, stop, log
        low, high = min(values), max(values)
        low = 0.0 if zero else low
        if log:
            low, high = math.log10(low), math.log10(high)
        pad = 0.04 * (high - low) or 0.5
        self.low, self.high = (low if zero else low - pad), high + pad

    def at(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            found = [
                step * 10.0**power
                for power in range(math.floor(self.low), math.ceil(self.high) + 1)
                for step in (1, 2, 5)
                if self.low <= math.log10(step * 10.0**power) <= self.high
            ]
            return found if len(found) <= 9 else [t for t in found if round(math.log10(t), 6).is_integer()]
        step = 10.0 ** math.floor(math.log10(max(self.high - self.low, 1e-12) / 3))
        step *= next(k for k in (1, 2, 5, 10) if (self.high - self.low) / (step * k) <= 6)
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step) + 1)]


def _frame(title: str, x_name: str, y_name: str, across: _Axis, up: _Axis) -> list[str]:
    parts = [f'<text x="{_LEFT}" y="20" font-weight="bold">{escape(title)}</text>']
    for tick in up.ticks():
        y = up.at(tick)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_figure(tick)}</text>')
    for tick in across.ticks():
        x = across.at(tick)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{_figure(tick)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_name)}</text>')
    side = (_TOP + _HEIGHT - _BOTTOM) / 2
    turned = f'transform="rotate(-90 16 {side})"'
    parts.append(f'<text x="16" y="{side}" text-anchor="middle" {turned}>{escape(y_name)}</text>')
    return parts


def _named(name: str, number: int, colour: str) -> list[str]:
    x, y = _WIDTH - _RIGHT + 14, _TOP + 12 + 19 * number
    return [
        f'<rect x="{x}" y="{y - 8}" width="12" height="8" fill="{colour}"/>',
        f'<text x="{x + 18}" y="{y}">{escape(name)}</text>',
    ]


def _whole(parts: Sequence[str], title: str, height: float = _HEIGHT) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _figure(value: float) -> str:
    if value >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
