"""Quantities with units as people write them: ``"80 GB"``, ``"450 GB/s"``, ``"8 us"``, ``"989 TFLOP/s"``, ``"6 %"``.

Every `parse_*` takes a number (already in the base unit) or text and returns the base unit; every `format_*` gives the
shortest text that parses back to exactly the same number. All raise ValueError on anything else: unknown units,
negative numbers, not-a-number and infinity.

Decimal prefixes (k, M, G, T, P) are powers of 1000, binary ones (Ki, Mi, Gi, Ti) of 1024. "B" is a byte, "bit" and
"b" a bit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

_PREFIXES = {
    "": 1.0,
    "k": 1e3,
    "K": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "P": 1e15,
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
    "Ti": 2.0**40,
    "Pi": 2.0**50,
}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_BYTES = {prefix + "B": factor for prefix, factor in _PREFIXES.items()}
_BITS = {prefix + bit: factor / 8 for prefix, factor in _PREFIXES.items() for bit in ("bit", "b")}
_RATES = {f"{unit}/s": factor for unit, factor in (_BYTES | _BITS).items()} | {
    f"{prefix}bps": factor / 8 for prefix, factor in _PREFIXES.items()
}
_FLOPS = {
    prefix + unit: factor
    for prefix, factor in _PREFIXES.items()
    if "i" not in prefix
    for unit in ("FLOP/s", "FLOPS", "flop/s", "OP/s")
}
_SHARES = {"": 1.0, "%": 0.01}
_TEXT = re.compile(r"^\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([^\d\s]\S*(?:\s*/\s*\S+)?|)\s*$")


def _parse(value: object, units: Mapping[str, float], what: str, bare: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is not {what}")
    if isinstance(value, str):
        found = _TEXT.match(value)
        unit = re.sub(r"\s*/\s*", "/", found[2]) if found else ""
        if not found or (unit not in units and not (bare and not unit)):
            raise ValueError(f"{value!r} is not {what}")
        factor = units.get(unit, 1.0)
        # Dividing by 1000 is exact where multiplying by 0.001 is not.
        number = float(found[1]) * factor if factor >= 1 else float(found[1]) / round(1 / factor)
    else:
        number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not a finite number")
    if number < 0 or math.copysign(1.0, number) < 0:
        raise ValueError(f"{value!r} is negative")
    return number


def parse_nbytes(value: int | float | str) -> int:
    """Bytes of ``"20 GiB"``, ``"80 GB"``, ``"512"`` or a plain number. Raises ValueError."""
    return round(_parse(value, _BYTES, 'a size such as "80 GB" or "20 GiB"', bare=True))


def parse_bytes_per_s(value: int | float | str) -> float:
    """Bytes per second of ``"450 GB/s"``, ``"10 Gbit/s"`` or a plain number. Raises ValueError."""
    return _parse(value, _RATES, 'a bandwidth such as "450 GB/s" or "10 Gbit/s"', bare=False)


def parse_seconds(value: int | float | str) -> float:
    """Seconds of ``"8 us"``, ``"0.1 ms"`` or a plain number. Raises ValueError."""
    return _parse(value, _SECONDS, 'a time such as "8 us" or "0.1 ms"', bare=False)


def parse_flops_per_s(value: int | float | str) -> float:
    """Floating-point operations per second of ``"989 TFLOP/s"`` or a plain number. Raises ValueError."""
    return _parse(value, _FLOPS, 'a speed such as "989 TFLOP/s"', bare=False)


def parse_share(value: int | float | str) -> float:
    """A share in [0, 1] of ``"6 %"`` or ``0.06``. Raises ValueError."""
    share = _parse(value, _SHARES, 'a share such as "6 %" or 0.06', bare=False)
    if share > 1:
        raise ValueError(f"{value!r} is more than 100 %")
    return share


def _format(number: float, units: Mapping[str, float], base: str) -> str:
    """The shortest of the texts in `units` that parses back to exactly `number`; else repr in the base unit."""
    best = f"{int(number)} {base}" if number.is_integer() and abs(number) < 2**53 else f"{number!r} {base}"
    for unit, factor in units.items():
        scaled = number / factor
        if not 1 <= scaled < 1e6:
            continue
        text = f"{scaled:.12g} {unit}".strip()
        if len(text) <= len(best) and _parse(text, units, "", bare=False) == number:
            best = text
    return best


def format_nbytes(nbytes: int) -> str:
    """Exact text of a number of bytes, e.g. ``80 GB`` or ``20 GiB``."""
    return _format(float(nbytes), {k: v for k, v in _BYTES.items() if k != "KB"}, "B")


def format_bytes_per_s(rate: float) -> str:
    """Exact text of a bandwidth, e.g. ``450 GB/s``."""
    return _format(rate, {f"{p}B/s": f for p, f in _PREFIXES.items() if p != "K" and "i" not in p}, "B/s")


def format_seconds(seconds: float) -> str:
    """Exact text of a time, e.g. ``8 us``."""
    return _format(seconds, {k: v for k, v in _SECONDS.items() if k != "µs"}, "s")


def format_flops_per_s(rate: float) -> str:
    """Exact text of a speed, e.g. ``989 TFLOP/s``."""
    return _format(rate, {f"{p}FLOP/s": f for p, f in _PREFIXES.items() if p != "K" and "i" not in p}, "FLOP/s")


def format_share(share: float) -> str:
    """Exact text of a share, e.g. ``6 %``."""
    text = f"{share * 100:.12g} %"
    return text if parse_share(text) == share else repr(share)
