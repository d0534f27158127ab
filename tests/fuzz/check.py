"""One example: the traced graph, and every plan of it, against the model run eagerly on the whole batch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from shardplan.planner.deadlock import check
from shardplan.planner.export import trace_model
from shardplan.planner.stages import split_stages
from shardplan.planner.trace import Trace
from shardplan.rewrite import compile
from shardplan.rewrite.reference import run_program
from tests import models
from tests.fuzz.plan_draws import Choice, draw_plan, recut
from tests.fuzz.program import Loaded, Program

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 1.5e-1}
ROUNDED = 1e-6
"""What double precision tolerates where a part is computed in single precision."""
FLOOR = 1e-3


class Uninteresting(Exception):
    """Eager PyTorch itself cannot train the model, or its result hangs on the last digit."""


class Mismatch(AssertionError):
    """A traced or split model computes something else."""


@dataclass(slots=True)
class Example:
    """A program and what eager execution gives."""

    program: Program
    loaded: Loaded
    expected: models.Result
    state: dict[str, torch.Tensor]
    tolerance: float
    trace: Trace | None = None
    tried: list[str] = field(default_factory=list)


def prepare(program: Program) -> Example:
    """Run the model eagerly. Raises Uninteresting where that fails or gives no finite number."""
    loaded = program.load()
    state = {k: v.detach().clone() for k, v in loaded.model.state_dict(keep_vars=True).items()}
    state |= {k: v.detach().clone() for k, v in loaded.model.named_buffers()}
    expected = eager(loaded)
    tolerance = TOLERANCE[getattr(torch, program.dtype)]
    if program.dtype == "float64" and any(".float()" in line or "float32" in line for line in program.body):
        tolerance = ROUNDED
    if any("autocast" in line for line in program.body):
        tolerance = TOLERANCE[torch.bfloat16]
    fresh = program.load()  # the run above has changed the buffers of this one
    return Example(program, fresh, expected, state, tolerance)


def eager(loaded: Loaded, double: bool = False) -> models.Result:
    """Loss, outputs, gradients and buffers of a copy of the model."""
    case = models.Case(copy.deepcopy(loaded.model), {k: _copied(v) for k, v in loaded.batch.items()}, loaded.loss_fn)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            result = models.run_eager(case)
        except Exception as error:
            raise Uninteresting(str(error)) from error
    values = [result.loss, *result.gradients.values()]
    if result.loss is None or not all(bool(torch.isfinite(v).all()) for v in values if v is not None):
        raise Uninteresting("not finite")
    return result


def _copied(value: object) -> object:
    return value.clone() if isinstance(value, torch.Tensor) else value


def trace_of(example: Example) -> Trace:
    """Trace the model and compare the traced graph on one device."""
    loaded = example.loaded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trace = trace_model(loaded.model, (), loaded.kwargs, loss_fn=loaded.loss_fn, target=loaded.target)
    example.trace = trace
    batch = {k: _copied(v) for k, v in loaded.batch.items()}
    result = models.run_trace(trace, loaded.model, batch)
    compare(example, "traced", result.loss, result.gradients, result.buffers, result.outputs)
    return trace


def check_plan(example: Example, choice: Choice) -> bool:
    """The rewritten program of one plan, its ranks simulated, against eager execution. False: there is no such plan."""
    assert example.trace is not None
    trace = recut(example.trace, choice)
    plan = draw_plan(trace, choice)
    if plan is None:
        return False
    where = str(choice)
    batch = inputs_of(example.loaded, trace)
    split = split_stages(trace, tuple(stage.first for stage in plan.stages))
    check(plan.instructions, split.edges(), split.grad_edges())
    result = run_program(compile(trace, plan), example.state, batch)
    compare(example, where, result.loss, result.gradients, result.buffers, None)
    if choice.outputs:
        forward = run_program(compile(trace, plan, "forward"), example.state, batch)
        given = [
            forward.outputs[leaf] for leaf in trace.output_leaves if isinstance(leaf, int) and leaf in forward.outputs
        ]
        expected = [
            value
            for value, leaf in zip(example.expected.outputs, _tensor_leaves(trace), strict=True)
            if leaf in forward.outputs
        ]
        compare(example, f"{where} forward", None, None, None, given, expected)
    return True


def _tensor_leaves(trace: Trace) -> list[int]:
    return [leaf for leaf in trace.output_leaves if isinstance(leaf, int)]


def inputs_of(loaded: Loaded, trace: Trace) -> dict[str, torch.Tensor]:
    """The batch by the names that the trace gives its inputs."""
    return {
        s.name: loaded.batch["target"] if s.leaf < 0 else loaded.batch[s.name]
        for s in trace.sources.values()
        if s.kind == "input"
    }


def compare(
    example: Example,
    where: str,
    loss: torch.Tensor | None,
    gradients: dict[str, torch.Tensor | None] | None,
    buffers: dict[str, torch.Tensor] | None,
    outputs: Sequence[torch.Tensor] | None,
    expected_outputs: Sequence[torch.Tensor] | None = None,
) -> None:
    """Raises Mismatch with the first value that differs."""
    expected = example.expected
    tolerance = example.tolerance
    if gradients is not None:
        assert loss is not None and expected.loss is not None
        _near(loss, expected.loss, tolerance, 1e-3, f"{where}: loss")
        largest = max(float(g.double().norm()) for g in expected.gradients.values())
        for name, value in expected.gradients.items():
            mine = gradients.get(name)
            if mine is None:
                if bool((value == 0).all()):
                    continue  # cut by a rule that knows the gradient to be zero
                raise Mismatch(f"{where}: no gradient of {name}")
            _near(mine, value, tolerance, FLOOR * max(largest, 1e-3), f"{where}: gradient of {name}")
        for name, mine in gradients.items():
            if mine is not None and name not in expected.gradients and not bool((mine == 0).all()):
                raise Mismatch(f"{where}: {name} has a gradient, eagerly it has none")
    for name, value in (buffers or {}).items():
        _near(value, expected.buffers[name], tolerance, 1e-3, f"{where}: buffer {name}")
    for index, value in enumerate(outputs or ()):
        theirs = (expected.outputs if expected_outputs is None else expected_outputs)[index]
        _near(value, theirs, tolerance, 1e-3, f"{where}: output {index}")


def _near(mine: torch.Tensor, theirs: torch.Tensor, tolerance: float, floor: float, what: str) -> None:
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        raise Mismatch(f"{what}: {mine.dtype}{list(mine.shape)}, not {theirs.dtype}{list(theirs.shape)}")
    mine, theirs = mine.detach().double(), theirs.detach().double()
    error = float((mine - theirs).norm()) / max(float(theirs.norm()), floor)
    if not error < tolerance:
        raise Mismatch(f"{what}: relative error {error:.1e}")


def unstable(program: Program) -> bool:
    """Whether the eager result hangs on the last digits of the parameters and inputs, so that no two ways agree."""
    expected = prepare(program).expected
    loaded = program.load()
    generator = torch.Generator().manual_seed(5)
    size = {"float64": 1e-13, "float32": 1e-6, "bfloat16": 1e-2}[program.dtype]
    with torch.no_grad():
        for value in [*loaded.model.parameters(), *loaded.batch.values()]:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64) * size
                value.copy_(value.double() * (1 + noise))
    try:
        moved = eager(loaded)
    except Uninteresting:
        return True
    example = Example(program, loaded, expected, {}, 0.3 * TOLERANCE[getattr(torch, program.dtype)])
    try:
        compare(example, "moved", moved.loss, dict(moved.gradients), moved.buffers, moved.outputs)
    except Mismatch:
        return True
    return False
