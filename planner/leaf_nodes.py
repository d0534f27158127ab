"""The nodes of leaves in a traced graph: what was found out about each, and the split of its batch that runs prove."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from shardplan.planner import leaf_probe
from shardplan.planner.leaf_op import is_leaf
from shardplan.planner.leaf_probe import Unsuitable
from shardplan.planner.leaves import Leaves
from shardplan.planner.placement import D, Mesh, P, Placement, R, S
from shardplan.planner.propagate import follow, placed
from shardplan.planner.rules import Strategy, forget_strategies
from shardplan.planner.trace import (
    LeafNote,
    Trace,
    info,
    leaf_of,
    needs_grad,
    resolve,
    set_leaf,
    set_mutated,
    tensor_args,
)

_PROOF_ROUNDS = 4


def annotate(graph: fx.Graph, leaves: Leaves) -> None:
    """Tell the nodes what was found out about their leaves; the buffers they change stand in `trace.mutated`."""
    for node in graph.nodes:
        if not is_leaf(node):
            continue
        known = leaves.known[str(node.args[0])]
        facts = known.facts
        set_leaf(node, LeafNote(facts.leaf, leaves.reasons[known.call.path], facts.saves, facts.draws))
        held = node.args[2][facts.leaf.inputs :]  # type: ignore[index]
        changed = tuple(tensor for tensor, changes in zip(held, facts.changes, strict=True) if changes)
        if changed:
            set_mutated(node, changed)


def prove_splits(trace: Trace, leaves: Leaves) -> None:
    """Give every leaf of the trace the split of its batch, where running it on parts of the batch shows that there is
    one.

    Which dims carry the batch is what follows from the ops before, so a leaf behind another may need another round.
    """
    parts = next((n for n in range(2, trace.batch_size + 1) if trace.batch_size % n == 0), 1)
    tried: set[tuple[str, tuple[Placement, ...]]] = set()
    alike: dict[tuple[Any, ...], tuple[Placement, ...]] = {}

    def attempt(node: fx.Node, states: tuple[Placement, ...]) -> None:
        note = leaf_of(node)
        assert note is not None
        tried.add((node.name, states))
        try:
            split, steady = _split(node, states, leaves, trace.batch_size, trace.training)
        except Unsuitable as error:
            if not note.splits:
                set_leaf(node, replace(note, unsplit=str(error)))
            return
        set_leaf(node, replace(note, splits=(split,), unsplit="", steady=steady))
        alike[_kind(node)] = states

    for _ in range(_PROOF_ROUNDS):
        nodes = [node for node in trace.nodes() if is_leaf(node)]
        states = _states(trace, nodes, parts) if nodes else {}
        new = [node for node in nodes if (node.name, states[node.name]) not in tried]
        if not new:
            break
        for node in new:
            attempt(node, states[node.name])
        for node in nodes:
            # In a later layer of the same kind the batch stands where it stood, once the layers before are split.
            found, note = alike.get(_kind(node)), leaf_of(node)
            if found is not None and note is not None and not note.splits and (node.name, found) not in tried:
                attempt(node, found)
        forget_strategies(trace.graph)
    for node in trace.nodes():
        note = leaf_of(node)
        if note is not None:
            how = "its batch is split" if note.splits else f"its batch is not split: it {note.unsplit}"
            drawn = "; it draws random numbers" if note.draws else ""
            trace.notes.append(f"{note.leaf.name} is kept whole (opaque leaf), {note.reason}; {how}{drawn}")


def _kind(node: fx.Node) -> tuple[Any, ...]:
    note = leaf_of(node)
    assert note is not None
    return note.leaf.digest, note.leaf.inputs, tuple(info(argument) for argument in tensor_args(node))


def _states(trace: Trace, nodes: Sequence[fx.Node], parts: int) -> dict[str, tuple[Placement, ...]]:
    if parts == 1:
        return {node.name: (R,) * len(tensor_args(node)) for node in nodes}
    follower = follow(trace, "dp", Mesh(("dp",), (parts,)))
    found = {}
    for node in nodes:
        makers = [resolve(argument) for argument in tensor_args(node)]
        found[node.name] = tuple(placed(follower.strategies.get(maker.name), index) for maker, index in makers)
    return found


def _split(
    node: fx.Node, states: tuple[Placement, ...], leaves: Leaves, batch: int, training: bool
) -> tuple[Strategy, bool]:
    """The strategy that splits the leaf's batch, and whether it is steady. Raises Unsuitable with the reason why there
    is none."""
    known = leaves.known[str(node.args[0])]
    arguments, count = tensor_args(node), known.facts.leaf.inputs
    dims = [s.dim if s.is_shard else None for s in states[:count]]
    if batch == 1:
        raise Unsuitable("is called with a batch of one")
    if all(dim is None for dim in dims):
        raise Unsuitable("reads nothing that carries the batch")
    samples = [known.inputs, *(leaf_probe.redrawn(known.inputs, seed) for seed in (1, 2, 3))]
    try:
        kinds, steady = leaf_probe.prove_split(known.facts, samples, known.held, dims, batch, training)
    except Unsuitable:
        # A mask that the model makes for the whole batch by itself: a part of it goes with a part of the batch.
        given = zip(states, arguments, known.inputs, strict=False)
        made = [s == R and not needs_grad(a) and tensor.shape[:1] == (batch,) for s, a, tensor in given]
        if not any(made):
            raise
        dims = [0 if own else dim for dim, own in zip(dims, made, strict=True)]
        kinds, steady = leaf_probe.prove_split(known.facts, samples, known.held, dims, batch, training)
    whole = [D if needs_grad(a) and needs_grad(node) else R for a in arguments]
    ins = [S(d) if d is not None else w for d, w in zip([*dims, *[None] * len(known.held)], whole, strict=True)]
    return Strategy("leaf", tuple(ins), tuple(P if kind == "sum" else S(int(kind)) for kind in kinds)), steady
