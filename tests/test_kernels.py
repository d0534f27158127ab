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
            mine, weight, bias, buffers, lambda *a: kernels.batch_norm(comm, ("dp", "tp"), (), *a, True, 0.1, 1e-5)
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


def test_states_print():
    assert str(Strategy("n", (R, S(0), D), (P,), "random", True)) == "n: R S(0) D -> P[random] /n"
