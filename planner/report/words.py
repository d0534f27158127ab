"""Numbers and names as people read them."""

from __future__ import annotations

import re
from collections.abc import Iterable

_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
_SIZES = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")


def seconds_text(seconds: float | None) -> str:
    """Three significant digits: ``12.3 ms``; ``-`` for None."""
    if seconds is None:
        return "-"
    for factor, unit in _TIMES:
        # 0.9995 of a unit is rounded to 1.00 of it, not to 1000 of the next.
        if abs(seconds) >= 0.9995 * factor:
            return f"{_three(seconds / factor)} {unit}"
    return "0 s"


def nbytes_text(nbytes: float | None) -> str:
    """Three significant digits in binary units: ``1.50 GiB``; ``-`` for None."""
    if nbytes is None:
        return "-"
    for factor, unit in _SIZES:
        if abs(nbytes) >= factor:
            return f"{_three(nbytes / factor)} {unit}"
    return f"{nbytes:.0f} B"


def share_text(share: float) -> str:
    """``12 %``, with a decimal below ten percent."""
    percent = 100 * share
    return f"{percent:.0f} %" if abs(percent) >= 10 or percent == 0 else f"{percent:.1f} %"


def change_text(new: float, old: float) -> str:
    """``+12 %`` from old to new; empty where old is zero."""
    if not old:
        return ""
    percent = 100 * (new / old - 1)
    return f"{percent:+.0f} %" if abs(percent) >= 10 else f"{percent:+.1f} %"


def ratio_text(ratio: float) -> str:
    """``1.25x``."""
    return f"{_three(ratio)}x"


def plural(count: int, noun: str) -> str:
    """``1 stage``, ``2 stages``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def ranges(numbers: Iterable[int]) -> str:
    """``0-3, 6``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def pattern(name: str) -> str:
    """The name with every number between dots as ``*``: ``layers.*.mlp.weight``."""
    return _NUMBER.sub("*", name)


def numbers(name: str) -> tuple[int, ...]:
    """The numbers that `pattern` leaves out."""
    return tuple(map(int, _NUMBER.findall(name)))


def names_text(names: Iterable[str]) -> str:
    """Names, those of one pattern together: ``embed, layers.[0-3].mlp``. Numbers are listed for the first star."""
    groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for name in names:
        found = numbers(name)
        groups.setdefault((pattern(name), found[1:]), []).extend(found[:1])
    texts = []
    for (text, rest), firsts in groups.items():
        if firsts:
            span = ranges(firsts)
            text = text.replace("*", span if len(set(firsts)) == 1 else f"[{span}]", 1)
        for number in rest:
            text = text.replace("*", str(number), 1)
        texts.append(text)
    return ", ".join(texts)


def _three(value: float) -> str:
    magnitude = abs(value)
    if magnitude >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if magnitude >= 9.995 else f"{value:.2f}"
