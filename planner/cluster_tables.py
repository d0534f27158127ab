"""Reading the tables of a cluster file: every mistake names the file and the key."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from shardplan.errors import ClusterFileError, UsageError
from shardplan.planner import units
from shardplan.planner.cluster import FABRICS, FLOP_TYPES, DeviceKind, Link

SCHEMA = 1
_PER = re.compile(r"^(.*?)\s+per\s+(device|gpu|node)\s*$")

T = TypeVar("T")


class Table:
    """One TOML table being read; knows its place for error messages and which keys nobody asked for."""

    def __init__(self, data: object, path: str, where: str) -> None:
        self.path, self.where = path, where
        if not isinstance(data, dict):
            raise self.error("", f"is a table, not {data!r}")
        self.data: dict[str, Any] = dict(data)

    def error(self, key: str, problem: str, hints: Sequence[str] = ()) -> ClusterFileError:
        """The error that names the file and the full key."""
        place = ".".join(part for part in (self.path, key) if part) or "file"
        return ClusterFileError(f"{self.where}: {place}: {problem}", hints=hints)

    def has(self, key: str) -> bool:
        return key in self.data

    def take(self, key: str, parse: Callable[[Any], T], default: T | None = None) -> T:
        """The value of a key through `parse`; without a default the key must be there."""
        if key not in self.data:
            if default is None:
                raise self.error(key, "is missing")
            return default
        try:
            return parse(self.data.pop(key))
        except ValueError as error:
            raise self.error(key, str(error)) from None

    def table(self, key: str) -> Table:
        """The table under a key, empty where there is none."""
        return Table(self.data.pop(key, {}), f"{self.path}.{key}" if self.path else key, self.where)

    def tables(self, key: str) -> list[Table]:
        """The list of tables under a key."""
        items = self.data.pop(key, [])
        path = f"{self.path}.{key}" if self.path else key
        if not isinstance(items, list):
            raise self.error(key, f"is a list of tables: write [[{path}]]")
        return [Table(item, f"{path}[{index}]", self.where) for index, item in enumerate(items)]

    def finish(self, known: Iterable[str]) -> None:
        """Refuse keys that nobody took; `known` are those that may be written here."""
        for key in self.data:
            near = difflib.get_close_matches(key, list(known), n=1)
            raise self.error(key, "unknown key", [f"did you mean {near[0]!r}?"] if near else [])


def top_table(text: str, where: str) -> Table:
    """The whole file, its schema checked."""
    try:
        top = Table(tomllib.loads(text), "", where)
    except tomllib.TOMLDecodeError as error:
        raise ClusterFileError(f"{where}: not TOML: {error}") from None
    schema = top.take("schema", read_count, 0)
    if schema != SCHEMA:
        found = f"is {schema}" if schema else "is missing"
        raise top.error("schema", f"{found}; this version reads schema = {SCHEMA}")
    return top


def named_tables(table: Table) -> list[tuple[str, Table]]:
    """The tables of a table whose keys are names that the file chooses."""
    return [(name, table.table(name)) for name in list(table.data)]


def usual_torch_device(name: str) -> str:
    """Torch device of a kind that does not say."""
    return "cpu" if name == "cpu" else "cuda"


def read_kind(name: str, table: Table) -> DeviceKind:
    """A ``[device.NAME]`` table."""
    torch_device = table.take("torch_device", one_of("cpu", "cuda"), usual_torch_device(name))
    flops = {kind: table.take(kind, units.parse_flops_per_s) for kind in FLOP_TYPES if table.has(kind)}
    memory = table.take("memory", units.parse_nbytes)
    bandwidth = table.take("memory_bandwidth", units.parse_bytes_per_s)
    reserve = table.take("reserve", units.parse_share, 0.0)
    source = table.take("source", read_text, "")
    table.finish(("torch_device", "memory", "memory_bandwidth", "reserve", "source", *FLOP_TYPES))
    try:
        return DeviceKind(name, torch_device, memory, bandwidth, flops, reserve, source)
    except ValueError as error:
        raise table.error("", str(error)) from None


def read_link(table: Table, level: str, kinds: Iterable[DeviceKind] = ()) -> Link:
    """level: "node", "cluster" or "pair". A bandwidth without "per" is per node for "cluster", else per device."""
    text = table.data.get("bandwidth")
    per = "node" if level == "cluster" else "device"
    if isinstance(text, str) and (found := _PER.match(text)):
        table.data["bandwidth"], per = found[1], "node" if found[2] == "node" else "device"
    bandwidth = table.take("bandwidth", units.parse_bytes_per_s)
    latency = table.take("latency", units.parse_seconds)
    fabric = table.take("kind", one_of(*FABRICS), _guess_fabric(bandwidth, level, kinds))
    source = table.take("source", read_text, "")
    table.finish(("bandwidth", "latency", "kind", "source"))
    try:
        return Link(bandwidth, latency, fabric, per, source)
    except ValueError as error:
        raise table.error("bandwidth", str(error)) from None


def _guess_fabric(bandwidth: float, level: str, kinds: Iterable[DeviceKind]) -> str:
    """Kind of a link that does not say. NVLink begins where PCI Express ends (64 GB/s a direction); its switches reduce
    since the fourth generation (450 GB/s)."""
    if level == "pair" or any(kind.torch_device == "cpu" for kind in kinds):
        return "plain"
    if level == "node":
        return "nvls" if bandwidth >= 400e9 else "nvswitch" if bandwidth > 100e9 else "pcie"
    return "rdma" if bandwidth >= 10e9 else "tcp"


def in_file(parse: Callable[[str], T]) -> Callable[[object], T]:
    """The parser of a text value whose UsageError becomes part of the file's error."""

    def parse_text(value: object) -> T:
        try:
            return parse(read_text(value))
        except UsageError as error:
            raise ValueError("; ".join((error.title, *error.hints))) from None

    return parse_text


def read_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value


def read_bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def read_count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is not a positive whole number")
    return value


def one_of(*words: str) -> Callable[[object], str]:
    """Parser of one of these words."""

    def read_word(value: object) -> str:
        if value not in words:
            raise ValueError(f"{value!r} is not one of {', '.join(words)}")
        return str(value)

    return read_word


def texts_of(count: int) -> Callable[[object], list[str]]:
    """Parser of a text for all devices of a node or a list with one for each."""

    def read_list(value: object) -> list[str]:
        items = value if isinstance(value, list) else [value] * count
        if len(items) != count:
            raise ValueError(f"lists {len(items)} of {count} devices")
        return [read_text(item) for item in items]

    return read_list


def limits_of(kinds: Sequence[DeviceKind]) -> Callable[[object], list[int | None]]:
    """Parser of memory limits, one for all devices of a node or a list with one for each; "" is the device's own."""

    def read_limit(value: Any, kind: DeviceKind) -> int | None:
        if value == "":
            return None
        nbytes = units.parse_nbytes(value)
        if nbytes == 0:
            raise ValueError(f"{value!r} leaves room for nothing")
        if kind.torch_device == "cuda" and nbytes > kind.memory_nbytes:
            raise ValueError(f"{value!r} is more than {kind.name} has ({units.format_nbytes(kind.memory_nbytes)})")
        return nbytes

    def read_limits(value: Any) -> list[int | None]:
        items = value if isinstance(value, list) else [value] * len(kinds)
        if len(items) != len(kinds):
            raise ValueError(f"lists {len(items)} of {len(kinds)} devices")
        return [read_limit(item, kind) for item, kind in zip(items, kinds, strict=True)]

    return read_limits


def pair_of(count: int) -> Callable[[object], tuple[int, int]]:
    """Parser of two different devices of `count`."""

    def read_pair(value: Any) -> tuple[int, int]:
        ok = isinstance(value, list) and len(value) == 2 and all(type(item) is int for item in value)
        if not ok or not all(0 <= item < count for item in value) or value[0] == value[1]:
            raise ValueError(f"{value!r} is not two different devices of 0 .. {count - 1}")
        return value[0], value[1]

    return read_pair
