"""From a segment of the trace to its op-level problem: every op with its legal splits, priced on one mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from shardplan.planner.placement import D, Placement, R, fits
from shardplan.planner.rules import Strategy
from shardplan.planner.search.converting import batch_conversions, conversion_price
from shardplan.planner.search.problem import Option, Price, SegmentProblem, Value
from shardplan.planner.search.runs import Run, held_by, ops_of
from shardplan.planner.search.storing import Window, ways_to_store
from shardplan.planner.storage import Storage
from shardplan.planner.trace import info, infos, is_tensor, mutated, needs_grad, resolve, tensor_args

if TYPE_CHECKING:
    from shardplan.planner.search.columns import Columns


class Builder:
    """The op-level problem of one segment (None where some op has no legal option left)."""

    def __init__(self, columns: Columns, index: int, forced: dict[str, Placement]) -> None:
        self.columns = columns
        self.trace = columns.trace
        self.forced = forced
        self.enters, self.leaves = columns.boundaries.before(index), columns.boundaries.free[index]
        self.entering, self.leaving = columns.boundary_layouts(index - 1), columns.boundary_layouts(index)
        self.index = index
        self.ops = ops_of(self.trace, self.trace.segments[index])
        self.held = held_by(self.trace, self.ops)
        self.written = {buffer for op in self.ops for buffer in mutated(op)}
        self.states: dict[Placement, int] = {R: 0}
        self.numbers: dict[fx.Node, int] = {}
        self.options: list[tuple[Option, ...]] = []
        self.strategies: list[list[Strategy | None]] = []
        self.stored: dict[fx.Node, list[Storage | None]] = {}
        self.names: list[str] = []
        self.values: dict[Value, fx.Node] = {}
        self.constant = Price()
        self.problem = self._problem()

    def state(self, placement: Placement) -> int:
        return self.states.setdefault(placement, len(self.states))

    def _problem(self) -> SegmentProblem | None:
        inside = set(self.ops)
        wanted = self._wanted_of_held()
        enter = -1
        for node in self._outside(inside):
            layouts = self._layouts(node)
            options = [Option(Price(), tuple(self.state(p) for p in layout), ()) for layout in layouts]
            self._add(node, [None] * len(options), options)
            if self.enters is not None and resolve(self.enters)[0] is node:
                enter = self.numbers[node]
        allowed = {node: self._allowed(node, wanted[node]) for node in self.held}
        window = self.columns.window(self.index, allowed)
        for node in self.held:
            self._held(node, allowed[node], window)
        for node in self.ops:
            if not self._op(node):
                return None
            self.constant += batch_conversions(self.columns, node)
        leave = None
        if self.leaves is not None:
            maker, result = resolve(self.leaves)
            leave = (self.numbers[maker], result), tuple(self.state(p) for p in self.leaving)
        names = {number: str(placement) for placement, number in self.states.items()}
        return SegmentProblem(
            tuple(self.names),
            tuple(self.options),
            self._conversions(),
            tuple(names[i] for i in range(len(names))),
            enter,
            leave,
        )

    def run(self, choice: tuple[int, ...]) -> Run:
        """What a choice means, by position in the segment."""
        chosen = {node: self.strategies[number][choice[number]] for node, number in self.numbers.items()}
        storage = tuple(self.stored[n][choice[self.numbers[n]]] for n in self.held)
        return Run(tuple(chosen[n] for n in self.ops), tuple(chosen[n] for n in self.held), storage)

    def _add(self, node: fx.Node, strategies: list[Strategy | None], options: list[Option]) -> None:
        number = self.numbers[node] = len(self.options)
        self.options.append(tuple(options))
        self.strategies.append(strategies)
        self.names.append(node.name)
        for user in [node, *node.users]:
            if resolve(user)[0] is node and is_tensor(user):
                self.values[number, resolve(user)[1]] = user

    def _outside(self, inside: set[fx.Node]) -> list[fx.Node]:
        found: dict[fx.Node, None] = {}
        for node in self.ops:
            for argument in tensor_args(node):
                maker = resolve(argument)[0]
                if maker not in inside and maker not in self.held:
                    found[maker] = None
        return list(found)

    def _layouts(self, node: fx.Node) -> list[list[Placement]]:
        """The ways in which the results of an op of another segment may lie, per layout of what enters."""
        count = max(len(infos(node)), 1)
        if self.enters is None or resolve(self.enters)[0] is not node:
            return [[R] * count]
        place = resolve(self.enters)[1]
        return [[layout if i == place else R for i in range(count)] for layout in self.entering]

    def _wanted_of_held(self) -> dict[fx.Node, list[Placement]]:
        """Placements in which some option reads a parameter or buffer."""
        found: dict[fx.Node, dict[Placement, None]] = {node: {R: None} for node in self.held}
        for node in self.ops:
            for strategy in self.columns.legal(node):
                for argument, placement in zip(tensor_args(node), strategy.inputs, strict=True):
                    if argument in found and placement.kind in ("S", "D"):
                        found[argument][placement] = None
        return {node: list(placements) for node, placements in found.items()}

    def _allowed(self, node: fx.Node, placements: list[Placement]) -> list[Placement]:
        """Placements that a parameter or buffer may have."""
        if node.name in self.forced:
            return [self.forced[node.name]]
        return [p for p in placements if fits(info(node).shape, self.columns.layout(node, p), self.columns.mesh)]

    def _held(self, node: fx.Node, placements: list[Placement], window: Window) -> None:
        """For every placement an option for each way to store it. These differ in price alone, so the elimination's
        tables do not grow."""
        strategies: list[Strategy | None] = []
        options: list[Option] = []
        stored = self.stored[node] = []
        for placement in placements:
            for way in ways_to_store(self.columns, node, placement, window, self.columns.levels_of(node)):
                strategies.append(Strategy("-", (), (placement,)))
                stored.append(way.storage)
                level = f" level {way.storage.level}" if way.storage is not None else ""
                options.append(Option(way.price, (self.state(placement),), (), f"{placement}{level}"))
        self._add(node, strategies, options)

    def _op(self, node: fx.Node) -> bool:
        legal, options = [], []
        pinned = self.leaves is not None and resolve(self.leaves)[0] is node
        crossing = self._crosses(node)
        for strategy in self.columns.legal(node):
            if pinned and self.leaves is not None:
                if strategy.outputs[resolve(self.leaves)[1]] not in self.leaving:
                    continue
            elif crossing and any(p != R for p in strategy.outputs):
                continue
            needs = []
            for argument, placement in zip(tensor_args(node), strategy.inputs, strict=True):
                maker, position = resolve(argument)
                if placement == D and not needs_grad(argument):
                    placement = R
                needs.append(((self.numbers[maker], position), self.state(placement)))
            states = tuple(self.state(p) for p in strategy.outputs)
            legal.append(strategy)
            options.append(Option(self.columns.op_price(node, strategy), states, tuple(needs), strategy.name))
        if options:
            self._add(node, legal, options)
        return bool(options)

    def _crosses(self, node: fx.Node) -> bool:
        """Whether a result is read by other segments, or is the loss. Other results of the model may lie in any way."""
        mine = set(self.trace.segments[self.index].nodes)
        for value in [node, *node.users]:
            if resolve(value)[0] is not node:
                continue
            for reader in value.users:
                if reader.op == "output":
                    if reader.args[0][0] is value:  # type: ignore[index]
                        return True
                elif reader.name not in mine and resolve(reader)[0] is reader:
                    return True
        return False

    def _conversions(self) -> dict[tuple[Value, int, int], Price]:
        placements = {number: placement for placement, number in self.states.items()}
        found: dict[tuple[Value, int, int], Price] = {}
        needed = sorted({need for options in self.options for option in options for need in option.needs})
        for value, target in needed:
            node = self.values.get(value)
            if node is None:
                continue
            for source in sorted({option.states[value[1]] for option in self.options[value[0]]}):
                if source == target or node in self.written:
                    continue
                price = conversion_price(self.columns, node, placements[source], placements[target])
                found[value, source, target] = price
        return found
