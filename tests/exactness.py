"""A model with its loss under many plans against the model as one device runs it: loss, every gradient, buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from shardplan.planner.export import trace_model
from shardplan.planner.trace import Trace
from shardplan.rewrite import compile
from shardplan.rewrite.reference import ReferenceResult, run_program
from tests.models import loss_of
from tests.plans import random_plan

PLANS: dict[str, dict[str, int]] = {
    "one device": {},
    "dp2": {"dp": 2},
    "dp4": {"dp": 4},
    "m4": {"microbatches": 4},
    "dp2 m2": {"dp": 2, "microbatches": 2},
    "tp2": {"tp": 2},
    "tp2 other": {"tp": 2, "seed": 1},
    "pp2": {"pp": 2},
    "pp2 m4": {"pp": 2, "microbatches": 4},
    "dp2 tp2 pp2 m2": {"dp": 2, "tp": 2, "pp": 2, "microbatches": 2, "seed": 2},
}


@dataclass(slots=True)
class Case:
    """One training step. args: of the model; target: goes to loss_fn with the output.

    whole: axes ("dp", "mb") on which the batch cannot be split exactly; the planner has to say so.
    """

    model: nn.Module
    args: tuple[Any, ...]
    loss_fn: Callable[..., Any] | None = None
    target: Any = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    whole: tuple[str, ...] = ()


@dataclass(slots=True)
class Step:
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]


def eager(case: Case, dtype: torch.dtype | None = None) -> Step:
    """What one device computes, the model left alone. dtype: of everything floating, where another is wanted."""
    model = copy.deepcopy(case.model)
    inputs = case.args, case.kwargs, case.target
    if dtype is not None:
        model = model.to(dtype)
        inputs = pytree.tree_map(
            lambda t: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t, inputs
        )
    args, kwargs, target = inputs
    output = model(*args, **kwargs)
    loss = case.loss_fn(output, target) if case.loss_fn else loss_of(output)
    assert loss is not None
    if loss.requires_grad:
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return Step(loss.detach(), gradients, {name: b.detach() for name, b in model.named_buffers()})


class Planned:
    """The traced case, to be run under plans."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.trace: Trace = trace_model(case.model, case.args, case.kwargs, loss_fn=case.loss_fn, target=case.target)
        model = case.model
        self.state = {n: p.detach().clone() for n, p in (*model.named_parameters(), *model.named_buffers())}
        leaves = pytree.tree_leaves((case.args, case.kwargs, case.target))
        self.batch = {s.name: leaves[s.leaf] for s in self.trace.sources.values() if s.kind == "input"}

    def run(self, seed: int = 0, **plan: Any) -> ReferenceResult:
        return run_program(compile(self.trace, random_plan(self.trace, **plan)), self.state, self.batch, seed=seed)


def close(mine: torch.Tensor | None, theirs: torch.Tensor | None, tolerance: float, floor: float, where: str) -> None:
    """Relative to the tensor's norm, or to `floor` where that is larger. No gradient is a gradient of zero."""
    if mine is None or theirs is None:
        left = mine if theirs is None else theirs
        assert left is None or not left.any(), f"{where}: a gradient that the other has not"
        return
    assert mine.shape == theirs.shape and mine.dtype == theirs.dtype, f"{where}: {mine.dtype}{list(mine.shape)}"
    difference = float((mine.double() - theirs.double()).norm())
    error = difference / max(float(theirs.double().norm()), floor)
    assert error <= tolerance, f"{where}: relative error {error:.2e}"


def check(case: Case, plans: Iterable[str] = tuple(PLANS), tolerance: float = 1e-9) -> None:
    """Loss, gradients and buffers of the case under every plan. Raises AssertionError where one differs."""
    expected, planned = eager(case), Planned(case)
    norms = [float(g.double().norm()) for g in expected.gradients.values() if g is not None]
    floor = max(1e-3 * max(norms, default=0.0), 1e-12)
    for name in plans:
        axes = {"dp": PLANS[name].get("dp", 1), "mb": PLANS[name].get("microbatches", 1)}
        refused = [axis for axis, size in axes.items() if size > 1 and axis in case.whole]
        try:
            found = planned.run(**PLANS[name])
        except ValueError as error:
            assert refused and str(error).startswith(f"{refused[-1]}: "), f"{name}: {error}"
            continue
        assert not refused, f"{name}: {refused} is split after all"
        assert found.loss is not None
        close(found.loss, expected.loss, tolerance, 1e-12, f"{name}: loss")
        for parameter, gradient in expected.gradients.items():
            close(found.gradients.get(parameter), gradient, tolerance, floor, f"{name}: gradient of {parameter}")
        for buffer, value in expected.buffers.items():
            if buffer in found.buffers:
                close(found.buffers[buffer], value, tolerance, 1e-12, f"{name}: buffer {buffer}")
