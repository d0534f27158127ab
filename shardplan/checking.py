"""`check`: proof on the user's own model and batch that a plan computes what one device computes.

The plan runs on real ranks, the model in this process, both from the same weights on the same global batch: the loss,
every gradient and every buffer of a training step, then the outputs in evaluation mode. What rounding alone does is
measured where possible, by the model in float64: a plan may be a few times as far off, not more. Models that draw
random numbers (dropout) are compared with the unsplit program, which draws the same ones.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from shardplan.api import auto_parallel, under_torchrun
from shardplan.batch import Batch, Inputs, example_batch
from shardplan.errors import UsageError
from shardplan.parallel_model import ParallelModel
from shardplan.planner.plan import Plan
from shardplan.planner.precision import compute_dtype, lower
from shardplan.planner.rules.randomness import draws
from shardplan.planner.trace import Trace
from shardplan.planner.unsplit import unsplit
from shardplan.planning import resolve_model
from shardplan.rewrite import compile as compile_program
from shardplan.rewrite.compare import Difference, first_difference, relative_error
from shardplan.rewrite.reference import run_program

# Relative errors that sums in another order make in one step of ordinary models, where nothing better is known.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
# How much of that has to be there before float64 tells that the model itself is as sensitive.
LEAST = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TIMES_ROUNDING = 4.0
# Gradients whose true value is zero (a key's bias) are judged by the size of the others.
GRADIENT_FLOOR = 1e-3


@dataclass(frozen=True, slots=True)
class Compared:
    """what: "loss", "gradient", "buffer" or "output". error, tolerance: relative, see `relative_error`."""

    what: str
    name: str
    error: float
    tolerance: float

    @property
    def equal(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True, slots=True)
class Check:
    """What `check` found. first: the op at fault, where a simulated run of the same program shows it."""

    plan: Plan
    against: str
    compared: tuple[Compared, ...]
    first: Difference | None = None

    @property
    def equal(self) -> bool:
        return all(item.equal for item in self.compared)

    def __str__(self) -> str:
        lines = [f"{self.plan.model} under {self.plan.degrees()} against {self.against}:"]
        for what in dict.fromkeys(item.what for item in self.compared):
            mine = [item for item in self.compared if item.what == what]
            worst = max(mine, key=lambda item: item.error / item.tolerance)
            bad = sum(not item.equal for item in mine)
            state = f"{bad} of {len(mine)} differ" if bad else "equal"
            named = f" ({worst.name})" if len(mine) > 1 else ""
            lines.append(
                f"  {what:9} {len(mine):5}  {state}; largest relative error {worst.error:.1e}{named}, "
                f"allowed {worst.tolerance:.1e}"
            )
        if self.equal:
            lines.append("The plan computes what one device computes.")
        elif self.first is not None:
            lines.append(f"First difference: {self.first}")
        else:
            lines.append(
                "A run of the same program with simulated ranks shows no difference: the fault is in the devices or in "
                "their communication."
            )
        return "\n".join(lines)

    def to_json(self) -> str:
        data = {
            "schema": 1,
            "model": self.plan.model,
            "degrees": self.plan.degrees(),
            "against": self.against,
            "equal": self.equal,
            "compared": [asdict(item) for item in self.compared],
            "first": asdict(self.first) if self.first else None,
        }
        return json.dumps(data, indent=1)


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Of one step from the same weights: (what, name) -> tensor on the CPU."""

    values: dict[tuple[str, str], torch.Tensor]

    def errors(self, truth: _Numbers) -> dict[tuple[str, str], float]:
        gradients = [float(v.double().norm()) for (what, _), v in truth.values.items() if what == "gradient"]
        floor = GRADIENT_FLOOR * max(gradients, default=0.0)
        found = {}
        for key, right in truth.values.items():
            mine = self.values.get(key)
            if mine is None:
                mine = torch.zeros_like(right)  # a parameter that is not read has no gradient rather than a zero one
            found[key] = relative_error(mine, right, floor if key[0] == "gradient" else 0.0)
        return found


def check(
    model: Any,
    devices: Any,
    example_inputs: Any,
    loss_fn: Callable[..., Any] | None = None,
    plan: Any = None,
    *,
    tolerance: float | None = None,
    seed: int = 0,
    **planning: Any,
) -> Check:
    """Run a plan (given, or found for these devices) and the model alone on one global batch, and compare.

    model: with values, in training mode for dropout and batch statistics to count. tolerance: relative, for everything;
    None: by the dtype and by what rounding does to this model. planning: further arguments of `auto_parallel`.
    The model is left as it was. Raises UsageError under torchrun and what `auto_parallel` raises.
    """
    if under_torchrun():
        raise UsageError("check starts its own workers", hints=["run it without torchrun"])
    alone = copy.deepcopy(resolve_model(model))
    batch = example_batch(alone, example_inputs, loss_fn is not None)
    state = {name: value.detach().cpu().clone() for name, value in _tensors(alone)}
    with auto_parallel(copy.deepcopy(alone), devices, batch, loss_fn, plan=plan, seed=seed, **planning) as pm:
        trace = pm.trace
        mine = _of_plan(pm, alone, batch)
    dtype = compute_dtype(trace.precision)
    if dtype is not None:
        lower(alone, dtype)
    random = any(draws(node) for node in trace.nodes() if node.op == "call_function")
    inputs = Inputs(trace, batch.on_meta(), batch.target).bind(batch)
    if random:
        truth, against = _of_unsplit(alone, trace, inputs, state, batch, seed), "the unsplit program"
        noise = {}
    else:
        truth, against = _of_model(copy.deepcopy(alone), loss_fn, batch), "the model on one device"
        noise = _noise(alone, loss_fn, batch, truth)
    errors = mine.errors(truth)
    compared = tuple(
        Compared(*key, error, tolerance or _allowed(truth.values[key], alone, noise.get(key)))
        for key, error in errors.items()
    )
    first = None
    if not all(item.equal for item in compared):
        allowed = min(item.tolerance for item in compared)
        first = first_difference(trace, pm.plan, state, {n: t.cpu() for n, t in inputs.items()}, allowed, seed)
    return Check(pm.plan, against, compared, first)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _allowed(value: torch.Tensor, model: nn.Module, noise: float | None) -> float:
    """By the roughest dtype that the number went through."""
    dtypes = {t.dtype for _, t in _tensors(model)} | {value.dtype}
    rough = max((d for d in dtypes if d in ROUNDING), key=lambda d: ROUNDING[d], default=torch.float32)
    return ROUNDING[rough] if noise is None else max(LEAST[rough], TIMES_ROUNDING * noise)


# -- three ways to the numbers -----------------------------------------------------------------------------------------


def _of_plan(pm: ParallelModel, alone: nn.Module, batch: Batch) -> _Numbers:
    found = {("loss", "loss"): pm.step(*batch.args, target=batch.target, **batch.kwargs).detach().cpu()}
    found |= {("gradient", name): value for name, value in pm.full_gradients().items()}
    state = pm.full_state_dict()
    found |= {("buffer", name): state[name] for name, _ in alone.named_buffers() if name in state}
    outputs = pm.eval()(*batch.args, **batch.kwargs)
    return _Numbers(found | _outputs(outputs))


def _of_model(alone: nn.Module, loss_fn: Callable[..., Any] | None, batch: Batch) -> _Numbers:
    output = alone(*batch.args, **batch.kwargs)
    loss = loss_fn(output, batch.target) if loss_fn is not None else _own_loss(output)
    loss.backward()
    found = {("loss", "loss"): loss.detach().cpu()}
    found |= {("gradient", n): p.grad.detach().cpu() for n, p in alone.named_parameters() if p.grad is not None}
    return _Numbers(found | _evaluated(alone, batch))


def _of_unsplit(
    alone: nn.Module,
    trace: Trace,
    inputs: dict[str, torch.Tensor],
    state: dict[str, torch.Tensor],
    batch: Batch,
    seed: int,
) -> _Numbers:
    result = run_program(compile_program(trace, unsplit(trace)), state, inputs, seed=seed)
    assert result.loss is not None
    found = {("loss", "loss"): result.loss}
    found |= {("gradient", name): g for name, g in result.gradients.items() if g is not None}
    after = copy.deepcopy(alone)
    with torch.no_grad():
        for name, value in after.named_buffers():
            if name in result.buffers:
                value.copy_(result.buffers[name])
    return _Numbers(found | _evaluated(after, batch))


def _evaluated(alone: nn.Module, batch: Batch) -> dict[tuple[str, str], torch.Tensor]:
    """Persistent buffers after the step, and the outputs in evaluation mode."""
    kept = alone.state_dict()
    found = {("buffer", name): value.detach().cpu() for name, value in alone.named_buffers() if name in kept}
    with torch.no_grad():
        return found | _outputs(alone.eval()(*batch.args, **batch.kwargs))


def _outputs(output: Any) -> dict[tuple[str, str], torch.Tensor]:
    leaves = pytree.tree_flatten_with_path(output)[0]
    return {
        ("output", pytree.keystr(path) or "output"): leaf.detach().cpu()
        for path, leaf in leaves
        if isinstance(leaf, torch.Tensor)
    }


def _own_loss(output: Any) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    return output["loss"] if isinstance(output, dict) else output.loss


def _noise(
    alone: nn.Module, loss_fn: Callable[..., Any] | None, batch: Batch, found: _Numbers
) -> dict[tuple[str, str], float]:
    """Relative error of the model in its own dtypes against float64; {} for models that do not run in float64."""

    def widen(value: torch.Tensor) -> torch.Tensor:
        return value.double() if value.is_floating_point() else value

    try:
        wide = pytree.tree_map_only(torch.Tensor, widen, (batch.args, batch.kwargs, batch.target))
        truth = _of_model(copy.deepcopy(alone).double(), loss_fn, Batch(*wide))
    except Exception:  # dtypes written into the model: there is nothing to measure with
        return {}
    return found.errors(truth) if found.values.keys() == truth.values.keys() else {}
