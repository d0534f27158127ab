"""Where a plan's program first departs from the unsplit one: op by op, forward and then backward, in this process.

Both programs are run by `rewrite.reference` (simulated ranks, the code that real ranks run) with the results of ops
returned beside the loss. Forward, the first op in graph order whose result differs is at fault; where all results
agree, the fault is in the backward of an op that reads the last value whose gradient differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from shardplan.planner.describe import op_name
from shardplan.planner.plan import Plan
from shardplan.planner.trace import Trace, info, is_tensor, module_path, needs_grad, resolve
from shardplan.planner.unsplit import unsplit
from shardplan.rewrite.compiler import compile_program
from shardplan.rewrite.reference import run_program

CHUNK_NBYTES = 1 << 29
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Difference:
    """phase: "forward" or "backward". node, op, module: of the op at fault; place: file:line of the model's code where
    known. splits: how the plan splits it. error: relative error of its result (of the gradient it gives back)."""

    phase: str
    node: str
    op: str
    module: str
    place: str
    splits: dict[str, str]
    error: float

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        line = f" ({self.place})" if self.place else ""
        split = "; ".join(f"{axis} {text}" for axis, text in self.splits.items()) or "not split"
        return f"{self.phase} of {self.op}{where}{line}: relative error {self.error:.1e}; {self.node}: {split}"


def relative_error(found: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """Norm of the difference by the norm of what is expected (at least `floor`); inf where shapes or infinities
    differ, 0 or inf for values that are not floats."""
    if found.shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point() and not expected.is_complex():
        return 0.0 if torch.equal(found.to(expected.dtype), expected) else float("inf")
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = found.to(wide), expected.to(wide)
    odd = ~torch.isfinite(b.abs())
    if odd.any():
        if not torch.equal(torch.nan_to_num(a[odd].abs()), torch.nan_to_num(b[odd].abs())):
            return float("inf")
        a, b = a.masked_fill(odd, 0), b.masked_fill(odd, 0)
    scale = max(float(b.norm()), floor)
    error = float((a - b).norm())
    if error != error:
        return float("inf")
    return error / scale if scale else (0.0 if error == 0.0 else float("inf"))


def first_difference(
    trace: Trace, plan: Plan, state: Tensors, batch: Tensors, tolerance: float, seed: int = 0
) -> Difference | None:
    """The first op whose result, or gradient, differs by more than `tolerance`; None where all agree.

    state: whole parameters and buffers by name; batch: whole inputs by name, all on the CPU.
    """
    whole = unsplit(trace)
    split = replace(plan, stages=tuple(replace(stage, rematerialized=()) for stage in plan.stages))
    chunks = list(_chunks(trace))

    def values(of: Plan, nodes: Sequence[fx.Node]) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
        kind = "train" if trace.training else "forward"
        program = compile_program(trace, of, kind, watched=frozenset(node.name for node in nodes))
        return run_program(program, state, batch, seed=seed).watched

    for nodes in chunks:
        expected, found = values(whole, nodes), values(split, nodes)
        for node in nodes:
            if node.name not in expected or node.name not in found:
                continue
            error = relative_error(found[node.name][0], expected[node.name][0])
            if error > tolerance:
                return _difference("forward", node, plan, error)
    if not trace.training:
        return None
    suspect: tuple[fx.Node, float] | None = None
    for nodes in reversed(chunks):
        expected, found = values(whole, nodes), values(split, nodes)
        known = [(expected[n.name][1], found[n.name][1], n) for n in reversed(nodes) if n.name in found]
        floor = 1e-3 * max((float(g.norm()) for g, _, _ in known if g is not None), default=0.0)
        for right, mine, node in known:
            if right is None and mine is None:
                continue
            zero = torch.zeros(info(node).shape, dtype=info(node).dtype)
            error = relative_error(zero if mine is None else mine, zero if right is None else right, floor)
            if error > tolerance:
                suspect = node, error
                break
        if suspect is not None:
            break
    if suspect is not None:
        return _difference("backward", _reader(trace, suspect[0]), plan, suspect[1])
    return _wrong_parameter(trace, whole, split, plan, state, batch, tolerance, seed)


def _chunks(trace: Trace) -> Iterator[list[fx.Node]]:
    """Ops with tensor results in graph order, in runs of at most `CHUNK_NBYTES` bytes of results."""
    held, nbytes = [], 0
    inside = {name for segment in trace.segments for name in segment.nodes}
    for node in trace.nodes():
        if node.op != "call_function" or not is_tensor(node) or resolve(node)[0].name not in inside:
            continue
        if held and nbytes + info(node).nbytes > CHUNK_NBYTES:
            yield held
            held, nbytes = [], 0
        held.append(node)
        nbytes += info(node).nbytes
    if held:
        yield held


def _reader(trace: Trace, value: fx.Node) -> fx.Node:
    """The op that gave a value its wrong gradient: the last one that reads it, all later gradients being right."""
    readers = [node for node in trace.nodes() if value in node.all_input_nodes and node.op == "call_function"]
    return readers[-1] if readers else value


def _wrong_parameter(
    trace: Trace, whole: Plan, split: Plan, plan: Plan, state: Tensors, batch: Tensors, tolerance: float, seed: int
) -> Difference | None:
    """An op whose results are right, and the gradient of whose parameter is not."""
    expected = run_program(compile_program(trace, whole), state, batch, seed=seed).gradients
    found = run_program(compile_program(trace, split), state, batch, seed=seed).gradients
    floor = 1e-3 * max((float(g.norm()) for g in expected.values() if g is not None), default=0.0)
    placeholders = trace.parameters()
    for name, right in reversed(list(expected.items())):
        mine = found.get(name)
        if right is None and mine is None:
            continue
        like = right if right is not None else mine
        assert like is not None
        zero = torch.zeros_like(like)
        error = relative_error(zero if mine is None else mine, zero if right is None else right, floor)
        if error > tolerance and needs_grad(placeholders[name]):
            return _difference("backward", _reader(trace, placeholders[name]), plan, error)
    return None


def _difference(phase: str, node: fx.Node, plan: Plan, error: float) -> Difference:
    maker = resolve(node)[0]
    chosen = {axis: plan.strategy(axis, maker.name) for axis in plan.splits}
    return Difference(
        phase,
        maker.name,
        op_name(maker),
        module_path(maker),
        _place(maker),
        {axis: str(strategy) for axis, strategy in chosen.items() if strategy is not None},
        error,
    )


def _place(node: fx.Node) -> str:
    """file:line of the innermost frame of the model's own code."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if "File " in line]
    if not lines:
        return ""
    parts = lines[-1].split('"')
    number = lines[-1].partition("line ")[2].split(",")[0]
    return f"{parts[1].rsplit('/', 1)[-1]}:{number}" if len(parts) > 1 else ""
