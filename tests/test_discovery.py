"""Rules discovered by running ops: what is found is proven by execution, what only looks like a rule is refused."""

from __future__ import annotations

import ctypes
import os
import time

import pytest
import torch

from shardplan.planner.costs.store import Store
from shardplan.planner.placement import Mesh
from shardplan.planner.rules import discovery, has_rule, is_discovered, laboratory, strategies, why_whole
from shardplan.planner.rules.trial import Answer
from tests.execution import Op, can_run, op_of, verify
from tests.rule_cases import Recipe, b, build, i, t

aten = torch.ops.aten
F64 = torch.float64


def custom(function):
    """Register a function of tensors as an op whose backward is autograd's of the same function."""
    name = function.__name__
    op = torch.library.custom_op(f"discovery::{name}", function, mutates_args=())

    def setup_context(ctx, inputs, output):
        ctx.inputs = inputs

    def backward(ctx, *gradients):
        flat, spec = torch.utils._pytree.tree_flatten(ctx.inputs)
        with torch.enable_grad():
            leaves = [
                v.detach().requires_grad_(v.is_floating_point()) if isinstance(v, torch.Tensor) else v for v in flat
            ]
            results = function(*torch.utils._pytree.tree_unflatten(leaves, spec))
            results = [results] if isinstance(results, torch.Tensor) else results
            live = [(r, g) for r, g in zip(results, gradients, strict=True) if r.requires_grad]
            asked = [v for v in leaves if isinstance(v, torch.Tensor) and v.requires_grad]
            found = iter(torch.autograd.grad([r for r, _ in live], asked, [g for _, g in live], allow_unused=True))
            given = [next(found) if isinstance(v, torch.Tensor) and v.requires_grad else None for v in leaves]
        return torch.utils._pytree.tree_unflatten(given, spec)

    op.register_autograd(backward, setup_context=setup_context)
    op.register_fake(function)
    return getattr(torch.ops.discovery, name).default


# -- ops that can be split ---------------------------------------------------------------------------------------------


@custom
def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


@custom
def projected(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight, bias)


@custom
def contracted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.mT


@custom
def swiglu(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.silu(parts[0]) * parts[1]


@custom
def both(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.sin() * y, (x * y).sum(0)


@custom
def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    parts = x.unflatten(-1, (-1, count))
    return parts.softmax(-1).flatten(-2)


@custom
def picked(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return table[index].tanh()


@custom
def masked_sum(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (x.exp() * mask).sum()


@custom
def token_mean(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x - y).pow(2).mean()


@custom
def grouped(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[batch, heads, q, d] and [batch, key heads, k, d] -> scores."""
    repeated = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return (query @ repeated.mT).softmax(-1)


FOUND = [
    (rms, (t(4, 8, 16), t(16)), {"x0.0: S(0) D -> S(0)", "x0.1: S(1) D -> S(1)", "p: D P -> P"}),
    (
        projected,
        (t(4, 8), t(16, 8), t(16)),
        {"x0.0: S(0) D D -> S(0)", "x1.0: D S(0) S(0) -> S(1)", "x0.1: S(1) S(1) P -> P"},
    ),
    (
        contracted,
        (t(4, 8), t(16, 8)),
        {"x0.0: S(0) D -> S(0)", "x1.0: D S(0) -> S(1)", "x0.1: S(1) S(1) -> P", "p: P D -> P"},
    ),
    (swiglu, ([t(4, 8), t(4, 8)],), {"x0.0: S(0) S(0) -> S(0)", "x0.1: S(1) S(1) -> S(1)", "p: D P -> P"}),
    (both, (t(4, 8), t(4, 8)), {"x0.0: S(0) S(0) -> S(0) P", "x0.1: S(1) S(1) -> S(1) S(0)", "p: D P -> P P"}),
    (heads, (t(4, 8, 12), 3), {"x0.0: S(0) -> S(0)", "x0.1: S(1) -> S(1)", "x0.2: S(2) -> S(2) *4"}),
    (heads, (t(4, 6, 64), 8), {"x0.0: S(0) -> S(0)", "x0.1: S(1) -> S(1)", "x0.2: S(2) -> S(2) *8"}),
    (picked, (t(8, 16), i(8, 4, 12)), {"x0.1: S(1) R -> S(2)", "x1.0: D S(0) -> S(0)", "x1.1: D S(1) -> S(1)"}),
    (masked_sum, (t(4, 8), b(4, 8)), {"x0.0: S(0) S(0) -> P", "x0.1: S(1) S(1) -> P"}),
    (token_mean, (t(4, 8), t(4, 8)), {"x0.0: S(0) S(0) -> P /n", "x0.1: S(1) S(1) -> P /n"}),
    (grouped, (t(4, 8, 12, 16), t(4, 4, 12, 16)),
     {"x0.0: S(0) S(0) -> S(0)", "x0.1: S(1) S(1) -> S(1)", "x0.2: S(2) D -> S(2)"}),
    (aten.linalg_solve.default, (t(4, 4), t(4, 8)), {"x1.1: D S(1) -> S(1)"}),
    (aten.linalg_inv.default, (t(4, 6, 6),), {"x0.0: S(0) -> S(0)"}),
]  # fmt: skip


def definite(*shape: int) -> Recipe:
    def make() -> torch.Tensor:
        found = torch.randn(shape, dtype=F64)
        return found @ found.mT + shape[-1] * torch.eye(shape[-1], dtype=F64)

    return Recipe(make)


BATCHED = [
    (aten.linalg_cholesky.default, (definite(4, 6, 6),)),
    (aten.linalg_det.default, (t(4, 6, 6),)),
    (aten.linalg_slogdet.default, (t(4, 6, 6),)),
    (aten.linalg_eigh.default, (definite(4, 6, 6),)),
    (aten.linalg_qr.default, (t(4, 6, 3),)),
    (aten.linalg_svdvals.default, (t(4, 6, 3),)),
    (aten.linalg_solve.default, (t(4, 6, 6), t(4, 6, 3))),
    (aten.linalg_solve_triangular.default, (definite(4, 6, 6), t(4, 6, 3))),
    (aten.linalg_matrix_exp.default, (t(4, 6, 6),)),
    (aten.linalg_pinv.default, (t(4, 6, 3), 1e-12)),
    (aten.linalg_matrix_power.default, (t(4, 6, 6), 3)),
    (aten.pairwise_distance.default, (t(4, 6), t(4, 6))),
    (aten.rot90.default, (t(4, 6, 8), 1, [1, 2])),
    (aten.index_copy.default, (t(4, 8), 1, i(8, 3), t(4, 3))),
    (aten.index_fill.int_Scalar, (t(4, 8), 1, i(8, 3), 2.0)),
    (aten.renorm.default, (t(4, 8), 2, 0, 1.0)),
    (aten.multi_margin_loss.default, (t(4, 8), i(8, 4))),
    (aten.multilabel_margin_loss.default, (t(4, 8), i(8, 4, 8))),
    (aten.diag_embed.default, (t(4, 8),)),
    (aten.trapezoid.dx, (t(4, 8),)),
]


@pytest.mark.parametrize("target, args", BATCHED, ids=[str(x[0]) for x in BATCHED])
def test_batches_are_split(target, args):
    triangular = target is aten.linalg_solve_triangular.default
    op = made(target, args, **({"upper": False} if triangular else {}))
    batch = [s for s in strategies(op.node) if s.is_split and s.inputs[0].is_shard and s.inputs[0].dim == 0]
    assert batch
    for strategy in strategies(op.node):
        for size in (2, 4):
            if can_run(op, {"tp": strategy}, Mesh(("tp",), (size,))):
                verify(op, {"tp": strategy}, Mesh(("tp",), (size,)))


def made(target, args, **kwargs) -> Op:
    torch.manual_seed(0)
    remembered: dict[Recipe, torch.Tensor] = {}
    return op_of(target, *build(args, remembered), **kwargs)


@pytest.mark.parametrize("target, args, expected", FOUND, ids=[str(x[0]) for x in FOUND])
def test_finds_what_there_is(target, args, expected):
    op = made(target, args)
    assert has_rule(op.node) and is_discovered(op.node)
    found = {str(s) for s in discovery.discovered(op.node)}
    assert expected <= found, found
    ran = 0
    for strategy in strategies(op.node, inner=True):
        for size in (2, 4):
            mesh = Mesh(("tp",), (size,))
            if can_run(op, {"tp": strategy}, mesh):
                verify(op, {"tp": strategy}, mesh)
                ran += strategy.is_split
    assert ran >= len(expected)


def test_a_frozen_argument_is_no_summand():
    op = made(rms, (t(4, 8, 16), t(16)), grads=(True, False))
    assert "x0.0: S(0) R -> S(0)" in {str(s) for s in discovery.discovered(op.node)}


# -- ops that only seem so ---------------------------------------------------------------------------------------------


@custom
def clipped(x: torch.Tensor) -> torch.Tensor:
    """Elementwise unless numbers are large."""
    return x / x.norm().clamp(min=1e3)


@custom
def seen(mask: torch.Tensor) -> torch.Tensor:
    """The same for every part of most masks."""
    return mask.any(0)


@custom
def flagged(x: torch.Tensor) -> torch.Tensor:
    """The same for all numbers."""
    return x.isnan().any()


@custom
def ceiling(x: torch.Tensor) -> torch.Tensor:
    return x.round().amax(0)


@custom
def labelled(x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """A mean over labels that count: no mean of means."""
    return torch.nn.functional.cross_entropy(x, label.clamp(max=x.shape[1] - 1))


@custom
def blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """Independent blocks, which a shard need not consist of."""
    parts = torch.nn.functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    return (parts / parts.abs().amax(-1, keepdim=True).clamp(min=1e-9)).flatten(-2)[..., : x.shape[-1]]


@torch.library.custom_op("discovery::crooked", mutates_args=())
def crooked(x: torch.Tensor) -> torch.Tensor:
    """Elementwise forward; backward it is not."""
    return x * 2


crooked.register_autograd(lambda ctx, g: g * 2 - g.mean(0, keepdim=True))

REFUSED = [
    (clipped, (t(4, 8),), set()),
    (seen, (b(4, 8),), {"x0.1: S(1) -> S(0)"}),
    (flagged, (t(4, 8),), set()),
    (ceiling, (t(4, 8),), {"x0.1: S(1) -> S(0)"}),
    (labelled, (t(8, 6), i(6, 8)), set()),
    (blocks, (t(4, 32), 8), {"x0.0: S(0) -> S(0)", "x0.1: S(1) -> S(1) *4"}),
    (torch.ops.discovery.crooked.default, (t(4, 8),), {"x0.1: S(1) -> S(1)", "p: P -> P"}),
]


@pytest.mark.parametrize("target, args, expected", REFUSED, ids=[str(x[0]) for x in REFUSED])
def test_refuses_what_holds_only_by_chance(target, args, expected):
    op = made(target, args)
    assert {str(s) for s in discovery.discovered(op.node)} == expected
    for strategy in strategies(op.node):
        verify(op, {"tp": strategy}, Mesh(("tp",), (2,)))


# -- ops that cannot be run --------------------------------------------------------------------------------------------


def abstract(name: str, signature: str):
    torch.library.define(f"discovery::{name}", signature)
    torch.library.register_fake(f"discovery::{name}", lambda x: torch.empty_like(x))
    return getattr(torch.ops.discovery, name).default


def node_of(target, *shape: int):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(shape, device="meta")
    node = graph.call_function(target, (x,))
    node.meta["val"] = torch.empty(shape, device="meta")
    graph.output((node,))
    return node


def test_an_op_without_a_kernel_is_replicated():
    node = node_of(abstract("nowhere", "(Tensor x) -> Tensor"), 4, 8)
    assert not has_rule(node)
    assert [s.name for s in strategies(node)] == ["-"]
    assert "nowhere" in why_whole(node)


@pytest.fixture
def never(monkeypatch):
    """No op may be tried."""

    class Closed:
        def answer(self, question):
            raise AssertionError(f"{question.op} was tried")

    monkeypatch.setattr(discovery, "_laboratory", Closed())


@torch.library.custom_op("discovery::writes", mutates_args=("x",))
def writes(x: torch.Tensor) -> torch.Tensor:
    x.add_(1)
    return x.clone()


@torch.library.custom_op("discovery::draws", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draws(x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand_like(x)


@pytest.mark.parametrize(
    "target, reason",
    [
        (torch.ops.discovery.writes.default, "side effects"),
        (torch.ops.discovery.draws.default, "random"),
        (aten.nonzero.default, "depends on data"),
        pytest.param(torch.sin, "not an op", id="a function"),
    ],
    ids=str,
)
def test_some_ops_are_never_tried(never, target, reason):
    node = node_of(target, 4, 8)
    assert not has_rule(node) and reason in why_whole(node)


@custom
def hidden_draw(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rand_like(x)


def test_an_op_that_draws_without_saying_so_is_replicated():
    op = made(hidden_draw, (t(4, 8),), grads=(False,))
    assert not has_rule(op.node) and "not a function" in why_whole(op.node)


# -- the process -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("discovery::fragile", mutates_args=())
def fragile(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Reads out of bounds where it is handed a part of the weight."""
    if x.shape[-1] != weight.shape[0]:
        ctypes.string_at(0)
    return x * weight


@torch.library.custom_op("discovery::stuck", mutates_args=())
def stuck(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    while x.shape[-1] != weight.shape[0]:
        time.sleep(1)
    return x * weight


def test_a_crash_costs_one_candidate():
    op = made(torch.ops.discovery.fragile.default, (t(4, 8), t(8)), grads=(False, False))
    assert {str(s) for s in discovery.discovered(op.node)} >= {"x0.0: S(0) R -> S(0)", "x0.1: S(1) S(0) -> S(1)"}


def test_a_hang_costs_its_time(monkeypatch):
    monkeypatch.setattr(laboratory, "HANG_SECONDS", 2)
    monkeypatch.setattr(discovery, "_laboratory", laboratory.Laboratory())
    op = made(torch.ops.discovery.stuck.default, (t(4, 8), t(8)), grads=(False, False))
    started = time.monotonic()
    assert "x0.1: S(1) S(0) -> S(1)" in {str(s) for s in discovery.discovered(op.node)}
    assert time.monotonic() - started < 30
    discovery._laboratory.close()


def test_one_process_serves_many_ops_and_learns_of_new_ones(monkeypatch):
    room = laboratory.Laboratory()
    monkeypatch.setattr(discovery, "_laboratory", room)
    monkeypatch.setattr(discovery, "_answers", {})
    assert discovery.discovered(made(rms, (t(4, 8, 16), t(16))).node)
    first = room._child
    assert discovery.discovered(made(both, (t(4, 8), t(4, 8))).node)
    assert room._child == first

    def late(x: torch.Tensor) -> torch.Tensor:
        return x.cos()

    late.__annotations__ = {"x": torch.Tensor, "return": torch.Tensor}
    torch.library.custom_op("discovery::late", late, mutates_args=())
    node = node_of(torch.ops.discovery.late.default, 4, 8)
    assert {str(s) for s in discovery.discovered(node)} == {"x0.0: S(0) -> S(0)", "x0.1: S(1) -> S(1)"}
    assert room._child != first
    pid = room._child[0]
    room.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_interpreter_of_its_own_serves_where_a_fork_cannot(monkeypatch):
    """A fork of a process whose autograd has threads for devices says so, and another process answers."""
    room = laboratory.Laboratory()
    monkeypatch.setattr(discovery, "_laboratory", room)
    monkeypatch.setattr(discovery, "_answers", {})
    ask = room._ask

    def forked(question, crashed):
        return ask(question, crashed) if room._fresh else Answer(reason="Unable to handle fork-based multiprocessing")

    monkeypatch.setattr(room, "_ask", forked)
    assert "x0.0: S(0) D -> S(0)" in {str(s) for s in discovery.discovered(made(rms, (t(4, 8, 16), t(16))).node)}
    assert room._fresh
    room.close()


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty store and an empty memory."""
    monkeypatch.setenv("SHARDPLAN_CACHE", str(tmp_path))
    monkeypatch.setattr(discovery, "_answers", {})
    return monkeypatch


def test_answers_are_kept_on_disk_for_ops_of_torch(fresh, request):
    first = discovery.discovered(made(aten.linalg_inv.default, (t(48, 128, 128),)).node)
    fresh.setattr(discovery, "_answers", {})
    request.getfixturevalue("never")
    # Other sizes that are related in the same way are the same question.
    assert discovery.discovered(made(aten.linalg_inv.default, (t(80, 192, 192),)).node) == first != []
    with pytest.raises(AssertionError, match="was tried"):
        discovery.discovered(made(aten.linalg_inv.default, (t(64, 64, 64),)).node)


def test_custom_ops_are_tried_again_by_the_next_process(fresh, request):
    assert discovery.discovered(made(both, (t(4, 8), t(4, 8))).node)
    fresh.setattr(discovery, "_answers", {})
    request.getfixturevalue("never")
    with pytest.raises(AssertionError, match="was tried"):
        discovery.discovered(made(both, (t(4, 8), t(4, 8))).node)


@pytest.mark.parametrize("text", ["", "nonsense", "{}", '{"strategies": ["x"], "reason": ""}', "[1]"])
def test_an_entry_that_cannot_be_read_is_none(fresh, text):
    node = made(aten.linalg_inv.default, (t(4, 6, 6),)).node
    question = discovery.ask(node)
    Store.open().put_text(discovery._key(question), text)
    assert [str(s) for s in discovery.discovered(node)] == ["x0.0: S(0) -> S(0)"]
    assert discovery._read(Store.open().get_text(discovery._key(question))) == Answer(("x0.0: S(0) -> S(0)",))
