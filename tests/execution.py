"""Run one op, split by a strategy, on simulated ranks, and compare it with the op as one device runs it.

Inputs are laid out by their state (a summand is random, summands add up to the whole), the local op runs on every rank,
results are put together by their state; then the same backward, with the states of the gradients. This proves a rule
exact in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from shardplan.planner.placement import Layout, Mesh, R, fits, local_slices
from shardplan.planner.rules import LocalCall, Slot, Strategy, groups_fit, local_call
from shardplan.planner.trace import infos, mutated, needs_grad, set_mutated, set_needs_grad, tensor_args
from shardplan.rewrite import kernels
from shardplan.rewrite.implement import IMPLEMENTATIONS, OpContext, implementation_of
from shardplan.rewrite.threads import ThreadComm, run_ranks

Coordinate = tuple[int, ...]
Parts = dict[Coordinate, torch.Tensor]


@dataclass(slots=True)
class Op:
    """One traced op with real values. values: of its tensor arguments, in order; results: of one device."""

    node: fx.Node
    values: list[torch.Tensor]
    results: list[torch.Tensor]
    gradients: list[torch.Tensor] = field(default_factory=list)
    wanted: list[torch.Tensor | None] = field(default_factory=list)
    written: list[torch.Tensor] = field(default_factory=list)


_FROZEN: dict[int, torch.Tensor] = {}


def frozen(x: torch.Tensor) -> torch.Tensor:
    """Mark a tensor as one that never gets a gradient (a buffer, class weights)."""
    _FROZEN[id(x)] = x
    return x


def op_of(
    target: Any, *args: Any, grads: Sequence[bool] | None = None, graph: fx.Graph | None = None, **kwargs: Any
) -> Op:
    """A one-op graph; every distinct tensor among the arguments becomes a placeholder, and every node keeps its place.

    grads: which tensor arguments need a gradient (default: those that can); the op's true results and gradients are
    computed here.
    """
    graph = graph or fx.Graph()
    values: list[torch.Tensor] = []
    nodes: dict[int, fx.Node] = {}
    count = 0

    def place(leaf: Any) -> Any:
        nonlocal count
        if not isinstance(leaf, torch.Tensor):
            return leaf
        values.append(leaf)
        if id(leaf) not in nodes:
            node = nodes[id(leaf)] = graph.placeholder(f"x{len(nodes)}")
            node.meta["val"] = leaf.detach()
            wants = leaf.is_floating_point() and id(leaf) not in _FROZEN
            set_needs_grad(node, wants and (grads is None or grads[count]))
        count += 1
        return nodes[id(leaf)]

    args, kwargs = pytree.tree_map(place, (args, kwargs))
    node = graph.call_function(target, args, kwargs)
    graph.output((node,))
    op = Op(node, values, [])
    arguments = tensor_args(node)
    assert [a.meta["val"].shape for a in arguments] == [v.shape for v in values]
    leaves = [v.detach().clone().requires_grad_(needs_grad(a)) for v, a in zip(values, arguments, strict=True)]
    result = call_with(target, node.args, node.kwargs, leaves)
    node.meta["val"] = pytree.tree_map(lambda r: r.detach() if isinstance(r, torch.Tensor) else r, result)
    op.results = [r for r in pytree.tree_leaves(result) if isinstance(r, torch.Tensor)]
    set_needs_grad(node, any(r.requires_grad for r in op.results))
    buffers = tuple(
        a for a, leaf, v in zip(arguments, leaves, values, strict=True) if not torch.equal(leaf.detach(), v)
    )
    set_mutated(node, buffers)
    op.written = [leaf.detach() for leaf in leaves]
    op.gradients = [torch.randn_like(r) if r.requires_grad else torch.zeros_like(r) for r in op.results]
    live = [(r, g) for r, g in zip(op.results, op.gradients, strict=True) if r.requires_grad]
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(grad_of(live, asked))
    op.wanted = [next(found) if leaf.requires_grad else None for leaf in leaves]
    op.results = [r.detach() for r in op.results]
    return op


def grad_of(live: Sequence[tuple[torch.Tensor, torch.Tensor]], leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of leaves, zeros where none flows."""
    if not live or not leaves:
        return [torch.zeros_like(leaf) for leaf in leaves]
    outputs, gradients = zip(*live, strict=True)
    found = torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g.to_dense() for leaf, g in zip(leaves, found, strict=True)]


def call_with(target: Any, args: Any, kwargs: Any, values: Sequence[torch.Tensor]) -> Any:
    """Call with nodes or slots replaced by values, in order (each occurrence of a node is a value of its own)."""
    given = iter(values)

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, Slot):
            return values[leaf.index]
        return next(given) if isinstance(leaf, fx.Node) else leaf

    return target(*map_structure(fill, args), **map_structure(fill, kwargs))


def map_structure(function: Callable[[Any], Any], value: Any) -> Any:
    """fx keeps its own list and dict types, which pytree does not open."""
    if isinstance(value, tuple):
        return tuple(map_structure(function, v) for v in value)
    if isinstance(value, list):
        return [map_structure(function, v) for v in value]
    if isinstance(value, dict):
        return {k: map_structure(function, v) for k, v in value.items()}
    return function(value)


# -- layouts -----------------------------------------------------------------------------------------------------------


def coordinates(mesh: Mesh) -> list[Coordinate]:
    return list(product(*(range(size) for size in mesh.sizes)))


def shard(whole: torch.Tensor, layout: Layout, mesh: Mesh, coordinate: Coordinate) -> torch.Tensor:
    """The rank's slice of a tensor."""
    place = dict(zip(mesh.axes, coordinate, strict=True))
    for dim, pieces in enumerate(local_slices(whole.shape, layout, mesh, place)):
        whole = torch.cat([whole.narrow(dim, start, stop - start) for start, stop in pieces], dim)
    return whole


def spread(whole: torch.Tensor, layout: Layout, mesh: Mesh, summed: str) -> Parts:
    """What every rank holds of a tensor: slices, copies, and on axes in the state `summed` random summands."""
    axes = [i for i, placement in enumerate(layout) if placement.kind == summed]
    combinations = list(product(*(range(mesh.sizes[i]) for i in axes)))
    summands = [torch.randint(-9, 9, whole.shape).to(whole.dtype) for _ in combinations[1:]]
    if whole.is_floating_point():
        summands = [torch.randn_like(whole) for _ in combinations[1:]]
    by_place = dict(zip(combinations, [whole - sum(summands) if summands else whole, *summands], strict=True))
    return {c: shard(by_place[tuple(c[i] for i in axes)], layout, mesh, c) for c in coordinates(mesh)}


def check(
    parts: Mapping[Coordinate, torch.Tensor], whole: torch.Tensor, layout: Layout, mesh: Mesh, summed: str, where: str
):
    """Every rank holds its slice or copy of `whole`, and summands add up to it."""
    axes = [i for i, placement in enumerate(layout) if placement.kind == summed]
    for coordinate in coordinates(mesh):
        if any(coordinate[i] for i in axes):
            continue
        mine = [part for c, part in parts.items() if all(c[i] == coordinate[i] for i in range(len(c)) if i not in axes)]
        total = sum(mine[1:], mine[0])
        expected = shard(whole, layout, mesh, coordinate)
        place = f"{where} on rank {coordinate}"
        assert total.shape == expected.shape, f"{place}: shape {tuple(total.shape)}, not {tuple(expected.shape)}"
        assert total.dtype == expected.dtype, f"{place}: {total.dtype}, not {expected.dtype}"
        error = 2e-5 if expected.dtype in (torch.float32, torch.complex64) else 1e-9
        torch.testing.assert_close(
            total,
            expected,
            rtol=error,
            atol=error,
            equal_nan=True,
            msg=lambda m: f"{place}: {m}",  # noqa: B023
        )


# -- execution ---------------------------------------------------------------------------------------------------------


class Direct:
    """Stands for the stage graph that `rewrite.implement` emits into: runs every call at once."""

    def __init__(self, comm: ThreadComm) -> None:
        self.comm = comm
        self.sites = _Sites()
        self.device = torch.device("cpu")

    def fill(self, value: Any, arguments: list[torch.Tensor]) -> Any:
        return map_structure(lambda leaf: arguments[leaf.index] if isinstance(leaf, Slot) else leaf, value)

    def emit(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return function(*args, **kwargs)

    def denominator(self, op: OpContext, axes: tuple[str, ...], weight: Any, ignore_index: int) -> torch.Tensor:
        count = kernels.cross_entropy_count(op.arguments[1], weight, ignore_index)  # type: ignore[arg-type]
        for axis in axes:
            count = self.comm.all_reduce(count, axis)
        return count


class _Sites:
    def __getitem__(self, name: str) -> int:
        return 7


def run_local(
    node: fx.Node,
    call: LocalCall,
    chosen: dict[str, Strategy],
    comm: ThreadComm,
    mesh: Mesh,
    inputs: list[torch.Tensor],
) -> Any:
    """The local op of one rank, implementations and scaling included."""
    name = implementation_of(node, chosen)
    if name is not None:
        result: Any = IMPLEMENTATIONS[name](OpContext(Direct(comm), node, call, inputs, chosen))  # type: ignore[arg-type]
    else:
        result = call_with(call.target, call.args, call.kwargs, inputs)
    for axis, strategy in chosen.items():
        if strategy.scale:
            result = result * (1.0 / mesh.size(axis))
    return result


def layouts(op: Op, chosen: Mapping[str, Strategy], mesh: Mesh) -> tuple[list[Layout], list[Layout]]:
    """Layouts of the arguments and the results."""
    ins = [tuple(chosen[a].inputs[i] if a in chosen else R for a in mesh.axes) for i in range(len(op.values))]
    outs = [tuple(chosen[a].outputs[i] if a in chosen else R for a in mesh.axes) for i in range(len(op.results))]
    return ins, outs


def can_run(op: Op, chosen: Mapping[str, Strategy], mesh: Mesh) -> bool:
    """Whether every shard divides, and no group is cut."""
    if not groups_fit(chosen, mesh):
        return False
    ins, outs = layouts(op, chosen, mesh)
    return all(fits(v.shape, layout, mesh) for v, layout in zip(op.values, ins, strict=True)) and all(
        fits(r.shape, layout, mesh) for r, layout in zip(op.results, outs, strict=True)
    )


def verify(op: Op, chosen: dict[str, Strategy], mesh: Mesh) -> None:
    """Raises AssertionError where the split op is not the op, forward or backward."""
    where = f"{op.node.target} {', '.join(f'{a} {s}' for a, s in chosen.items())}"
    ins, outs = layouts(op, chosen, mesh)
    arguments = tensor_args(op.node)
    inputs = [spread(v, layout, mesh, "P") for v, layout in zip(op.values, ins, strict=True)]
    gradients = [spread(g, layout, mesh, "D") for g, layout in zip(op.gradients, outs, strict=True)]
    call = local_call(op.node, chosen, mesh)
    assert [i.shape for i in infos(op.node)] == [r.shape for r in op.results]

    def rank(comm: ThreadComm) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        c = tuple(comm.index(axis) for axis in mesh.axes)
        leaves = [p[c].detach().clone().requires_grad_(needs_grad(a)) for p, a in zip(inputs, arguments, strict=True)]
        assert [tuple(leaf.shape) for leaf in leaves] == [i.shape for i in call.inputs]
        result = run_local(op.node, call, chosen, comm, mesh, leaves)
        results = [r for r in pytree.tree_leaves(result) if isinstance(r, torch.Tensor)]
        assert [tuple(r.shape) for r in results] == [o.shape for o in call.outputs], f"{where}: local shapes"
        live = [(r, g[c]) for r, g in zip(results, gradients, strict=True) if r.requires_grad]
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        found = grad_of(live, asked)
        return [r.detach() for r in results], found, [leaf.detach() for leaf in leaves]

    ranks = run_ranks(mesh, rank)
    for i, (whole, layout) in enumerate(zip(op.results, outs, strict=True)):
        check({c: r[0][i] for c, r in ranks.items()}, whole, layout, mesh, "P", f"{where}: result {i}")
    wanted = [(i, g) for i, g in enumerate(op.wanted) if g is not None]
    for k, (i, whole) in enumerate(wanted):
        check({c: r[1][k] for c, r in ranks.items()}, whole, ins[i], mesh, "D", f"{where}: gradient {i}")
    for buffer in mutated(op.node):
        i = arguments.index(buffer)
        check({c: r[2][i] for c, r in ranks.items()}, op.written[i], ins[i], mesh, "P", f"{where}: buffer {i}")
