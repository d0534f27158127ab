"""Local implementations on simulated ranks against the op on one device: statistics, counts, random numbers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from shardplan.planner.placement import D, Mesh, P, R, S
from shardplan.planner.rules import Strategy
from shardplan.rewrite import kernels
from shardplan.rewrite.implement import IMPLEMENTATIONS
from shardplan.rewrite.threads import run_ranks

aten = torch.ops.aten
TWO = Mesh(("dp", "tp"), (2, 2))
LINE = Mesh(("tp",), (2,))


def test_every_implementation_that_a_rule_names_exists():
    assert {"vocab_embedding", "cross_entropy", "nll_loss", "batch_norm", "random"} <= set(IMPLEMENTATIONS)


# -- batch norm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_batch_norm_over_two_axes(dtype, tolerance):
    torch.manual_seed(0)
    x = (torch.randn(8, 3, 4) * 2 + 5).to(dtype)
    weight, bias, gradient = torch.randn(3), torch.randn(3), torch.randn(8, 3, 4).to(dtype)
    if dtype == torch.float64:
        weight, bias = weight.double(), bias.double()
    buffers = [torch.zeros(3, dtype=weight.dtype), torch.ones(3, dtype=weight.dtype)]

    def run(x, weight, bias, buffers, call):
        leaves = [v.clone().requires_grad_() for v in (x, weight, bias)]
        held = [v.clone() for v in buffers]
        y = call(*leaves, *held)
        return y, held, leaves

    y, held, leaves = run(x, weight, bias, buffers, lambda x, w, b, m, v: F.batch_norm(x, m, v, w, b, True, 0.1, 1e-5))
    wanted = torch.autograd.grad(y, leaves, gradient)

    def rank(comm):
        part = comm.index("dp") * 2 + comm.index("tp")
        mine = x[2 * part : 2 * part + 2]
        y, held, leaves = run(
            mine, weight, bias, buffers, lambda *a: kernels.batch_norm(comm, ("dp", "tp"), *a, True, 0.1, 1e-5)
        )
        return y, held, torch.autograd.grad(y, leaves, gradient[2 * part : 2 * part + 2])

    ranks = [r for _, r in sorted(run_ranks(TWO, rank).items())]
    close = {"rtol": tolerance, "atol": tolerance * 5}
    torch.testing.assert_close(torch.cat([r[0] for r in ranks]), y, **close)
    torch.testing.assert_close(torch.cat([r[2][0] for r in ranks]), wanted[0], **close)
    for k in (1, 2):
        torch.testing.assert_close(sum(r[2][k] for r in ranks), wanted[k], **close)
    for rank_ in ranks:
        for mine, theirs in zip(rank_[1], held, strict=True):
            torch.testing.assert_close(mine, theirs, **close)


# -- losses and lookups ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_over_classes_and_tokens(dtype, tolerance, smoothing):
    torch.manual_seed(0)
    logits = (30 * torch.randn(8, 10)).to(dtype)
    target = torch.randint(0, 10, (8,))
    target[[0, 1, 2, 5]] = -100
    leaf = logits.clone().requires_grad_()
    loss = F.cross_entropy(leaf.float(), target, label_smoothing=smoothing)
    (wanted,) = torch.autograd.grad(loss, leaf)

    def rank(comm):
        rows, columns = comm.index("dp") * 4, comm.index("tp") * 5
        mine = logits[rows : rows + 4, columns : columns + 5].clone().requires_grad_()
        labels = target[rows : rows + 4]
        count = comm.all_reduce(kernels.cross_entropy_count(labels, None, -100), "dp")
        loss = kernels.cross_entropy(
            comm, mine, labels, None, 1, -100, smoothing, class_axes=("tp",), denominator=count
        )
        (gradient,) = torch.autograd.grad(loss, mine)
        return loss.detach(), gradient

    ranks = run_ranks(TWO, rank)
    assert torch.equal(ranks[0, 0][0], ranks[0, 1][0])
    total = ranks[0, 0][0] + ranks[1, 0][0]
    torch.testing.assert_close(total.float(), loss.detach(), rtol=tolerance, atol=tolerance)
    whole = torch.cat([torch.cat([ranks[d, t][1] for t in range(2)], 1) for d in range(2)])
    torch.testing.assert_close(whole, wanted, rtol=tolerance, atol=tolerance)


def test_cross_entropy_of_large_logits_stays_finite():
    logits, target = torch.tensor([[1e4, -1e4, 0.0, 9e3]]), torch.tensor([3])

    def rank(comm):
        mine = logits.chunk(2, 1)[comm.index("tp")].clone().requires_grad_()
        loss = kernels.cross_entropy(comm, mine, target, None, 1, -100, 0.0, class_axes=("tp",))
        return loss.detach(), torch.autograd.grad(loss, mine)[0]

    for loss, gradient in run_ranks(LINE, rank).values():
        torch.testing.assert_close(loss, F.cross_entropy(logits, target))
        assert gradient.isfinite().all()


def test_counts():
    target = torch.tensor([[0, 2, -100], [1, -100, -100]])
    weight = torch.tensor([0.5, 2.0, 4.0])
    assert float(kernels.cross_entropy_count(target, None, -100)) == 3.0
    assert float(kernels.cross_entropy_count(target, weight, -100)) == 6.5
    assert float(kernels.cross_entropy_count(target, None, 2)) == 5.0


# -- random numbers ----------------------------------------------------------------------------------------------------


def execute(op: Op, chosen: dict[str, Strategy], mesh: Mesh, comms=None):
    """coordinate -> (result, gradients of the arguments for a result gradient of ones); arguments are all ones."""
    call = local_call(op.node, chosen, mesh)

    def rank(comm):
        leaves = [torch.ones(i.shape, dtype=i.dtype).requires_grad_(i.needs_grad) for i in call.inputs]
        result = run_local(op.node, call, chosen, comm, mesh, leaves)
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = torch.autograd.grad(result.sum(), asked) if asked and result.requires_grad else ()
        return result.detach(), gradients

    return run_ranks(comms or mesh, rank)


def of(op: Op, text: str) -> Strategy:
    """The strategy of that name."""
    return {s.name: s for s in strategies(op.node)}[text]


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.float64)


RANDOM = {
    "dropout": lambda: op_of(aten.dropout.default, ones(8, 64), 0.5, True),
    "alpha_dropout": lambda: op_of(aten.alpha_dropout.default, ones(8, 64), 0.5, True),
    "bernoulli": lambda: op_of(aten.bernoulli.p, ones(8, 64), 0.5, grads=[False]),
    "rand_like": lambda: op_of(aten.rand_like.default, ones(8, 64), grads=[False]),
    "randn": lambda: op_of(aten.randn.default, [8, 64]),
    "randint": lambda: op_of(aten.randint.default, 1000, [8, 64]),
}


@pytest.mark.parametrize("name", RANDOM)
def test_replicas_draw_alike_and_shards_differently(name):
    op = RANDOM[name]()
    ranks = execute(op, {"dp": of(op, "b0"), "tp": of(op, "-")}, TWO)
    assert ranks[0, 0][0].shape == (4, 64)
    for row in range(2):
        assert torch.equal(ranks[row, 0][0], ranks[row, 1][0])
    assert not torch.equal(ranks[0, 0][0], ranks[1, 0][0])
    ranks = execute(op, {"dp": of(op, "b0"), "tp": of(op, "b1")}, TWO)
    assert len({tuple(r[0].flatten().tolist()) for r in ranks.values()}) == 4


@pytest.mark.parametrize("name", RANDOM)
def test_a_recomputation_draws_the_same_and_a_microbatch_its_own(name):
    op = RANDOM[name]()
    comms = make_comms(LINE)
    chosen = {"tp": of(op, "b0")}
    state = torch.get_rng_state()
    first, again = execute(op, chosen, LINE, comms), execute(op, chosen, LINE, comms)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[c][0], again[c][0]) for c in first)
    mesh = Mesh(("mb", "tp"), (2, 2))
    results = []
    for microbatch in range(2):
        comms = make_comms(mesh)
        for comm in comms.values():
            comm.microbatch = microbatch
        results.append(execute(op, {"mb": of(op, "b0"), "tp": of(op, "-")}, mesh, comms))
    assert not torch.equal(results[0][(0,)][0], results[1][(0,)][0])


def test_dropout_masks_the_gradient_as_it_masks_the_value():
    op = RANDOM["dropout"]()
    for name in ("-", "d", "b0", "p"):
        for result, (gradient,) in execute(op, {"tp": of(op, name)}, LINE).values():
            assert torch.equal(result, gradient)
            assert 0.3 < float((result == 0).double().mean()) < 0.7
            assert set(result.unique().tolist()) == {0.0, 2.0}


def test_summands_are_dropped_together():
    """A dropout of summands is a dropout of their sum."""
    op = RANDOM["dropout"]()
    left, right = execute(op, {"tp": of(op, "p")}, LINE).values()
    assert torch.equal(left[0], right[0])


def test_no_dropout_in_evaluation():
    op = RANDOM["dropout"]()
    comms = make_comms(LINE)
    for comm in comms.values():
        comm.training = False
    for result, _ in execute(op, {"tp": of(op, "b0")}, LINE, comms).values():
        assert torch.equal(result, torch.ones_like(result))


def test_feature_dropout_drops_whole_channels():
    op = op_of(aten.feature_dropout.default, ones(4, 8, 6), 0.5, True)
    assert {s.name for s in strategies(op.node)} == {"-", "d", "b0", "b1", "p"}
    for result, _ in execute(op, {"tp": of(op, "b1")}, LINE).values():
        assert torch.equal(result, result[..., :1].expand_as(result))


def test_idle_dropout_draws_nothing_whatever_the_engine_says():
    """A submodule in evaluation inside a model in training."""
    op = op_of(aten.dropout.default, ones(4, 8), 0.5, False)
    for strategy in strategies(op.node):
        assert strategy.impl is None
        for result, _ in execute(op, {"tp": strategy}, LINE).values():
            assert torch.equal(result, torch.ones_like(result))


def attention_op(p: float, **kwargs) -> Op:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 6, 8, dtype=torch.float64) for _ in range(3))
    return op_of(aten.scaled_dot_product_attention.default, q, k, v, None, p, **kwargs)


def test_attention_dropout_is_drawn_by_shard():
    op = attention_op(0.5)
    ranks = execute(op, {"dp": of(op, "b0"), "tp": of(op, "-")}, TWO)
    assert torch.equal(ranks[0, 0][0], ranks[0, 1][0])
    assert not torch.equal(ranks[0, 0][0], ranks[1, 0][0])
    assert all(s.impl == "attention" for s in strategies(op.node) if s.is_split)


def test_attention_with_dropout_has_the_mean_of_attention_without():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4, 8, dtype=torch.float64) for _ in range(3))
    (comm,) = make_comms(Mesh(("tp",), (1,))).values()
    total = sum(kernels.attention(comm, site, (), q, k, v, None, 0.2, True) for site in range(4000)) / 4000
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(total, wanted, rtol=0, atol=0.08)
    comm.training = False
    torch.testing.assert_close(kernels.attention(comm, 0, (), q, k, v, None, 0.2, True), wanted)


def test_a_random_op_without_rule_is_drawn_alike_on_all_ranks():
    op = op_of(aten.multinomial.default, ones(4, 16), 3, grads=[False])
    assert [s.name for s in strategies(op.node)] == ["-"]
    first, second = execute(op, {"tp": strategies(op.node)[0]}, LINE).values()
    assert torch.equal(first[0], second[0])


def test_states_print():
    assert str(Strategy("n", (R, S(0), D), (P,), "random", True)) == "n: R S(0) D -> P[random] /n"
