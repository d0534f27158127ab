"""Random ops on simulated ranks: whatever the split, the parts are those of what one device draws; and the numbers are
distributed as they should be."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from shardplan.planner.placement import Mesh, S, fits
from shardplan.planner.rules import Strategy, strategies
from shardplan.planner.rules.localize import local_call
from shardplan.planner.trace import info, infos, tensor_args
from shardplan.rewrite import draws, random_ops
from shardplan.rewrite.threads import make_comms, run_ranks
from tests.execution import Op, check, op_of, run_local, spread

aten = torch.ops.aten
ONE = Mesh(("dp", "mb", "tp"), (1, 1, 1))
MESHES = (Mesh(("dp", "mb", "tp"), (2, 1, 1)), Mesh(("dp", "mb", "tp"), (1, 2, 2)), Mesh(("dp", "mb", "tp"), (2, 2, 2)))
CPU = torch.device("cpu")


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def attention_op(p: float, mask: torch.Tensor | None = None, heads: int = 4, **kwargs) -> Op:
    q, k, v = values(4, 4, 6, 8), values(4, heads, 6, 8, seed=1), values(4, heads, 6, 8, seed=2)
    return op_of(aten.scaled_dot_product_attention.default, q, k, v, mask, p, **kwargs)


def recurrent_op(name: str, batch_first: bool, bidirectional: bool) -> Op:
    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn_tanh": torch.nn.RNN}[name](
        3, 4, 2, batch_first=batch_first, bidirectional=bidirectional, dtype=torch.float64
    )
    state = values(4 if bidirectional else 2, 4, 4)
    states = [state, values(*state.shape, seed=3)] if name == "lstm" else state
    weights = [w.detach() for w in module._flat_weights]
    op = getattr(aten, name).input
    return op_of(op, values(4, 4, 3), states, weights, True, 2, 0.5, True, bidirectional, batch_first)


OPS: dict[str, Callable[[], Op]] = {
    "dropout": lambda: op_of(aten.dropout.default, values(8, 4, 64), 0.5, True),
    "dropout of scalars": lambda: op_of(aten.dropout.default, values(64), 0.5, True),
    "native_dropout": lambda: op_of(aten.native_dropout.default, values(8, 64), 0.5, True),
    "alpha_dropout": lambda: op_of(aten.alpha_dropout.default, values(8, 64), 0.5, True),
    "feature_dropout": lambda: op_of(aten.feature_dropout.default, values(8, 16, 4), 0.5, True),
    "feature_alpha_dropout": lambda: op_of(aten.feature_alpha_dropout.default, values(8, 16, 4), 0.5, True),
    "rrelu": lambda: op_of(aten.rrelu.default, values(8, 64), 0.1, 0.9, True),
    "bernoulli": lambda: op_of(aten.bernoulli.default, values(8, 64).sigmoid(), grads=[False]),
    "bernoulli.p": lambda: op_of(aten.bernoulli.p, values(8, 64), 0.5, grads=[False]),
    "rand_like": lambda: op_of(aten.rand_like.default, values(8, 64), grads=[False]),
    "randn_like": lambda: op_of(aten.randn_like.default, values(8, 64), grads=[False]),
    "randint_like": lambda: op_of(aten.randint_like.low_dtype, values(8, 64), 5, 900, grads=[False]),
    "rand": lambda: op_of(aten.rand.default, [8, 64]),
    "randn": lambda: op_of(aten.randn.default, [8, 64]),
    "randn complex": lambda: op_of(aten.randn.default, [8, 64], dtype=torch.complex64),
    "randint": lambda: op_of(aten.randint.default, 1000, [8, 64]),
    "random": lambda: op_of(aten.random.default, values(8, 64), grads=[False]),
    "random.to": lambda: op_of(aten.random.to, values(8, 64), 7, grads=[False]),
    "random.from": lambda: op_of(getattr(aten.random, "from"), values(8, 64).long(), -5, 7, grads=[False]),
    "normal": lambda: op_of(aten.normal.Tensor_float, values(8, 64), 2.0, grads=[False]),
    "normal of two": lambda: op_of(aten.normal.Tensor_Tensor, values(8, 64), values(64).abs(), grads=[False] * 2),
    "normal.float_float": lambda: op_of(aten.normal.float_float, 1.0, 2.0, [8, 64]),
    "uniform": lambda: op_of(aten.uniform.default, values(8, 64), -1.0, 3.0, grads=[False]),
    "exponential": lambda: op_of(aten.exponential.default, values(8, 64), 2.0, grads=[False]),
    "geometric": lambda: op_of(aten.geometric.default, values(8, 64), 0.2, grads=[False]),
    "cauchy": lambda: op_of(aten.cauchy.default, values(8, 64), grads=[False]),
    "log_normal": lambda: op_of(aten.log_normal.default, values(8, 64), grads=[False]),
    "multinomial": lambda: op_of(aten.multinomial.default, values(8, 16).exp(), 3, grads=[False]),
    "multinomial again": lambda: op_of(aten.multinomial.default, values(8, 16).exp(), 30, True, grads=[False]),
    "randperm": lambda: op_of(aten.randperm.default, 64),
    "poisson": lambda: op_of(aten.poisson.default, values(8, 64).exp(), grads=[False]),
    "attention": lambda: attention_op(0.5),
    "attention, causal": lambda: attention_op(0.5, is_causal=True),
    "attention, grouped": lambda: attention_op(0.5, heads=2, enable_gqa=True),
    "attention, masked": lambda: attention_op(0.3, values(4, 1, 6, 6) > 0),
    "lstm": lambda: recurrent_op("lstm", True, True),
    "gru": lambda: recurrent_op("gru", False, False),
    "rnn": lambda: recurrent_op("rnn_tanh", True, False),
}


def execute(op: Op, chosen: dict[str, Strategy], mesh: Mesh):
    """coordinate -> (results, gradients of the arguments), for result gradients that are the op's own."""
    call = local_call(op.node, chosen, mesh)
    ins = [tuple(chosen[a].inputs[i] for a in mesh.axes) for i in range(len(op.values))]
    outs = [tuple(chosen[a].outputs[i] for a in mesh.axes) for i in range(len(op.results))]
    inputs = [spread(v, layout, mesh, "P") for v, layout in zip(op.values, ins, strict=True)]
    given = [spread(g, layout, mesh, "D") for g, layout in zip(op.gradients, outs, strict=True)]
    found = {}
    for microbatch in range(mesh.size("mb")):
        comms = make_comms(mesh)

        def rank(comm, microbatch=microbatch):
            comm.microbatch = microbatch
            place = tuple(comm.index(a) for a in mesh.axes)
            arguments = tensor_args(op.node)
            leaves = [
                p[place].clone().requires_grad_(info(a).needs_grad) for p, a in zip(inputs, arguments, strict=True)
            ]
            result = run_local(op.node, call, chosen, comm, mesh, leaves)
            results = list(result) if isinstance(result, (tuple, list)) else [result]
            asked = [leaf for leaf in leaves if leaf.requires_grad]
            live = [(r, g[place]) for r, g in zip(results, given, strict=True) if r.requires_grad]
            gradients = ()
            if live and asked:
                gradients = torch.autograd.grad([r for r, _ in live], asked, [g for _, g in live])
            return place, [r.detach() for r in results], gradients

        found |= {place: (r, g) for place, r, g in run_ranks(comms, rank).values()}
    return found


def combinations(op: Op, mesh: Mesh):
    """Every choice of strategies without summands that divides."""
    own = [s for s in strategies(op.node) if all(p.kind in "RSD" for p in (*s.inputs, *s.outputs))]
    for parts in product(*[own if size > 1 else own[:1] for size in mesh.sizes]):
        chosen = dict(zip(mesh.axes, parts, strict=True))
        layouts = [(v.shape, [s.inputs[i] for s in parts]) for i, v in enumerate(op.values)]
        layouts += [(r.shape, [s.outputs[i] for s in parts]) for i, r in enumerate(op.results)]
        if all(fits(shape, tuple(layout), mesh) for shape, layout in layouts):
            yield chosen


@pytest.mark.parametrize("name", OPS)
def test_any_split_draws_the_parts_of_what_one_device_draws(name):
    op = OPS[name]()
    alone = {axis: strategies(op.node)[0] for axis in ONE.axes}
    results, gradients = execute(op, alone, ONE)[0, 0, 0]
    assert [(tuple(r.shape), r.dtype) for r in results] == [(i.shape, i.dtype) for i in infos(op.node)]
    assert name in ("randperm", "poisson") or any(s.is_split for s in strategies(op.node)), "nothing splits"
    for mesh in MESHES:
        choices = list(combinations(op, mesh))
        for chosen in random.Random(0).sample(choices, min(len(choices), 12)):
            ranks = execute(op, chosen, mesh)
            for i, whole in enumerate(results):
                layout = tuple(chosen[a].outputs[i] for a in mesh.axes)
                check({c: r[0][i] for c, r in ranks.items()}, whole, layout, mesh, "P", f"{name} {chosen}")
            asked = [i for i, a in enumerate(tensor_args(op.node)) if info(a).needs_grad]
            for k, i in enumerate(asked if gradients else ()):
                layout = tuple(chosen[a].inputs[i] for a in mesh.axes)
                check({c: r[1][k] for c, r in ranks.items()}, gradients[k], layout, mesh, "D", f"{name} gradient {i}")


def test_every_op_that_draws_is_here():
    drawn = {op().node.target for op in OPS.values()}
    like = {aten.randint.low, aten.normal_functional.default, aten.normal.float_Tensor, aten.bernoulli.Tensor}
    like |= {aten.randint_like.default, aten.rnn_relu.input}
    from shardplan.rewrite.implement_random import _CALLS

    assert set(_CALLS) <= drawn | like


def test_summands_are_dropped_together():
    """A dropout of summands is a dropout of their sum."""
    op = OPS["dropout"]()
    summed = next(s for s in strategies(op.node) if s.name == "p")
    alone = {axis: strategies(op.node)[0] for axis in ONE.axes}
    ((whole,), _) = execute(op, alone, ONE)[0, 0, 0]
    mesh = Mesh(("tp",), (2,))
    (left, _), (right, _) = execute(op, {"tp": summed}, mesh).values()
    torch.testing.assert_close(left[0] + right[0], whole)
    affine = OPS["feature_alpha_dropout"]()
    assert all(s.name != "p" for s in strategies(affine.node))


def test_idle_dropout_draws_nothing_whatever_the_engine_says():
    """A submodule in evaluation inside a model in training."""
    for op in (
        op_of(aten.dropout.default, values(4, 8), 0.5, False),
        op_of(aten.rrelu.default, values(4, 8), 0.1, 0.9, False),
    ):
        for strategy in strategies(op.node):
            assert strategy.impl is None


# -- the numbers -------------------------------------------------------------------------------------------------------


def whole(*shape: int) -> draws.Positions:
    return draws.Positions(shape, tuple(((0, extent),) for extent in shape))


def test_numbers_stay_what_they_are():
    """A checkpoint resumed under a later release draws the same."""
    assert draws.mix(1, 2, 3) == 7702586659592502839
    assert draws.bits(draws.mix(7), whole(2, 300), CPU)[:, :3].tolist() == [
        [-1569171827, -2037128103, 339475906],
        [-1418918186, 2085654309, -778590495],
    ]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_part_of_a_tensor_has_the_bits_of_the_whole(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), max_size=4)))
    pieces = []
    for extent in shape:
        cuts = sorted(data.draw(st.lists(st.integers(0, extent), min_size=2, max_size=4)))
        pieces.append(tuple((a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False) if a < b))
    part = draws.Positions(shape, tuple(pieces))
    wanted = draws.bits(5, whole(*shape), CPU)
    for dim, ranges in enumerate(pieces):
        wanted = torch.cat([wanted.narrow(dim, a, b - a) for a, b in ranges] or [wanted.narrow(dim, 0, 0)], dim)
    assert torch.equal(draws.bits(5, part, CPU), wanted)
    if shape and part.local_shape()[0]:
        stop = part.local_shape()[0]
        start = data.draw(st.integers(0, stop - 1))
        assert torch.equal(draws.bits(5, part.narrow(0, start, stop), CPU), wanted[start:stop])


def test_where_is_text():
    (comm,) = make_comms(Mesh(("dp", "tp"), (1, 1))).values()
    assert draws.positions(comm, draws.where_text((), {})).local_shape() == ()
    text = draws.where_text((4, 6), {"dp": str(S(0)), "tp": str(S(1, (2, 4)))})
    assert text == "4x6 dp=S(0) tp=S(1|2,4)"
    mesh = Mesh(("dp", "tp"), (2, 2))
    places = {c: draws.positions(comm, text).pieces for c, comm in make_comms(mesh).items()}
    assert places[1, 1] == (((2, 4),), ((1, 2), (4, 6)))


def chi_square(counts: torch.Tensor) -> float:
    """Standard deviations by which the statistic of equally likely counts is off its mean."""
    expected = counts.sum() / counts.numel()
    degrees = counts.numel() - 1
    return float(((counts - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize("shape", [(1 << 20,), (1024, 1024), (1 << 14, 64), (64, 32, 8, 64)], ids=str)
def test_bits_are_uniform_and_independent_of_their_neighbours(shape):
    found = draws.bits(draws.mix(11), whole(*shape), CPU)
    for shift in (0, 5, 12, 20, 28):
        nibbles = (found >> shift) & 15
        assert abs(chi_square(torch.bincount(nibbles.flatten(), minlength=16))) < 5
        for dim in range(len(shape)):
            for lag in (1, 2, shape[dim] // 2):
                left = nibbles.narrow(dim, 0, shape[dim] - lag)
                right = nibbles.narrow(dim, lag, shape[dim] - lag)
                # Overlapping pairs are fine: the statistic is then a little wider.
                assert abs(chi_square(torch.bincount((left * 16 + right).flatten(), minlength=256))) < 8, (dim, lag)


def test_steps_seeds_and_sites_draw_independently():
    keys = [draws.mix(seed, step, site) for seed, step, site in product(range(2), range(2), range(3))]
    found = [(draws.bits(key, whole(256, 256), CPU) >> 28) & 15 for key in keys]
    for a in range(len(found)):
        for b in range(a):
            assert abs(chi_square(torch.bincount((found[a] * 16 + found[b]).flatten(), minlength=256))) < 6


def source(shape: tuple[int, ...] = (512, 512), key: int = 3) -> draws.Source:
    return draws.Source(draws.mix(key), whole(*shape), CPU)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_uniform_numbers(dtype):
    found = source().uniform(dtype)
    assert found.dtype == dtype and float(found.min()) >= 0 and float(found.max()) < 1
    assert abs(chi_square(torch.histc(found.float(), 64, 0, 1))) < 5
    inside = source().inside(torch.float32)
    assert float(inside.min()) > 0 and float(inside.max()) < 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_normal_numbers(dtype):
    found = source().normal(dtype).double()
    n = found.numel()
    assert abs(float(found.mean())) < 5 / math.sqrt(n)
    assert abs(float(found.var()) - 1) < 5 * math.sqrt(2 / n)
    levels = torch.special.ndtr(found)
    assert abs(chi_square(torch.histc(levels, 64, 0, 1))) < 5
    assert abs(float((found[:, 1:] * found[:, :-1]).mean())) < 5 / math.sqrt(n)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.97, 1.0])
def test_chances(p):
    found = source().chance(p, torch.float32)
    assert set(found.unique().tolist()) <= {0.0, 1.0}
    assert abs(float(found.mean()) - p) <= 5 * math.sqrt(p * (1 - p) / found.numel())


def test_integers_are_uniform_and_reach_both_ends():
    found = source().below(-3, 7)
    assert abs(chi_square(torch.bincount((found + 3).flatten(), minlength=10))) < 5
    assert source((4096,)).below(0, 1 << 40).max() > 1 << 39


def one():
    (comm,) = make_comms(Mesh(("tp",), (1,))).values()
    return comm


def test_distributions():
    where, common = "400x500", (torch.float64, CPU)
    n = 200_000
    drawn = random_ops.exponential(one(), 1, where, *common, 2.0)
    assert float(drawn.min()) > 0 and abs(float(drawn.mean()) - 0.5) < 5 * 0.5 / math.sqrt(n)
    assert random_ops.exponential(one(), 1, where, torch.float32, CPU).log().isfinite().all()
    drawn = random_ops.geometric(one(), 1, where, *common, 0.25)
    assert float(drawn.min()) == 1 and abs(float(drawn.mean()) - 4) < 5 * math.sqrt(12 / n)
    assert random_ops.geometric(one(), 1, where, *common, 1.0).eq(1).all()
    drawn = random_ops.cauchy(one(), 1, where, *common, 1.0, 2.0)
    assert abs(float((drawn < 3).double().mean()) - 0.75) < 5 * math.sqrt(0.1875 / n)
    drawn = random_ops.log_normal(one(), 1, where, *common, 0.5, 0.5).log()
    assert abs(float(drawn.mean()) - 0.5) < 5 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize("replacement", [False, True])
def test_multinomial_follows_its_weights(replacement):
    weights = torch.tensor([0.0, 1.0, 2.0, 5.0, 0.0])
    where = "50000x1" if replacement else "50000x5"
    drawn = random_ops.multinomial(one(), 1, where, weights.expand(50_000, 5), 1, replacement)
    shares = torch.bincount(drawn.flatten(), minlength=5) / 50_000
    assert float((shares - weights / 8).abs().max()) < 0.01 and shares[0] == shares[4] == 0
    if not replacement:
        several = random_ops.multinomial(one(), 1, where, weights.expand(50_000, 5), 3, False)
        assert all(len(set(row)) == 3 for row in several[:100].tolist())


def test_alpha_dropout_keeps_mean_and_variance():
    x = values(400, 500)
    drawn = random_ops.alpha_dropout(one(), 1, "400x500", F.selu(x), 0.3)
    assert abs(float(drawn.mean() - F.selu(x).mean())) < 0.02
    assert abs(float(drawn.var() - F.selu(x).var())) < 0.03
    assert random_ops.alpha_dropout(one(), 1, "400x500", x, 1.0).eq(0).all()


def test_feature_dropout_drops_whole_channels():
    op = OPS["feature_dropout"]()
    ((result,), _) = execute(op, {axis: strategies(op.node)[0] for axis in ONE.axes}, ONE)[0, 0, 0]
    dropped = result == 0
    assert torch.equal(dropped, dropped[..., :1].expand_as(dropped)) and 0.3 < float(dropped.double().mean()) < 0.7


# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_dropout_has_the_mean_of_attention_without(masked):
    q, k, v = values(1, 1, 4, 8), values(1, 1, 4, 8, seed=1), values(1, 1, 4, 8, seed=2)
    mask = values(4, 4, seed=3) if masked else None
    comm = one()
    drawn = [random_ops.attention(comm, i, "1x1x4x4", q, k, v, mask, 0.2, not masked) for i in range(3000)]
    wanted = F.scaled_dot_product_attention(q, k, v, mask, is_causal=not masked)
    torch.testing.assert_close(sum(drawn) / 3000, wanted, rtol=0, atol=0.08)


@pytest.mark.parametrize("case", ["plain", "causal", "rows", "row", "grouped"])
def test_attention_some_rows_at_a_time(case, monkeypatch):
    q, k, v = values(2, 4, 7, 8), values(2, 4, 5, 8, seed=1), values(2, 4, 5, 8, seed=2)
    mask = {"rows": values(2, 1, 7, 5), "row": values(1, 5) > -1}.get(case)
    if case == "grouped":
        k, v = k[:, :2], v[:, :2]

    def run():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        q_, k_, v_ = leaves
        y = random_ops.attention(
            one(), 1, "2x4x7x5", q_, k_, v_, mask, 0.4, case == "causal", enable_gqa=case == "grouped"
        )
        return [y.detach(), *torch.autograd.grad(y, leaves, values(2, 4, 7, 8, seed=4))]

    at_once = run()
    monkeypatch.setattr(random_ops, "_MOST_SCORES", 2 * 4 * 5 * 2)
    for mine, theirs in zip(run(), at_once, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_attention_without_drops_is_attention():
    """At p so small that nothing is dropped the composed form has to be the fused one, rounding apart."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        q, k, v = (values(2, 4, 7, 8, seed=s).to(dtype) for s in range(3))
        mine = random_ops.attention(one(), 1, "2x4x7x7", q, k, v, None, 1e-9, True)
        theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
