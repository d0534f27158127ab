"""Dimension rules beyond one axis and one shape: two axes at once, random shapes, ops that draw, ops without a rule."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.errors import NotSupported
from shardplan.planner.placement import Mesh
from shardplan.planner.rules import Strategy, has_rule, local_call, strategies
from shardplan.planner.trace import needs_grad, tensor_args
from shardplan.rewrite.threads import ThreadComm, run_ranks
from tests.execution import Op, can_run, layouts, op_of, run_local, shard, verify
from tests.rule_cases import Recipe, b, build, case, fixed, i, labels, t

aten = torch.ops.aten
F64 = torch.float64
TWO = Mesh(("dp", "tp"), (2, 2))


def fitting_pairs(op: Op) -> list[dict[str, Strategy]]:
    """All pairs of strategies (dp as the batch follows, with inner splits) under which every shard divides."""
    found = []
    for outer, inner in itertools.product(strategies(op.node, inner=True), strategies(op.node)):
        chosen = {"dp": outer, "tp": inner}
        if can_run(op, chosen, TWO):
            found.append(chosen)
    return found


SDPA = aten.scaled_dot_product_attention.default
CE = aten.cross_entropy_loss.default
PAIRS = [
    case("linear", "", aten.linear.default, t(4, 8, 8), t(12, 8), t(12)),
    case("matmul", "", aten.matmul.default, t(4, 4, 8), t(4, 8, 12)),
    case("addmm", "", aten.addmm.default, t(12), t(4, 8), t(8, 12)),
    case("einsum", "", aten.einsum.default, "abc,acd->abd", [t(4, 4, 8), t(4, 8, 12)]),
    case("add", "", aten.add.Tensor, t(4, 1, 8), t(8, 8)),
    case("mul", "", aten.mul.Tensor, t(4, 8), t(8)),
    case("where", "", aten.where.self, b(4, 1), t(4, 8), t(8)),
    case("view heads", "", aten.view.default, t(4, 8, 16), [4, 8, 4, 4]),
    case("view merge", "", aten.view.default, t(4, 8, 4, 4), [4, 8, 16]),
    case("view flat", "", aten.view.default, t(4, 4, 8), [-1, 8]),
    case("view qkv", "", aten.view.default, t(4, 4, 24), [4, 4, 3, 4, 2]),
    case("reshape", "", aten.reshape.default, t(4, 8, 6), [4, 4, 12]),
    case("flatten", "", aten.flatten.using_ints, t(4, 4, 8), 0, 1),
    case("unflatten", "", aten.unflatten.int, t(8, 16), -1, [4, -1]),
    case("chunk", "", aten.chunk.default, t(4, 24), 3, -1),
    case("split sizes", "", aten.split_with_sizes.default, t(4, 24), [16, 4, 4], 1),
    case("slice", "", aten.slice.Tensor, t(4, 24), 1, 8, 16),
    case("expand", "", aten.expand.default, t(4, 1, 8), [4, 4, -1]),
    case("repeat", "", aten.repeat.default, t(4, 1, 8), [1, 4, 1]),
    case("transpose", "", aten.transpose.int, t(4, 8, 4), 1, 2),
    case("sdpa", "", SDPA, t(4, 4, 8, 4), t(4, 4, 8, 4), t(4, 4, 8, 4)),
    case("sdpa grouped", "", SDPA, t(4, 8, 4, 4), t(4, 4, 4, 4), t(4, 4, 4, 4), enable_gqa=True, is_causal=True),
    case("cross_entropy", "", CE, t(8, 12), labels(12, 8)),
    case("cross_entropy sum", "", CE, t(8, 12), labels(12, 8), None, 2),
    case("cross_entropy smooth", "", CE, t(8, 12), labels(12, 8), None, 1, -100, 0.2),
    case("cross_entropy dims", "", CE, t(4, 12, 8), labels(12, 4, 8)),
    case("cross_entropy weight", "", CE, t(8, 12), labels(12, 8), fixed(12)),
    case("nll", "", aten.nll_loss_nd.default, t(8, 12), labels(12, 8), fixed(12)),
    case("mse", "", aten.mse_loss.default, t(4, 8), t(4, 8)),
    case("mean", "", aten.mean.dim, t(4, 8, 4), [0, 2]),
    case("sum", "", aten.sum.default, t(4, 8)),
    case("embedding", "", aten.embedding.default, t(12, 8), i(12, 4, 4), 3),
    case("gather", "", aten.gather.default, t(4, 8), 1, i(8, 4, 8)),
    case("index", "", aten.index.Tensor, t(8, 8), [i(8, 4)]),
    case("index_put add", "", aten.index_put.default, t(8, 8), [i(8, 4)], t(4, 8), True),
    case("scatter_add", "", aten.scatter_add.default, t(4, 8), 0, i(4, 8, 8), t(8, 8)),
    case("conv2d", "", aten.conv2d.default, t(4, 8, 3, 3), t(12, 8, 2, 2), t(12)),
    case("depthwise", "", aten.conv1d.default, t(4, 8, 5), t(8, 1, 3), t(8), groups=8),
    case("layer_norm", "", aten.layer_norm.default, t(4, 8, 8), [8], t(8), t(8)),
    case("group_norm", "", aten.group_norm.default, t(4, 8, 3), 8, t(8), t(8)),
    case("group_norm of two", "", aten.group_norm.default, t(4, 8, 3), 2, t(8), t(8)),
    case("conv groups", "", aten.conv2d.default, t(4, 16, 3, 3), t(8, 4, 2, 2), t(8), groups=4),
    case(
        "batch_norm", "", aten.batch_norm.default,
        t(4, 8, 4), t(8), t(8), fixed(8), fixed(8), True, 0.1, 1e-5, False,
    ),
    case("softmax", "", aten.softmax.int, t(4, 8, 4), -1),
    case("cat", "", aten.cat.default, [t(4, 8), t(4, 4)], -1),
]  # fmt: skip


@pytest.mark.parametrize("target, args, kwargs", [x[2:] for x in PAIRS], ids=[x[0] for x in PAIRS])
def test_two_axes(target, args, kwargs):
    """At most 30 pairs of each op, drawn at random but the same in every run."""
    torch.manual_seed(0)
    made: dict[Recipe, torch.Tensor] = {}
    op = op_of(target, *build(args, made), **build(kwargs, made))
    pairs = fitting_pairs(op)
    ran = 0
    for chosen in random.Random(0).sample(pairs, min(len(pairs), 30)):
        try:
            verify(op, chosen, TWO)
        except NotSupported as error:  # refused, which is right only where two implementations meet
            impls = [s.impl for s in chosen.values()]
            assert None not in impls, f"{chosen}: {error}"
        else:
            ran += 1
    assert ran >= 3


def test_sections_do_not_split_a_dim_that_is_split_otherwise():
    """The batch is the outer factor of a merged dim: the inner factor cannot be split there as well."""
    op = op_of(aten.reshape.default, torch.randn(4, 8, 8, dtype=F64), [-1, 8])
    by_text = {str(s): s for s in strategies(op.node)}
    batch, inner = by_text["g0: S(0) -> S(0)"], by_text["i1: S(1) -> S(0|4x8)"]
    assert can_run(op, {"tp": inner}, TWO)
    assert not can_run(op, {"dp": batch, "tp": inner}, TWO)
    verify(op, {"tp": inner}, TWO)


# -- random shapes -----------------------------------------------------------------------------------------------------


@st.composite
def regroupings(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes of one number of elements: the prime factors of it, cut twice, with dims of one entry in between."""
    factors = draw(st.lists(st.sampled_from([2, 2, 2, 3]), min_size=1, max_size=6))

    def shape() -> list[int]:
        cuts = sorted(draw(st.sets(st.integers(1, len(factors) - 1)))) if len(factors) > 1 else []
        edges = [0, *cuts, len(factors)]
        found = [math.prod(factors[low:high]) for low, high in itertools.pairwise(edges)]
        for place in draw(st.lists(st.integers(0, len(found)), max_size=2)):
            found.insert(place, 1)
        return found

    return shape(), shape()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(regroupings(), st.sampled_from([2, 3, 4]))
def test_any_reshape(shapes, size):
    before, after = shapes
    op = op_of(aten.reshape.default, torch.randn(before, dtype=F64), after)
    mesh = Mesh(("tp",), (size,))
    for strategy in strategies(op.node, inner=True):
        if can_run(op, {"tp": strategy}, mesh):
            verify(op, {"tp": strategy}, mesh)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(regroupings(), st.randoms(use_true_random=False))
def test_any_reshape_on_two_axes(shapes, rng):
    op = op_of(aten.reshape.default, torch.randn(shapes[0], dtype=F64), shapes[1])
    pairs = fitting_pairs(op)
    for chosen in rng.sample(pairs, min(len(pairs), 6)):
        verify(op, chosen, TWO)


@st.composite
def broadcasts(draw: st.DrawFn, count: int) -> list[list[int]]:
    """Shapes that broadcast together."""
    full = draw(st.lists(st.sampled_from([2, 4, 6]), max_size=3))
    found = []
    for _ in range(count):
        kept = full[draw(st.integers(0, len(full))) :]
        found.append([extent if draw(st.booleans()) else 1 for extent in kept])
    return found


@settings(max_examples=40, deadline=None, derandomize=True)
@given(broadcasts(3), st.sampled_from(["add", "mul", "div", "where", "addcmul", "lerp", "clamp", "masked_fill"]))
def test_any_broadcast(shapes, name):
    x, y, z = (0.5 + torch.rand(shape, dtype=F64) for shape in shapes)
    full = torch.broadcast_shapes(*shapes)
    op = {
        "add": lambda: op_of(aten.add.Tensor, x, y, alpha=2),
        "mul": lambda: op_of(aten.mul.Tensor, x, y),
        "div": lambda: op_of(aten.div.Tensor, x, y),
        "where": lambda: op_of(aten.where.self, x > 1, y, z),
        "addcmul": lambda: op_of(aten.addcmul.default, x, y, z),
        "lerp": lambda: op_of(aten.lerp.Tensor, x, y, z),
        "clamp": lambda: op_of(aten.clamp.Tensor, x.expand(full).clone(), y, z),
        "masked_fill": lambda: op_of(aten.masked_fill.Scalar, x.expand(full).clone(), y > 1, 0),
    }[name]()
    mesh = Mesh(("tp",), (2,))
    for strategy in strategies(op.node):
        if can_run(op, {"tp": strategy}, mesh):
            verify(op, {"tp": strategy}, mesh)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(broadcasts(2), st.sampled_from([2, 4]), st.sampled_from([2, 4]), st.sampled_from([2, 4]))
def test_any_batch_of_products(shapes, m, k, n):
    left, right = torch.randn([*shapes[0], m, k], dtype=F64), torch.randn([*shapes[1], k, n], dtype=F64)
    op = op_of(aten.matmul.default, left, right)
    mesh = Mesh(("tp",), (2,))
    for strategy in strategies(op.node):
        if can_run(op, {"tp": strategy}, mesh):
            verify(op, {"tp": strategy}, mesh)


# -- size arguments ----------------------------------------------------------------------------------------------------

SIZES = [
    # op, arguments, strategy on tp of 2 -> arguments after the tensors
    (aten.view.default, (t(4, 8), [4, 2, 4]), "g0", ([2, 2, 4],)),
    (aten.view.default, (t(4, 8), [4, 2, 4]), "g1", ([4, 1, 4],)),
    (aten.reshape.default, (t(2, 4, 8), [-1, 8]), "g0", ([4, 8],)),
    (aten.expand.default, (t(1, 8), [4, -1]), "b0", ([2, 8],)),
    (aten.new_zeros.default, (t(3), [4, 8]), "b1", ([4, 4],)),
    (aten.repeat.default, (t(1, 8), [4, 1]), "b0", ([2, 1],)),
    (aten.split.Tensor, (t(4, 24), 8, 1), "sections", (4, 1)),
    (aten.split_with_sizes.default, (t(4, 24), [16, 4, 4], 1), "sections", ([8, 2, 2], 1)),
    (aten.slice.Tensor, (t(4, 24), 1, 8, 16), "sections", (1, 4, 8)),
    (aten.slice.Tensor, (t(4, 24), 1, -8, 24), "sections", (1, 8, 12)),
    (aten.unflatten.int, (t(4, 8), 1, [4, 2]), "g1", (1, [2, 2])),
    (aten.conv1d.default, (t(2, 8, 5), t(8, 1, 3), None, [1], [0], [1], 8), "g", (None, [1], [0], [1], 4)),
    (aten.group_norm.default, (t(4, 8, 3), 8), "c", (4,)),
]


@pytest.mark.parametrize("target, args, name, expected", SIZES)
def test_sizes_are_local(target, args, name, expected):
    op = op_of(target, *build(args, {}))
    chosen = {"tp": next(s for s in strategies(op.node) if s.name == name)}
    mesh = Mesh(("tp",), (2,))
    assert local_call(op.node, chosen, mesh).args[len(op.values) :] == expected
    whole = local_call(op.node, {"tp": strategies(op.node)[0]}, mesh)
    assert whole.inputs[0].shape == op.values[0].shape
    assert whole.outputs[0].shape == op.results[0].shape


# -- ops that draw -----------------------------------------------------------------------------------------------------


def test_dropout_draws_alike_on_replicas_and_differently_on_shards():
    op = op_of(aten.dropout.default, torch.ones(8, 8, dtype=F64), 0.5, True)
    for strategy in strategies(op.node):
        chosen = {"tp": strategy}
        mesh = Mesh(("tp",), (2,))
        call = local_call(op.node, chosen, mesh)
        (layout,), _ = layouts(op, chosen, mesh)

        def rank(comm: ThreadComm, call=call, chosen=chosen, mesh=mesh, layout=layout) -> list[torch.Tensor]:
            x = shard(op.values[0], layout, mesh, (comm.index("tp"),)).clone().requires_grad_(needs_grad(op.node))
            found = []
            for _ in range(2):  # a recomputation draws the same
                y = run_local(op.node, call, chosen, comm, mesh, [x])
                found += [y.detach(), torch.autograd.grad(y.sum(), x)[0]]
            return found

        ranks = run_ranks(mesh, rank)
        for first, gradient, again, _ in ranks.values():
            assert torch.equal(first, again)
            assert torch.equal(first, gradient)  # what was dropped gets no gradient
            assert set(first.unique().tolist()) <= {0.0, 2.0}
        same = torch.equal(ranks[0,][0], ranks[1,][0])
        assert same == (not strategy.outputs[0].is_shard), str(strategy)


DIFFERENTIABLE = {"alpha_dropout", "feature_dropout", "feature_alpha_dropout", "native_dropout"}
DRAWING = [
    (aten.rand.default, ([4, 8],)),
    (aten.randn.default, ([4, 8],)),
    (aten.randint.default, (9000, [4, 8])),
    (aten.randint.low, (3, 9000, [4, 8])),
    (aten.randperm.default, (64,)),
    (aten.rand_like.default, (t(4, 8),)),
    (aten.randn_like.default, (t(4, 8),)),
    (aten.randint_like.default, (t(4, 8), 9000)),
    (aten.randint_like.low_dtype, (t(4, 8), 3, 9000)),
    (aten.bernoulli.p, (t(8, 8), 0.5)),
    (aten.alpha_dropout.default, (t(4, 8), 0.5, True)),
    (aten.feature_dropout.default, (t(8, 8, 3), 0.5, True)),
    (aten.feature_alpha_dropout.default, (t(8, 8, 3), 0.5, True)),
    (aten.native_dropout.default, (t(8, 8), 0.5, True)),
]


@pytest.mark.parametrize("target, args", DRAWING, ids=[str(x[0]) for x in DRAWING])
def test_ops_that_draw(target, args):
    """A local result of the local shape; the same on replicas, another on shards."""
    torch.manual_seed(0)
    args = build(args, {})
    grads = (target._opname in DIFFERENTIABLE,) * sum(isinstance(a, torch.Tensor) for a in args)
    op = op_of(target, *args, grads=grads)
    mesh = Mesh(("tp",), (2,))
    assert has_rule(op.node)
    for strategy in strategies(op.node):
        chosen = {"tp": strategy}
        if not can_run(op, chosen, mesh) or any(p.kind == "P" for p in strategy.inputs):
            continue
        call = local_call(op.node, chosen, mesh)
        ins, _ = layouts(op, chosen, mesh)
        ones = [torch.ones_like(v) for v in op.values]

        def rank(comm: ThreadComm, call=call, chosen=chosen, ins=ins, ones=ones) -> torch.Tensor:
            mine = [shard(v, layout, mesh, (comm.index("tp"),)) for v, layout in zip(ones, ins, strict=True)]
            result = run_local(op.node, call, chosen, comm, mesh, mine)
            return result[0] if isinstance(result, tuple) else result

        ranks = run_ranks(mesh, rank)
        assert {tuple(r.shape) for r in ranks.values()} == {call.outputs[0].shape}
        same = torch.equal(ranks[0,], ranks[1,])
        assert same == (not strategy.outputs[0].is_shard), str(strategy)


# -- ops without a rule ------------------------------------------------------------------------------------------------

WHOLE = [
    (aten.cholesky_inverse.default, (t(4, 4),)),
    (aten.linalg_det.default, (t(4, 4),)),
    (aten.nonzero.default, (b(4, 4),)),
    (aten.masked_select.default, (t(4, 4), b(4, 4))),
    (aten.linalg_qr.default, (t(4, 4),)),
]


@pytest.mark.parametrize("target, args", WHOLE, ids=[str(x[0]) for x in WHOLE])
def test_ops_without_a_rule_run_whole(target, args):
    """Replicated, and its dual; nothing else, and both exact."""
    torch.manual_seed(0)
    op = op_of(target, *build(args, {}))
    assert not has_rule(op.node)
    found = strategies(op.node)
    assert {s.name for s in found} <= {"-", "d"}
    assert ("d" in {s.name for s in found}) == any(needs_grad(a) for a in tensor_args(op.node))
    for strategy in found:
        verify(op, {"tp": strategy}, Mesh(("tp",), (2,)))
    for chosen in fitting_pairs(op):
        verify(op, chosen, TWO)
