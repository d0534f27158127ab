"""One row of a table to predict: a transformer's shape, the hardware, and how the work is divided.

A row is what ``shardplan simulate --rows`` reads from a line of JSON. Every field is checked here; a mistake is a
UsageError of one sentence that names the field.

Units. A bandwidth is text with a unit, as in a cluster file (``"300 GB/s"``, ``"1600 Gbit/s"``), in one direction;
``intra_node_bandwidth`` is per device, ``inter_node_bandwidth`` per node unless it ends in "per device". A bare number
below 100,000 is in GB/s (no link is that slow in bytes), a larger one in bytes per second.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from shardplan.errors import UsageError
from shardplan.planner import units
from shardplan.planner.cluster import Cluster

FAMILIES = ("gpt", "llama", "moe")
SCHEDULES = ("1f1b", "gpipe", "interleaved", "zb")
RECOMPUTES = ("none", "selective", "full")
PRECISIONS = ("bf16", "fp16", "fp32", "fp8")
_SECONDS = ("forward", "backward_input", "backward_weight", "send")
_GB_PER_S_BELOW = 1e5


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder-only transformer. ffn: width of the MLP, of one expert in a mixture.

    gated: the MLP has a gate (SwiGLU). experts: 0 for dense models; top_k: experts that a token visits. flash: whether
    attention is one fused kernel, None where the row does not say.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    seq_len: int
    experts: int
    top_k: int
    gated: bool
    flash: bool | None

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def dropout(self) -> bool:
        """Whether dropout keeps masks (GPT of the Megatron line, not Llama)."""
        return self.family == "gpt"


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Given times of every stage of a pipeline, per microbatch; send: one message between neighbours."""

    forward: tuple[float, ...]
    backward_input: tuple[float, ...]
    backward_weight: tuple[float, ...]
    send: float


@dataclass(frozen=True, slots=True)
class Row:
    """A checked row. devices: as `Cluster.parse` takes it. layers_per_stage: one number per stage, or per chunk
    (stages x interleave) in order of the layers; empty: as even as can be. Bandwidths in bytes per second, one
    direction; inter_node_per: "node" or "device". notes: what was understood in a way that its author may want to
    know."""

    id: str
    shape: Shape | None
    devices: str | dict[str, int] | None
    gpus_per_node: int | None
    intra_node_bytes_per_s: float | None
    inter_node_bytes_per_s: float | None
    inter_node_per: str
    tp: int
    pp: int
    dp: int
    cp: int
    ep: int
    interleave: int
    schedule: str
    micro_batch: int
    global_batch: int
    zero: int
    sequence_parallel: bool
    recompute: str
    precision: str
    layers_per_stage: tuple[int, ...]
    stage_seconds: StageSeconds | None
    notes: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def microbatches(self) -> int:
        """Of a step and replica; the last may be smaller where there is no pipeline."""
        return math.ceil(self.global_batch / self.dp / self.micro_batch)

    @property
    def full_microbatches(self) -> float:
        """The same in units of full microbatches."""
        return self.global_batch / self.dp / self.micro_batch


FIELDS = (
    "id", "family", "layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "seq_len", "experts", "top_k", "gated",
    "flash_attention", "devices", "gpus_per_node", "intra_node_bandwidth", "inter_node_bandwidth", "tp", "pp", "dp",
    "cp", "ep", "interleave", "schedule", "micro_batch", "global_batch", "zero", "sequence_parallel", "recompute",
    "precision", "layers_per_stage", "stage_seconds",
)  # fmt: skip


def read_row(data: Mapping[str, Any], default_id: str = "1", sized: int | None = None) -> Row:
    """The row of a JSON object. default_id: where it has none. sized: devices of a cluster that is given apart, in
    place of the row's ``devices``.

    Raises UsageError naming the field.
    """
    if not isinstance(data, Mapping):
        raise UsageError(f"a row is a JSON object, not {_short(data)}")
    reader = _Reader({key: value for key, value in data.items() if value is not None})
    reader.refuse_unknown()
    row_id = reader.given.get("id", default_id)
    if isinstance(row_id, bool) or not isinstance(row_id, (str, int, float)):
        raise UsageError(f"id: {_short(row_id)} is neither text nor a number")
    timed = "stage_seconds" in reader.given
    shape = None if timed and "layers" not in reader.given else _shape(reader)
    devices = reader.given.get("devices")
    if devices is None and sized is None and not timed:
        raise UsageError('devices: is missing; write "64xa100-80g" or {"h100": 4, "a10g": 4}')
    if devices is not None and not isinstance(devices, (str, Mapping)):
        raise UsageError(f'devices: {_short(devices)} is neither "64xa100-80g" nor {{"h100": 4, "a10g": 4}}')
    tp, pp, cp = (reader.count(name, 1) for name in ("tp", "pp", "cp"))
    ep = reader.count("ep", 1)
    count = sized if sized is not None else 0 if devices is None else _device_count(_key(devices))
    dp = reader.count("dp", 0) or (1 if timed else _replicas(count, tp * pp * cp))
    dp, notes = _replicas_meant(count, tp * pp, dp, cp, ep)
    micro_batch = reader.count("micro_batch", 1)
    inter, per = reader.bandwidth("inter_node_bandwidth", "node")
    row = Row(
        id=str(row_id),
        shape=shape,
        devices=dict(devices) if isinstance(devices, Mapping) else devices,
        gpus_per_node=reader.count("gpus_per_node", 0) or None,
        intra_node_bytes_per_s=reader.bandwidth("intra_node_bandwidth", "device")[0],
        inter_node_bytes_per_s=inter,
        inter_node_per=per,
        tp=tp,
        pp=pp,
        dp=dp,
        cp=cp,
        ep=ep,
        interleave=reader.count("interleave", 1),
        schedule=_schedule(reader),
        micro_batch=micro_batch,
        global_batch=reader.count("global_batch", micro_batch * dp),
        zero=reader.whole("zero", 0, 0, 3),
        sequence_parallel=reader.flag("sequence_parallel", False),
        recompute=reader.word("recompute", RECOMPUTES, "none"),
        precision=reader.word("precision", PRECISIONS, "bf16"),
        layers_per_stage=reader.counts("layers_per_stage"),
        stage_seconds=_stage_seconds(reader, pp) if timed else None,
        notes=notes,
    )
    _check(row)
    return row


def _key(devices: str | Mapping[str, int]) -> str | tuple[tuple[str, int], ...]:
    return devices if isinstance(devices, str) else tuple(devices.items())


@lru_cache(maxsize=256)
def _device_count(devices: str | tuple[tuple[str, int], ...]) -> int:
    return len(Cluster.parse(devices if isinstance(devices, str) else dict(devices)))


def _replicas(count: int, ranks: int) -> int:
    """Data parallel degree that uses all devices, where the row does not say."""
    if count < ranks or count % ranks:
        raise UsageError(f"dp: is missing, and tp x pp x cp = {ranks} does not divide {count} devices")
    return count // ranks


def _replicas_meant(count: int, model: int, dp: int, cp: int, ep: int) -> tuple[int, tuple[str, ...]]:
    """The data parallel degree, and a note where a table counts otherwise than we do: expert parallel ranks are some of
    dp, context parallel ones are not. Only a count that then uses exactly all devices is taken to be meant so."""
    ranks = model * dp * cp
    if ep > 1 and ranks * ep == count:
        return dp * ep, (f"dp: {dp} was taken to leave out ep = {ep}, so that all {count} devices are used",)
    if cp > 1 and ranks == count * cp and dp % cp == 0:
        return dp // cp, (f"dp: {dp} was taken to include cp = {cp}, so that {count} devices are enough",)
    return dp, ()


def _shape(reader: _Reader) -> Shape:
    family = reader.word("family", FAMILIES, "gpt" if "experts" not in reader.given else "moe")
    hidden, heads = reader.count("hidden"), reader.count("heads")
    experts = reader.count("experts", 0)
    if family == "moe" and not experts:
        raise UsageError("experts: is missing in a mixture of experts")
    top_k = reader.count("top_k", min(2, experts) if experts else 1)
    if experts and top_k > experts:
        raise UsageError(f"top_k: {top_k} of only {experts} experts")
    kv_heads = reader.count("kv_heads", heads)
    if hidden % heads:
        raise UsageError(f"heads: {heads} do not divide hidden = {hidden}")
    if heads % kv_heads:
        raise UsageError(f"kv_heads: {kv_heads} do not divide heads = {heads}")
    return Shape(
        family=family,
        layers=reader.count("layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        ffn=reader.count("ffn", 4 * hidden),
        vocab=reader.count("vocab"),
        seq_len=reader.count("seq_len"),
        experts=experts,
        top_k=top_k if experts else 1,
        gated=reader.flag("gated", family != "gpt"),
        flash=reader.flag("flash_attention", False) if "flash_attention" in reader.given else None,
    )


def _schedule(reader: _Reader) -> str:
    chunks = reader.count("interleave", 1)
    schedule = reader.word("schedule", SCHEDULES, "interleaved" if chunks > 1 else "1f1b")
    if chunks > 1 and schedule == "1f1b":
        return "interleaved"
    if chunks > 1 and schedule != "interleaved":
        raise UsageError(f"interleave: {chunks} chunks do not go with schedule {schedule!r}")
    return "1f1b" if chunks == 1 and schedule == "interleaved" else schedule


def _stage_seconds(reader: _Reader, pp: int) -> StageSeconds:
    given = reader.given["stage_seconds"]
    if not isinstance(given, Mapping):
        raise UsageError(f"stage_seconds: {_short(given)} is not an object with {', '.join(_SECONDS)}")
    if unknown := sorted(set(given) - set(_SECONDS)):
        raise UsageError(f"stage_seconds: unknown {unknown[0]!r}{_nearest(str(unknown[0]), _SECONDS)}")
    if "forward" not in given:
        raise UsageError("stage_seconds: forward is missing")

    def read(name: str) -> tuple[float, ...]:
        value = given.get(name, 0.0)
        items = value if isinstance(value, list) else [value] * pp
        if len(items) != pp:
            raise UsageError(f"stage_seconds: {name} lists {len(items)} of {pp} stages")
        try:
            return tuple(units.parse_seconds(item) for item in items)
        except ValueError as error:
            raise UsageError(f"stage_seconds: {name}: {error}") from None

    if isinstance(given.get("send"), list):
        raise UsageError("stage_seconds: send is one number")
    times = StageSeconds(read("forward"), read("backward_input"), read("backward_weight"), read("send")[0])
    if not any(times.forward):
        raise UsageError("stage_seconds: forward takes no time")
    return times


def _check(row: Row) -> None:
    """What no single field can tell."""
    if row.global_batch % row.dp:
        raise UsageError(f"global_batch: {row.global_batch} cannot be shared by dp = {row.dp} replicas")
    local = row.global_batch // row.dp
    if row.micro_batch > local:
        raise UsageError(f"micro_batch: {row.micro_batch} is more than a replica's {local} of global_batch")
    if row.pp > 1 and local % row.micro_batch:
        raise UsageError(f"micro_batch: {row.micro_batch} does not divide a replica's {local} of global_batch")
    chunks = row.pp * row.interleave
    if row.interleave > 1 and row.pp == 1:
        raise UsageError("interleave: needs pp of at least 2")
    shape = row.shape
    if shape is None:
        return
    if row.layers_per_stage:
        if len(row.layers_per_stage) not in (row.pp, chunks):
            raise UsageError(f"layers_per_stage: lists {len(row.layers_per_stage)} of {row.pp} stages")
        if sum(row.layers_per_stage) != shape.layers:
            raise UsageError(f"layers_per_stage: adds up to {sum(row.layers_per_stage)} of {shape.layers} layers")
    elif shape.layers < max(row.pp, chunks - 2):  # the chunks with embedding and head may have none
        raise UsageError(f"layers: {shape.layers} are too few for pp x interleave = {chunks} chunks")
    if shape.heads % row.tp:
        raise UsageError(f"tp: {row.tp} does not divide heads = {shape.heads}")
    if shape.seq_len % row.cp:
        raise UsageError(f"cp: {row.cp} does not divide seq_len = {shape.seq_len}")
    if row.ep > 1 and not shape.experts:
        raise UsageError(f"ep: {row.ep} without experts")
    if row.ep > 1 and (shape.experts % row.ep or (row.dp * row.cp * row.tp) % row.ep):
        raise UsageError(f"ep: {row.ep} does not divide experts = {shape.experts} and tp x cp x dp")


class _Reader:
    """Fields of a row by kind."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given

    def refuse_unknown(self) -> None:
        for key in self.given:
            if key not in FIELDS:
                raise UsageError(f"{key}: unknown field{_nearest(str(key), FIELDS)}")

    def whole(self, name: str, default: int | None, low: int, high: float = math.inf) -> int:
        value = self.given.get(name, default)
        if value is None:
            raise UsageError(f"{name}: is missing")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            span = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
            raise UsageError(f"{name}: {_short(value)} is not a whole number {span}")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        return default if name not in self.given and default == 0 else self.whole(name, default, 1)

    def counts(self, name: str) -> tuple[int, ...]:
        value = self.given.get(name, [])
        if not isinstance(value, list) or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in value):
            raise UsageError(f"{name}: {_short(value)} is not a list of whole numbers")
        return tuple(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.given.get(name, default)
        if not isinstance(value, bool):
            raise UsageError(f"{name}: {_short(value)} is neither true nor false")
        return value

    def word(self, name: str, words: tuple[str, ...], default: str) -> str:
        value = self.given.get(name, default)
        if value not in words:
            raise UsageError(f"{name}: {_short(value)} is not one of {', '.join(words)}{_nearest(str(value), words)}")
        return str(value)

    def bandwidth(self, name: str, per: str) -> tuple[float | None, str]:
        """(bytes per second, per what)."""
        value = self.given.get(name)
        if value is None:
            return None, per
        if isinstance(value, str):
            for ending in ("device", "gpu", "node"):
                head, found, tail = value.rpartition(f"per {ending}")
                if found and not tail.strip():
                    value, per = head.strip(), "node" if ending == "node" else "device"
                    break
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and value < _GB_PER_S_BELOW:
            value = value * 1e9
        try:
            rate = units.parse_bytes_per_s(value)
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from None
        if rate <= 0:
            raise UsageError(f"{name}: must be positive")
        return rate, per


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest(word: str, words: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
