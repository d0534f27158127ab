"""Backward in two parts (zero-bubble schedules): exact, nothing computed twice, nothing kept that is not needed."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shardplan.rewrite import compile
from shardplan.rewrite.later import Later, hold, recomputed, split
from shardplan.rewrite.reference import run_program
from tests.plans import random_plan
from tests.test_reference import ROUNDS_TO_FP32, batch_of, compare, traced  # noqa: F401

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
    assert any("later.split(" in source for source in sources[1:])
    assert not recompute or name == "resnet" or any("later.recomputed(" in source for source in sources[1:])
    result = run_program(program, state, batch_of(case, trace))
    compare(result, eager, 1e-6 if name in ROUNDS_TO_FP32 else 1e-9, f"{name} {meshes}")


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_is_computed_twice(traced, recompute):  # noqa: F811
    case, trace, _, state = traced("gpt2")
    segments = [s.name for s in trace.segments] if recompute else []
    flops = []
    for schedule in ("1f1b", "zb"):
        plan = random_plan(trace, pp=2, microbatches=2, seed=5, schedule=schedule, rematerialize=segments)
        with FlopCounterMode(display=False) as counter:
            run_program(compile(trace, plan), state, batch_of(case, trace))
        flops.append(counter.get_total_flops())
    # Of a segment that is run again, the last product is too: torch's checkpoint stops before it.
    assert 0 < flops[0] <= flops[1] <= (1.05 if recompute else 1.0) * flops[0]


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
