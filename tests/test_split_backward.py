"""Backward in two parts (zero-bubble schedules): exact, nothing computed twice, nothing kept that is not needed."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shardplan.rewrite import compile
from shardplan.rewrite.later import Later, hold, linear, recomputed, split
from shardplan.rewrite.reference import run_program
from tests.plans import random_plan
from tests.test_reference import ROUNDS_TO_FP32, batch_of, compare, traced  # noqa: F401
from tests.test_storage import stored

CASES = [
    ("llama", ((1, 1), (1, 2)), False),
    ("llama", ((1, 2), (1, 2), (1, 2)), True),
    ("gpt2", ((1, 1), (1, 1), (1, 1)), True),
    ("t5", ((1, 1), (2, 1), (1, 1)), True),
    ("t5", ((1, 2), (1, 1)), False),
    ("vit", ((2, 1), (1, 2)), False),
    ("resnet", ((1, 1), (1, 2)), True),
    ("encoder", ((1, 2), (2, 1), (1, 1)), True),
    ("bytegpt", ((1, 1), (1, 1)), False),
]


@pytest.mark.parametrize(("name", "meshes", "recompute"), CASES)
def test_two_parts_are_the_whole(traced, name, meshes, recompute):  # noqa: F811
    case, trace, eager, state = traced(name)
    segments = [s.name for s in trace.segments] if recompute else []
    plan = random_plan(
        trace, meshes=meshes, microbatches=1 if name == "resnet" else 2, seed=5, schedule="zb", rematerialize=segments
    )
    program = compile(trace, plan)
    sources = [code.source for code in program.stages]
    assert "later." not in sources[0] and all(result.late for result in program.stages[0].results)
    assert any("later.linear(" in source or "later.split(" in source for source in sources[1:])
    assert not recompute or name == "resnet" or any("later.recomputed(" in source for source in sources[1:])
    result = run_program(program, state, batch_of(case, trace))
    compare(result, eager, 1e-6 if name in ROUNDS_TO_FP32 else 1e-9, f"{name} {meshes}")


@pytest.mark.parametrize("level", [1, 2, 3])
def test_parameters_split_for_storage(traced, level):  # noqa: F811
    """Those that are gathered for a segment are not kept for the second part: their gradients come with the first."""
    case, trace, eager, state = traced("t5")
    again = [s.name for i, s in enumerate(trace.segments) if i % 2]
    plan = random_plan(trace, dp=2, pp=2, microbatches=2, seed=5, schedule="zb", rematerialize=again)
    program = compile(trace, stored(trace, plan, level))
    assert level == 1 or "later.hold(" not in "".join(code.source for code in program.stages)
    compare(run_program(program, state, batch_of(case, trace)), eager, 1e-6, f"level {level}")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_nothing_is_computed_twice(traced, name, recompute):  # noqa: F811
    case, trace, _, state = traced(name)
    segments = [s.name for s in trace.segments] if recompute else []
    flops = []
    for schedule in ("1f1b", "zb"):
        plan = random_plan(trace, pp=2, microbatches=2, seed=5, schedule=schedule, rematerialize=segments)
        with FlopCounterMode(display=False) as counter:
            run_program(compile(trace, plan), state, batch_of(case, trace))
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


class _Comm:
    def __init__(self) -> None:
        self.later = Later()


def test_what_waits_is_what_the_product_keeps():
    """After the first part only the product's input and its gradient are alive, not what lies between products."""
    import weakref

    comm = _Comm()
    w = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(2, 4, requires_grad=True)

    def run(x: torch.Tensor) -> tuple[torch.Tensor, list[weakref.ref[torch.Tensor]]]:
        h = split(comm, lambda x, w: x @ w, (x,), (w,))  # type: ignore[arg-type]
        s = torch.sigmoid(h)
        y = split(comm, lambda s, w: s @ w, (s.exp(),), (w,))  # type: ignore[arg-type]
        return y.square().sum(), [weakref.ref(s), weakref.ref(h)]

    loss, between = run(x)
    loss.backward()
    del loss
    assert w.grad is None and x.grad is not None
    assert not any(reference() is not None for reference in between)
    comm.later.run()
    x2, w2 = x.detach().requires_grad_(), w.detach().requires_grad_()
    ((x2 @ w2).sigmoid().exp() @ w2).square().sum().backward()
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(w.grad, w2.grad)


def test_values_of_weights_wait_and_segments_run_again_once():
    comm = _Comm()
    w, b = torch.randn(4, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    x = torch.randn(2, 4, requires_grad=True)
    runs = []

    def segment(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        runs.append(1)
        held = hold(comm, w.tanh())  # type: ignore[arg-type]
        y = split(comm, lambda x, v: torch.nn.functional.linear(x, v), (x,), (held,)) + b  # type: ignore[arg-type]
        return y, y.argmax(-1)

    y, index = recomputed(comm, segment, (x,), (w, b), (0,))  # type: ignore[arg-type]
    z = split(comm, lambda y, w: y @ w, (y,), (w,))  # type: ignore[arg-type]
    assert not index.requires_grad
    z.sin().sum().backward()
    assert w.grad is None and b.grad is not None and len(runs) == 2
    comm.later.run()
    assert len(runs) == 2
    x2, w2, b2 = (t.detach().requires_grad_() for t in (x, w, b))
    ((x2 @ w2.tanh().t() + b2) @ w2).sin().sum().backward()
    for mine, theirs in ((x, x2), (w, w2), (b, b2)):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_maps(bias: bool):
    comm = _Comm()
    w, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 4), (5,)))
    arrived = []
    w.register_post_accumulate_grad_hook(lambda p: arrived.append(p))

    def segment(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        h = linear(comm, x, w, b if bias else None)  # type: ignore[arg-type]
        return linear(comm, h.sin(), w.detach(), transposed=True, kept=False)  # type: ignore[arg-type]

    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    y = recomputed(comm, segment, (x,), (w, b), (0,))  # type: ignore[arg-type]
    (linear(comm, y, w) ** 2).sum().backward()  # type: ignore[arg-type]
    assert w.grad is None and not arrived
    comm.later.run()
    x2, w2, b2 = (t.detach().requires_grad_() for t in (x, w, b))
    h = torch.nn.functional.linear(x2, w2, b2 if bias else None).sin()
    z = torch.nn.functional.linear(h @ w2.detach(), w2)
    (z**2).sum().backward()
    assert arrived
    for mine, theirs in ((x, x2), (w, w2), (b, b2)):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)
