"""The Plan: what the planner decided and why, as plain data. The only thing that passes from planner to rewrite.

A plan is JSON (`Plan.save`, `Plan.load`), equal to its reloaded self, and byte-identical for identical input.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardplan.errors import NotSupported, PlanFileError, PlanMismatch
from shardplan.planner.instructions import Schedule, parse_schedule, schedule_text
from shardplan.planner.placement import Mesh
from shardplan.planner.rules.strategy import Strategy
from shardplan.planner.storage import Storage

if TYPE_CHECKING:
    from shardplan.planner.report.measured import Measured

SCHEMA = 1
BUCKET_NBYTES = 25 << 20


@dataclass(frozen=True, slots=True)
class Memory:
    """Predicted bytes on one device at the step's peak. limit: what the device (or the user) allows."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    buffers: int = 0
    reserve: int = 0
    limit: int = 0

    def beside(self, other: Memory) -> Memory:
        """Of two stages on one device, which have the reserve and the limit in common."""
        return Memory(
            self.parameters + other.parameters,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
            self.activations + other.activations,
            self.buffers + other.buffers,
            max(self.reserve, other.reserve),
            max(self.limit, other.limit),
        )

    @property
    def peak_nbytes(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers + self.reserve


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One pipeline stage.

    first, last: the trace's segments ``[first, last)``; blocks: their names.
    ranks: device indices in row-major order of mesh (axes "dp", "tp").
    forward_seconds, backward_seconds: per microbatch, communication inside the stage included (backward includes
        recomputation); once_seconds: gradient reduction, optimizer and what else is done once a step.
    weight_seconds: the part of backward_seconds that a BACKWARD_WEIGHT takes, where the schedule has it.
    optimizer_seconds: the optimizer's part of once_seconds. adding_seconds: the part of backward_seconds that adds to
        gradients of earlier microbatches. communication_seconds: of collectives and conversions in a forward and a
        backward.
    op_seconds: class of ops ("aten.linear.default") -> seconds of a microbatch: forward, backward, forward again in
        backward where activations are recomputed.
    rematerialized: names of segments whose activations are recomputed in backward.
    reductions: part of once_seconds: sums of gradients that go on during the last backward, as (share of it after which
        a bucket's gradients are final, seconds), in order. reducing: share of its speed that the backward loses while
        one of them goes on.
    shares: microbatches of each replica (index on "dp"), where they are not the same for all: every microbatch is then
        run by one replica, the first ones by the first. forward_seconds and backward_seconds are such that all
        microbatches one after another take as long as the slowest replica does for its own. Empty: every replica runs
        its part of every microbatch.
    """

    first: int
    last: int
    blocks: tuple[str, ...]
    ranks: tuple[int, ...]
    mesh: Mesh
    forward_seconds: float
    backward_seconds: float
    once_seconds: float
    memory: Memory
    rematerialized: tuple[str, ...] = ()
    reductions: tuple[tuple[float, float], ...] = ()
    reducing: float = 0.0
    weight_seconds: float = 0.0
    optimizer_seconds: float = 0.0
    adding_seconds: float = 0.0
    communication_seconds: tuple[float, float] = (0.0, 0.0)
    op_seconds: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    shares: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Status:
    """Certificate. outcome: "optimal" (proven within the gap that was asked for), "feasible" (a larger gap or a time
    limit), "given" (made by hand).

    lower_bound: bound on the search's closed form of the step (the 1F1B formula with sums of gradients exposed, scaled
        for other schedules), proven for that form; gap: (its value for this plan - its bound) / that value. The step
        that is simulated may be less than the form where the slowest stage is not the last, or where sums hide behind
        backward (docs/search.md).
    binds: what limits the plan, in words; searched: how many (stages, mesh, microbatch) cases were solved or pruned.
    """

    outcome: str
    lower_bound: float
    gap: float
    solver: str
    seconds: float = field(default=0.0, compare=False)
    binds: tuple[str, ...] = ()
    searched: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Alternative:
    """A baseline or runner-up, scored in the same model. seconds None: does not fit or cannot run; reason says why."""

    name: str
    seconds: float | None
    peak_nbytes: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided of `topic`, and the next best instead, in words.

    seconds: of a step with the other (proven: at least), None where nothing with it fits. nbytes, stage, limit_nbytes:
    what its fullest stage would hold, of how many bytes; 0 where that is not known. name: the case or the parameters
    that are meant. why: what makes it slower.
    """

    topic: str
    chosen: str
    other: str
    seconds: float | None
    proven: bool = False
    nbytes: int = 0
    stage: int = 0
    limit_nbytes: int = 0
    name: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class StageLink:
    """What one microbatch carries between two stages: an activation from source to target (skip connections are links
    of their own) and, where grad_nbytes > 0, its gradient back. Bytes are those of one rank's message, seconds what
    the cost model says for it, latency_seconds the part of them in which the next message can already be sent. sending,
    receiving: share of its speed that compute loses at either end meanwhile."""

    source: int
    target: int
    nbytes: int
    seconds: float
    grad_nbytes: int = 0
    grad_seconds: float = 0.0
    latency_seconds: float = 0.0
    sending: float = 0.0
    receiving: float = 0.0


@dataclass(frozen=True, slots=True)
class NodeSummary:
    """A node of the traced graph as `Plan.explain` and the report need it (made by `planner.describe`).

    order: position in the graph. op: "aten.linear", or "param", "buffer", "constant", "input". name: full name of a
        parameter, buffer or input; for ops the module that they came from. stages: where it is computed or held.
    inputs: nodes that make the tensor arguments, in the order of `Strategy.inputs`; ``name#2`` is result 2 of an op.
    outputs: "float32[8,16]" per tensor result (global shapes). differentiable: whether a gradient flows.
    """

    order: int
    op: str
    name: str
    stages: tuple[int, ...]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    differentiable: bool = False


@dataclass(frozen=True, slots=True)
class DeviceSummary:
    """A device as the plan saw it."""

    kind: str
    node: int
    limit_nbytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """See module docstring.

    fingerprint: of the trace that it is valid for. inputs: name -> "dtype[shape]" of the global batch.
    splits: axis ("mb", "dp", "tp") -> node name -> text of its `Strategy`, placeholders included; nodes not named are
        replicated on that axis.
    simulated_seconds: step time that the simulator gives for `instructions` (step_seconds is the same number).
    replicated_ops: (op, number of nodes, share of the stages' compute, why) for ops that have no rule, so every rank of
        an axis runs them whole. discovered_ops: (op, number of nodes, ways to split it) for ops whose rule was found by
        running them.
    leaves: (name, share of the stages' compute, why, how) for submodules that run whole; how: "batch split", or
        "whole: " and why its batch is not split.
    batch_norm: as in `Trace`.
    links: messages between stages, one entry per edge of the schedule. nodes: node name -> summary, getitem left out.
    decisions: what was decided, each with the next best.
    storage: parameter name -> how it is stored where that is not as it is used (`planner.storage`).
    reduction: what sums of gradients over replicas are sent as, see `planner.wire`: only "exact" is what one device
        computes. average_every: 0; or replicas take that many steps by themselves and then average their parameters.
    offload: "optimizer" where its state is in the memory of the host, else empty.
    bucket_nbytes: about how many bytes of gradients are summed over ranks at a time while backward goes on.
    flops: of a step of the model itself, recomputation left out; peak_flops: per second, of all devices together.
    coverage: share of predicted op seconds that was "measured", "interpolated", "modelled".
    calibration: factors that measured jobs gave and that the predictions contain, by name; calibrated_by: how many.
    overheads: seconds besides ops and messages of a "forward", a "backward" and a "step".
    again: what `with_` calls: solves the problem of this plan anew; only where the plan was found in this process.
    """

    model: str
    fingerprint: str
    batch_size: int
    inputs: dict[str, str]
    devices: tuple[DeviceSummary, ...]
    stages: tuple[StagePlan, ...]
    microbatches: int
    schedule: str
    instructions: Schedule
    splits: dict[str, dict[str, str]]
    step_seconds: float
    status: Status
    baselines: tuple[Alternative, ...] = ()
    runners_up: tuple[Alternative, ...] = ()
    decisions: tuple[Decision, ...] = ()
    coverage: dict[str, float] = field(default_factory=dict)
    replicated_ops: tuple[tuple[str, int, float, str], ...] = ()
    discovered_ops: tuple[tuple[str, int, str], ...] = ()
    leaves: tuple[tuple[str, float, str, str], ...] = ()
    constraints: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    trace_seconds: float = field(default=0.0, compare=False)
    profile_seconds: float = field(default=0.0, compare=False)
    flops: float = 0.0
    peak_flops: float = 0.0
    batch_norm: str = "global"
    links: tuple[StageLink, ...] = ()
    nodes: dict[str, NodeSummary] = field(default_factory=dict)
    storage: dict[str, Storage] = field(default_factory=dict)
    bucket_nbytes: int = BUCKET_NBYTES
    reduction: str = "exact"
    average_every: int = 0
    offload: str = ""
    calibration: dict[str, float] = field(default_factory=dict)
    calibrated_by: int = 0
    overheads: dict[str, float] = field(default_factory=dict)
    schema: int = SCHEMA
    again: Callable[[tuple[Any, ...], dict[str, Any]], Plan] | None = field(default=None, compare=False, repr=False)

    def strategy(self, axis: str, node: str) -> Strategy | None:
        """The chosen strategy of a node on an axis, or None (replicated)."""
        text = self.splits.get(axis, {}).get(node)
        return Strategy.parse(text) if text else None

    @property
    def chunks(self) -> int:
        """Stages that stand at one position of the pipeline, on the same ranks."""
        return len(self.stages) // len({stage.ranks for stage in self.stages})

    def memory(self) -> tuple[Memory, ...]:
        """Predicted memory of every device, by rank: the sum over its stages."""
        by_rank: dict[int, Memory] = {}
        for stage in self.stages:
            for rank in stage.ranks:
                by_rank[rank] = by_rank[rank].beside(stage.memory) if rank in by_rank else stage.memory
        return tuple(by_rank[rank] for rank in sorted(by_rank))

    def degrees(self) -> str:
        """Short text such as ``pp2 x dp1 x tp4, 8 microbatches``, ``pp4 x 2 chunks x dp1 x tp4, 8 microbatches``."""
        meshes = {stage.mesh for stage in self.stages}
        inner = " | ".join(f"dp{m.size('dp')} x tp{m.size('tp')}" for m in sorted(meshes, key=str))
        chunks = f" x {self.chunks} chunks" if self.chunks > 1 else ""
        depth = f"pp{len(self.stages) // self.chunks}{chunks}"
        return f"{depth} x {inner}, {self.microbatches} microbatch{'es' if self.microbatches > 1 else ''}"

    def check(self, fingerprint: str, inputs: dict[str, str], devices: int) -> None:
        """Raises PlanMismatch, naming what differs, if the plan was made for another model, batch or device count."""
        wrong = []
        if inputs != self.inputs:
            wrong.append(f"inputs: planned for {self.inputs}, given {inputs}")
        if fingerprint != self.fingerprint:
            wrong.append(f"model graph: planned for {self.fingerprint}, given {fingerprint}")
        if devices != len(self.devices):
            wrong.append(f"devices: planned for {len(self.devices)}, given {devices}")
        if wrong:
            raise PlanMismatch(
                f"this plan was made for another job ({self.model})", wrong, ["plan again, or drop plan="]
            )

    # -- for people ----------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        """The report as plain text."""
        from shardplan.planner.report import render_text

        return render_text(self)

    def report(self, path: str | os.PathLike[str] | None = None, measured: Measured | None = None) -> None:
        """Print the report, or write it: ``.html`` (one offline file), ``trace.json`` (Chrome trace), ``.json``,
        ``.txt`` or ``.md``. Raises UsageError on another suffix."""
        from shardplan.planner.report import print_report, write_report

        if path is None:
            print_report(self, measured)
        else:
            write_report(self, path, measured)

    def explain(self, pattern: str) -> str:
        """In words, what every parameter and op whose name matches the glob (or lies in the module of that name) does
        on each axis: how it is split and what it communicates. Raises NoMatch, naming the nearest names."""
        from shardplan.planner.report import explain

        return explain(self, pattern)

    def visualize(self, pattern: str) -> str:
        """In words, which device holds which slice of every parameter, buffer or input that matches the glob (of the
        results of ops, where it matches nothing else). Raises NoMatch, naming the nearest names."""
        from shardplan.planner.report import visualize

        return visualize(self, pattern)

    def _repr_html_(self) -> str:
        """The report in a notebook: the whole document in a frame of its own, so that no style leaks."""
        from shardplan.planner.report import notebook

        return notebook(self)

    def with_(self, *constraints: Any, **settings: Any) -> Plan:
        """The plan for the same job under further constraints, or other settings of `plan` (``memory_limit=``,
        ``microbatches=``, ``schedule=`` ...), solved anew from the traced and priced problem: the model is not needed.

        Raises what `plan` raises; NotSupported for a plan that was read from a file, and for what needs another trace.
        """
        if self.again is None:
            raise NotSupported(
                "with_ on a plan without its problem: it was read from a file, or made in another process",
                hints=["shardplan.plan(model, devices, example_inputs, constraints=[...])"],
            )
        return self.again(constraints, settings)

    def diff(self, other: Plan) -> str:
        """What changes from this plan to `other`, in words; "no difference" for equal plans."""
        from shardplan.planner.report import diff

        return diff(self, other)

    # -- files ---------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Deterministic JSON text."""
        return json.dumps(_encode(self), indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str, where: str = "plan") -> Plan:
        """Inverse of `to_json`. Raises PlanFileError."""
        try:
            data = json.loads(text)
            if data.get("schema") != SCHEMA:
                raise PlanFileError(f"{where} has schema {data.get('schema')!r}, this version reads {SCHEMA}")
            return _decode(Plan, data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PlanFileError(f"{where} is not a plan file", [f"{type(error).__name__}: {error}"]) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON; the file is whole or untouched."""
        write_atomically(Path(path), self.to_json().encode())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a plan file. Raises PlanFileError where it is missing or torn."""
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise PlanFileError(f"cannot read {path}", [str(error)]) from error
        return Plan.from_json(text, str(path))


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary name in the same directory, sync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _encode(value: Any) -> Any:
    if isinstance(value, Plan):
        data = _fields(value)
        data["instructions"] = schedule_text(value.instructions).splitlines()
        return data
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _fields(value)
    if isinstance(value, dict):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_encode(item) for item in value]
    return value


def _fields(value: Any) -> dict[str, Any]:
    """What identifies the plan: how long it took to find is left out, so equal plans are equal bytes."""
    return {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare}


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _decode(kind: Any, data: Any) -> Any:
    if kind == Schedule:
        return parse_schedule("\n".join(data))
    if dataclasses.is_dataclass(kind):
        hints = _hints(typing.cast(type, kind))
        known = {f.name for f in dataclasses.fields(kind)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"unknown fields {unknown}")
        return kind(**{name: _decode(hints[name], item) for name, item in data.items()})  # type: ignore[operator]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_decode(arguments[0], item) for item in data)
        return tuple(_decode(part, item) for part, item in zip(arguments, data, strict=True))
    if origin is dict:
        return {key: _decode(arguments[1], item) for key, item in data.items()}
    if origin in (types.UnionType, typing.Union):
        return None if data is None else _decode(next(a for a in arguments if a is not type(None)), data)
    if kind is float and isinstance(data, int):
        return float(data)
    if not isinstance(data, kind):
        raise ValueError(f"expected {kind.__name__}, got {data!r}")
    return data


def input_texts(shapes: Iterable[tuple[str, tuple[int, ...], str]]) -> dict[str, str]:
    """(name, shape, dtype) -> the `Plan.inputs` form, e.g. {"ids": "int64[8,2048]"}."""
    return {name: f"{dtype}[{','.join(map(str, shape))}]" for name, shape, dtype in shapes}
