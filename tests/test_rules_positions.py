"""Indices that are known to count up: batches of ``x[arange(batch), last]`` and bags of embeddings, by execution."""

from __future__ import annotations

import pytest
import torch

from shardplan.errors import NotSupported
from shardplan.planner.placement import Mesh
from shardplan.planner.rules import strategies
from shardplan.planner.rules.positions import counts
from tests.execution import Op, can_run, op_of, verify
from tests.rule_cases import Recipe, build, i, t
from tests.test_rules_pairs import TWO, fitting_pairs

aten = torch.ops.aten
F64 = torch.float64


def up(extent: int, step: int = 1) -> Recipe:
    return Recipe(lambda: torch.arange(0, extent * step, step))


def column(extent: int) -> Recipe:
    return Recipe(lambda: torch.arange(extent).unsqueeze(1))


def traced(op: Op) -> Op:
    """The op with its arguments that count up made by nodes of the graph."""
    for node in list(op.node.graph.nodes):
        value = node.meta.get("val")
        if node.op != "placeholder" or value.dtype != torch.int64 or value.numel() < 2:
            continue
        flat = value.reshape(-1)
        if not torch.equal(flat, torch.arange(len(flat)) * flat[1]) or flat[1] == 0:
            continue
        with op.node.graph.inserting_before(op.node):
            made = op.node.graph.call_function(aten.arange.start_step, (0, len(flat) * int(flat[1]), int(flat[1])))
            made.meta["val"] = flat
            if value.dim() > 1:
                made = op.node.graph.call_function(aten.view.default, (made, list(value.shape)))
                made.meta["val"] = value
        op.node.replace_input_with(node, made)
    return op


BAG = aten.embedding_bag.padding_idx
CASES = [
    ("last", "b2 ib0", aten.index.Tensor, (t(4, 8, 6), [up(4), i(8, 4)])),
    ("columns", "ib0 ib1", aten.index.Tensor, (t(4, 8, 6), [column(4), i(8, 4, 2)])),
    ("second", "b0 ib0", aten.index.Tensor, (t(6, 8, 4), [None, up(8), i(4, 8)])),
    ("both", "ib0", aten.index.Tensor, (t(8, 8), [up(8), up(8)])),
    ("less than all", "ib0", aten.index.Tensor, (t(8, 8), [up(4), i(8, 4)])),
    ("put", "ib0", aten.index_put.default, (t(4, 8, 6), [up(4), i(8, 4)], t(4, 6))),
    ("put add", "ib0", aten.index_put.default, (t(4, 8, 6), [up(4), i(8, 4)], t(4, 6), True)),
    ("bags summed", "e b v", BAG, (t(8, 4), i(8, 24), up(8, 3), False, 0, False, None, False, None)),
    ("bags weighted", "e b v", BAG, (t(8, 4), i(8, 24), up(8, 3), False, 0, False, t(24), False, None)),
    ("bags averaged", "e b v", BAG, (t(8, 4), i(8, 24), up(8, 3), False, 1, False, None, False, None)),
    ("bags padded", "e b v", BAG, (t(8, 4), i(8, 24), up(8, 3), False, 1, False, None, False, 5)),
    ("bags of maxima", "e b", BAG, (t(8, 4), i(8, 24), up(8, 3), False, 2, False, None, False, None)),
    ("bags by frequency", "e", BAG, (t(8, 4), i(8, 24), up(8, 3), True, 0, False, None, False, None)),
    ("bags with an end", "e v", BAG, (t(8, 4), i(8, 24), up(9, 3), False, 0, False, None, True, None)),
    ("bags", "e b v", aten.embedding_bag.default, (t(8, 4), i(8, 24), up(8, 3))),
]


@pytest.mark.parametrize("names, target, args", [x[1:] for x in CASES], ids=[x[0] for x in CASES])
def test_rule(names, target, args):
    torch.manual_seed(0)
    op = traced(op_of(target, *build(args, {})))
    found = strategies(op.node)
    assert set(names.split()) <= {s.name for s in found}, [str(s) for s in found]
    for strategy in found:
        for size in (2, 4):
            mesh = Mesh(("tp",), (size,))
            if can_run(op, {"tp": strategy}, mesh):
                verify(op, {"tp": strategy}, mesh)
    for chosen in fitting_pairs(op):
        try:
            verify(op, chosen, TWO)
        except NotSupported:
            impls = {s.impl for s in chosen.values()}
            assert None not in impls and len(impls) == 2


def test_bags_of_unknown_size_are_not_split():
    offsets = torch.tensor([0, 3, 5, 9])
    op = op_of(BAG, *build((t(8, 4), i(8, 12)), {}), offsets, False, 0, False, None, False, None)
    assert {s.name for s in strategies(op.node)} == {"-", "d", "e", "v"}
    for strategy in strategies(op.node):
        verify(op, {"tp": strategy}, Mesh(("tp",), (2,)))


def test_what_counts():
    graph = torch.fx.Graph()

    def node(target, *args):
        made = graph.call_function(target, args)
        values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        made.meta["val"] = target(*values)
        return made

    rows = node(aten.arange.default, 6)
    assert counts(rows) == (0, 1)
    assert counts(node(aten.arange.start_step, 0, 12, 3)) == (0, 3)
    assert counts(node(aten.unsqueeze.default, rows, 0)) == (1, 1)
    assert counts(node(aten.expand.default, node(aten.unsqueeze.default, rows, 1), [4, 6, 5])) == (1, 1)
    assert counts(node(aten.view.default, rows, [2, 3])) is None
    assert counts(node(aten.arange.start, 1, 6)) is None
    assert counts(node(aten.add.Tensor, rows, 1)) is None
    assert counts(node(aten.to.dtype, rows, F64)) is None
