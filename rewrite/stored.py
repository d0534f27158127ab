"""Which parameters of a stage are stored in parts, and the calls by which its code gets them whole."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from torch import fx

from shardplan.errors import PlanMismatch
from shardplan.planner.placement import D, Layout, Mesh
from shardplan.planner.plan import Plan
from shardplan.planner.storage import Storage
from shardplan.planner.trace import Trace, info
from shardplan.rewrite import storage

if TYPE_CHECKING:
    from shardplan.rewrite.lower import StageLowering


def storage_of(plan: Plan, trace: Trace, placeholder: str, layout: Layout, mesh: Mesh) -> Storage | None:
    """How a parameter is stored on a stage; None: as it is used. layout: for its use.

    Raises PlanMismatch where the plan splits what is split already, or a dim that is not there.
    """
    source = trace.sources[placeholder]
    found = plan.storage.get(source.name)
    if found is None or mesh.size(found.axis) == 1 or (found.level < 3 and not source.trainable):
        return None
    if layout[mesh.axes.index(found.axis)].is_shard:
        raise PlanMismatch(f"{source.name} is split over {found.axis} for its use", [f"and stored: {found}"])
    if found.dim >= len(info(trace.node(placeholder)).shape):
        raise PlanMismatch(f"{source.name} has no dim {found.dim}", [f"stored: {found}"])
    return found


class StoredParameters:
    """The parameters of one stage that its code has to ask for, while it is lowered.

    runs: the stage's ops in order, in runs of one segment each. What a run reads is gathered at once.
    """

    def __init__(self, lowering: StageLowering, runs: Iterable[list[fx.Node]]) -> None:
        self._lowering = lowering
        self._parts: dict[str, fx.Node] = {}
        self._wholes: dict[str, fx.Node] = {}
        read = [dict.fromkeys(a for node in run for a in node.all_input_nodes if a.op == "placeholder") for run in runs]
        self._gathered = [self._of_level(3, values) for values in read]
        self._resident = [self._of_level(2, values) if lowering.train else [] for values in read]
        self._started: dict[int, fx.Node] = {}

    def _of_level(self, level: int, values: Iterable[fx.Node]) -> list[fx.Node]:
        stored = self._lowering.stored
        return [value for value in values if value.name in stored and stored[value.name].level == level]

    def gathers(self, run: int) -> bool:
        """Whether parameters are gathered for the run."""
        return bool(self._gathered[run])

    def ahead(self, run: int) -> None:
        """Outside groups: begin to gather for the run and for the next one that needs it; what is resident."""
        if self.gathers(run):
            later = [i for i in range(run + 1, len(self._gathered)) if self.gathers(i)]
            for each in (run, *later[:1]):
                self._start(each)
        if self._resident[run]:
            found = self._resident[run]
            wholes = tuple(self._whole(parameter) for parameter in found)
            self._hand_out(found, self._call(storage.resident, self._places(found), self._shards(found), wholes))

    def begin(self, run: int) -> None:
        """In the run's group: its parameters, whole."""
        if self.gathers(run):
            self._hand_out(self._gathered[run], self._lowering.emit(storage.finish, (self._started[run],), {}))

    def end(self, run: int) -> None:
        """Other runs ask for their parameters themselves."""
        gone = {parameter.name for parameter in (*self._gathered[run], *self._resident[run])}
        for name in gone:
            del self._lowering.home[name]
        for key in [key for key in self._lowering.converted if key[0] in gone]:
            del self._lowering.converted[key]

    def fetch(self, parameter: fx.Node) -> fx.Node:
        """A parameter that is asked for outside of runs (the model hands it out itself)."""
        level = self._lowering.stored[parameter.name].level
        if level == 1 or not (self._lowering.train or level == 3):
            return self._whole(parameter)
        places, parts = self._places([parameter]), self._shards([parameter])
        if level == 2:
            made = self._call(storage.resident, places, parts, (self._whole(parameter),))
        else:
            made = self._lowering.emit(storage.finish, (self._call(storage.start, places, parts),), {})
        return self._lowering.emit(operator.getitem, (made, 0), {})

    def _start(self, run: int) -> None:
        if run not in self._started:
            found = self._gathered[run]
            earlier = list(self._started.values())[-1:]
            self._started[run] = self._call(storage.start, self._places(found), self._shards(found), *earlier)

    def _hand_out(self, parameters: list[fx.Node], made: fx.Node) -> None:
        for position, parameter in enumerate(parameters):
            item = self._lowering.emit(operator.getitem, (made, position), {})
            self._lowering.home[parameter.name] = item

    def _call(self, function: Callable[..., object], *arguments: object) -> fx.Node:
        return self._lowering.emit(function, (self._lowering.comm, *arguments), {})

    def _shards(self, parameters: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
        return tuple(self._argument(self._parts, parameter, "shard") for parameter in parameters)

    def _whole(self, parameter: fx.Node) -> fx.Node:
        return self._argument(self._wholes, parameter, "param")

    def _argument(self, known: dict[str, fx.Node], parameter: fx.Node, kind: str) -> fx.Node:
        if parameter.name not in known:
            name = self._lowering.trace.sources[parameter.name].name
            known[parameter.name] = self._lowering.argument(parameter, kind, name)
        return known[parameter.name]

    def _places(self, parameters: Iterable[fx.Node]) -> tuple[storage.Place, ...]:
        return tuple(map(self._place, parameters))

    def _place(self, parameter: fx.Node) -> storage.Place:
        mesh = self._lowering.mesh
        kept = self._lowering.stored[parameter.name]
        summand = self._lowering.layout(parameter)[mesh.axes.index(kept.axis)] == D
        trace = self._lowering.trace
        used = info(parameter).dtype if trace.sources[parameter.name].name in trace.masters else None
        return kept.axis, kept.dim, self._lowering.local_shape(parameter)[kept.dim], summand, used
