"""Models that random graphs once found to be traced, planned or split wrongly, as small as they got."""

from __future__ import annotations

import textwrap

import pytest

from tests.fuzz.check import check_plan, prepare, trace_of
from tests.fuzz.plan_draws import Choice
from tests.fuzz.program import Program

X = {"x": "torch.randn(4, 4, dtype=D)"}


def program(attributes: str, body: str, returned: str, inputs: dict[str, str] | None = None) -> Program:
    """attributes, body: lines; a trainable parameter `last` is added to the model."""
    lines = ["self.last = nn.Parameter(torch.ones(2, dtype=D))", *textwrap.dedent(attributes).strip().splitlines()]
    found = Program("float64", lines, dict(inputs or X), textwrap.dedent(body).strip().splitlines())
    found.returned = f"({returned}) * self.last.sum()"
    return found


def parameter(name: str, *shape: int) -> str:
    return f"self.{name} = nn.Parameter(torch.randn({list(shape)}, dtype=D))"


TRACED = {
    "a write through detach leaves the gradient": program(
        parameter("w", 4, 4), "v = (x @ self.w).clone()\nd = v.detach()\nd.add_(d)", "(v * d).sum()"
    ),
    "a write under no_grad leaves the gradient": program(
        parameter("w", 4, 4), "v = (x @ self.w).clone()\nwith torch.no_grad(): v[0].mul_(3.0)", "(v ** 2).sum()"
    ),
    "a write under no_grad to a view made before": program(
        parameter("w", 4, 4),
        "v = (x @ self.w).clone()\nu = v.mT[1:]\nwith torch.no_grad(): u.mul_(3.0)",
        "(v * v).sum()",
    ),
    "a write through mT": program(parameter("w", 4, 4), "v = x @ self.w\nu = v.mT\nu[0] = u[0] * 2", "v.tanh().sum()"),
    "a write to what a loss has read": program(
        parameter("w", 4, 4),
        "a = F.huber_loss(x, x + 1)\nx.add_(a)\nu, v = torch.broadcast_tensors(x, x[:1] * 2)\nu.add_(v)",
        "(x @ self.w).tanh().sum()",
    ),
    "a write through movedim": program(
        parameter("w", 4, 3, 2),
        "v = x[:, :, None, None] * self.w\nu = v.movedim(0, 2)\nu[0] = u[1] * 2",
        "v.tanh().sum()",
    ),
}


@pytest.mark.parametrize("name", TRACED)
def test_traced(name: str):
    trace_of(prepare(TRACED[name]))


TWICE = "v = self.bn(x)\nu = self.bn(v) + x"
SPLIT = {
    "a constant index is cut where it is read": (
        program(parameter("w", 2, 4), "v = x.clone()\nv.index_add_(0, torch.tensor([0, 0]), self.w)", "v.mean()"),
        {"tp": 2},
    ),
    "statistics written by two layers lie in one way": (
        program("self.bn = nn.BatchNorm1d(4, dtype=D)", TWICE, "(u ** 2).logsumexp(0).sum()"),
        {"tp": 2},
    ),
    "statistics written by two layers stay on one stage": (
        program(
            f"self.bn = nn.BatchNorm1d(4, dtype=D)\n{parameter('w', 4, 4)}",
            "v = self.bn(x) @ self.w\nu = self.bn(v) @ self.w",
            "u.tanh().sum()",
        ),
        {"pp": 2},
    ),
    "a counter is written once a step": (
        program(
            'self.register_buffer("n", torch.zeros((), dtype=torch.long))', "self.n.add_(1)\nv = x * self.n", "v.mean()"
        ),
        {"microbatches": 2},
    ),
    "replicas gather what a view needs whole, within a microbatch": (
        program(
            parameter("w", 4, 4), "v = (x @ self.w).view(2, 4, 4)", "v.mean()", {"x": "torch.randn(8, 4, dtype=D)"}
        ),
        {"dp": 4, "microbatches": 2},
    ),
    "classes do not lie on the microbatches": (
        program("", "v = x.flatten(0, 1)", "F.cross_entropy(v, torch.tensor(3))"),
        {"microbatches": 2},
    ),
    "tokens that every microbatch has all of are counted once": (
        program(
            parameter("w", 4, 4),
            "v = table @ self.w",
            "F.cross_entropy(v, ids, ignore_index=0) + x.mean()",
            {"x": "torch.randn(8, 4, dtype=D)", "table": "torch.randn(9, 4, dtype=D)", "ids": "torch.arange(9) % 4"},
        ),
        {"tp": 3, "microbatches": 2},
    ),
    "classes lie on two axes": (
        program("", "v = x.flatten(0, 1)", "F.cross_entropy(v, torch.tensor(3))"),
        {"dp": 2, "tp": 2},
    ),
}


@pytest.mark.parametrize("name", SPLIT)
def test_split(name: str):
    found, degrees = SPLIT[name]
    example = prepare(found)
    trace_of(example)
    for seed in range(4):
        sizes = {"dp": 1, "tp": 1, "pp": 1, "microbatches": 1} | degrees
        check_plan(example, Choice(**sizes, schedule="1f1b", split=0.9, recompute=0, outputs=True, seed=seed))
