"""Calls of ATen ops as PyTorch's own operator database makes them: material to prove rules and discovery on.

Every sample of the database is traced to ATen calls on real tensors; `examine` runs each of them split in every way
that its rule gives, and says which ops have no rule and which rule is wrong.

    python -m tests.op_database            all of it: a few minutes
    python -m tests.op_database softmax    entries of that name only
"""

from __future__ import annotations

import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from shardplan.errors import ShardplanError
from shardplan.planner.placement import Mesh
from shardplan.planner.rules import has_rule, strategies
from shardplan.planner.rules.families import rule_of
from shardplan.planner.rules.randomness import draws
from shardplan.planner.trace import infos
from tests.execution import Op, can_run, op_of, verify

EXTENTS = {"XS": 2, "S": 4, "M": 8, "L": 16}
"""Sizes that samples are made of, all of which divide; the database's own (3, 5, 10, 20) do not."""

STEEPEST = 1e4
"""Gradients above are those of a sample at a singular point, of which rounding is all that remains."""
MOST_TRIED = 3
"""Calls of an op without a written rule that are tried: each costs a fraction of a second."""


@dataclass(frozen=True, eq=False)
class Call:
    """One ATen call with real arguments."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def pattern(self) -> str:
        """What makes two calls alike: op, shapes, dtypes and constants."""

        def text(leaf: Any) -> str:
            return f"{leaf.dtype}{list(leaf.shape)}" if isinstance(leaf, torch.Tensor) else repr(leaf)

        return f"{self.target} {pytree.tree_map(text, (self.args, self.kwargs))}"


@dataclass(slots=True)
class Finding:
    """What came out for one op (overload). wrong: strategy -> message."""

    calls: int = 0
    without_rule: int = 0
    verified: int = 0
    split: int = 0
    wrong: dict[str, str] = field(default_factory=dict)
    failed: str = ""


def entries(names: Iterable[str] = ()) -> list[Any]:
    """Entries of the database, whose samples have extents that divide."""
    import torch.testing._internal.common_methods_invocations as database

    wanted = set(names)
    for name, module in list(sys.modules.items()):
        if name.startswith("torch.testing._internal.") and ("opinfo" in name or "common_methods" in name):
            for size, extent in EXTENTS.items():
                if isinstance(getattr(module, size, None), int):
                    setattr(module, size, extent)
    return [entry for entry in database.op_db if not wanted or entry.name in wanted]


class _Recorder(fx.Interpreter):
    """Runs a traced graph on real tensors and keeps the calls."""

    def __init__(self, module: fx.GraphModule, calls: list[Call]) -> None:
        super().__init__(module)
        self.calls = calls

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
            kept = pytree.tree_map(lambda a: a.detach().clone() if isinstance(a, torch.Tensor) else a, (args, kwargs))
            self.calls.append(Call(target, *kept))
        return super().call_function(target, args, kwargs)


def calls_of(entry: Any, most: int = 12) -> list[Call]:
    """The ATen calls of the first samples of an entry, in fp64 where it can be."""
    dtypes = entry.supported_dtypes("cpu")
    dtype = next((d for d in (torch.float64, torch.complex128, torch.int64, torch.bool) if d in dtypes), None)
    found: list[Call] = []
    if dtype is None:
        return found
    try:
        for count, sample in enumerate(entry.sample_inputs("cpu", dtype, requires_grad=False)):
            if count == most:
                break
            leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

            def function(*given: torch.Tensor, leaves: Any = leaves, spec: Any = spec) -> Any:
                rest = iter(given)
                filled = [next(rest) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
                first, args, kwargs = pytree.tree_unflatten(filled, spec)
                return entry.op(first, *args, **kwargs)

            try:
                module = make_fx(function, pre_dispatch=True)(*tensors)
                _Recorder(module, found).run(*tensors)
            except Exception:  # a sample that needs the database's own sizes, or that cannot be traced
                continue
    except Exception:  # the same, while samples are made
        return found
    return found


def call_has_rule(call: Call) -> bool:
    """Whether the op has a written rule."""
    node = fx.Graph().call_function(call.target)
    return rule_of(node) is not None


def splittable(call: Call) -> bool:
    """Whether the call is one that a trace can hold and that gives numbers to compare: no writes, nothing sparse or
    uninitialised, no rounding to half precision, no nested results."""
    schema = call.target._schema
    tensors = [a for a in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(a, torch.Tensor)]
    plain = all(t.layout == torch.strided and not t.is_quantized for t in tensors)
    rough = any(a in (torch.float16, torch.bfloat16) for a in pytree.tree_leaves((call.args, call.kwargs)))
    meaningless = "empty" in call.target._opname or call.target._opname in ("chalf", "histogramdd")
    if rough or meaningless or "sparse" in call.target._opname:
        return False
    return plain and bool(tensors) and not schema.is_mutable and bool(schema.returns)


def as_op(call: Call) -> Op | None:
    """The call as a one-op graph, with every gradient that there is; None where torch cannot run it so."""
    count = sum(isinstance(a, torch.Tensor) for a in pytree.tree_leaves((call.args, call.kwargs)))
    for grads in (None, tuple(k == 0 for k in range(count)), (False,) * count):
        try:
            op = op_of(call.target, *call.args, grads=grads, **call.kwargs)
            if all(g is None or g.abs().max() < STEEPEST for g in op.wanted if g is None or g.numel()):
                return op
        except (RuntimeError, NotImplementedError, AttributeError, TypeError, AssertionError, IndexError):
            continue
    return None


def examine(op: Op, finding: Finding, sizes: Iterable[int] = (2, 4)) -> None:
    """Run the op in every way that its rule gives."""
    finding.calls += 1
    if not infos(op.node) or draws(op.node):
        return
    finding.without_rule += not has_rule(op.node)
    split = False
    for strategy in strategies(op.node, inner=True):
        for size in sizes:
            chosen, mesh = {"tp": strategy}, Mesh(("tp",), (size,))
            if not can_run(op, chosen, mesh):
                continue
            try:
                verify(op, chosen, mesh)
            except (AssertionError, RuntimeError, IndexError, ValueError, TypeError, ShardplanError) as error:
                shapes = " ".join(str(list(v.shape)) for v in op.values)
                constants = [a for a in op.node.args if not isinstance(a, fx.Node)]
                key = f"{strategy} x{size} of {shapes} {constants} {dict(op.node.kwargs)}"
                finding.wrong[key] = str(error).strip().splitlines()[0][:200] if str(error) else repr(error)
            else:
                finding.verified += 1
                split |= strategy.is_split
    finding.split += split


def examined(names: Iterable[str] = (), most: int = 12) -> Iterator[tuple[str, Finding]]:
    """(op, what came out) for all distinct calls of the entries."""
    by_op: dict[str, dict[str, Call]] = {}
    for entry in entries(names):
        for call in calls_of(entry, most):
            if splittable(call):
                by_op.setdefault(str(call.target), {}).setdefault(call.pattern, call)
    for name, calls in sorted(by_op.items()):
        finding = Finding()
        few = list(calls.values())
        for call in few[: most if call_has_rule(few[0]) else MOST_TRIED]:
            torch.manual_seed(0)
            try:
                op = as_op(call)
                if op is not None:
                    examine(op, finding)
            except Exception:  # a rule that raises is a finding too
                finding.failed = traceback.format_exc(limit=-3)
        yield name, finding


def main(names: list[str]) -> int:
    """Print the work list. Returns the number of ops that have a wrong rule."""
    warnings.simplefilter("ignore")
    started, wrong, bare, verified = time.monotonic(), 0, [], 0
    for name, finding in examined(names):
        sys.stdout.flush()
        verified += finding.verified
        if finding.wrong or finding.failed:
            wrong += 1
            print(f"WRONG {name}: {len(finding.wrong)} of {finding.verified + len(finding.wrong)}")
            for key, message in list(finding.wrong.items())[:3]:
                print(f"    {key}\n        {message}")
            if finding.failed:
                print(f"    {finding.failed}")
        if finding.without_rule:
            bare.append(f"{name} ({finding.without_rule} of {finding.calls} calls)")
    print(f"\nwithout a rule ({len(bare)}):")
    for line in bare:
        print(f"    {line}")
    print(f"\n{verified} strategies verified, {wrong} ops wrong, {time.monotonic() - started:.0f} s")
    return wrong


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]) > 0)
