"""One way to meet every error of `shardplan.errors`, and the page docs/errors.md made of them.

    python -m tests.error_examples        # writes docs/errors.md

An example is a function named like its class in small letters; what it raises, and its own lines, are on the page.
"""

from __future__ import annotations

import inspect
import os
import random
import re
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

import shardplan as sp
from shardplan import errors

PAGE = Path(__file__).resolve().parent.parent / "docs" / "errors.md"


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))


def batch(size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, 8), torch.randint(4, (size,))


def plan(devices: object = "2xh100", *constraints: object, **settings: object) -> sp.Plan:
    return sp.plan(model(), devices, batch(), F.cross_entropy, constraints=constraints, **settings)  # type: ignore[arg-type]


# -- one for every class -----------------------------------------------------------------------------------------------


def usageerror() -> None:
    plan(time_limit=-1.0)


def nomatch() -> None:
    plan("2xh100", sp.pin("0.wieght", stage=0))


def clusterfileerror() -> None:
    Path("cluster.toml").write_text("schema = 1\n[device.gpu]\nmemory = 'plenty'\n")
    sp.Cluster.load("cluster.toml")


def targeterror() -> None:
    from shardplan.targets import load_target

    load_target("hf:lama-3-8b")


def inputmismatch() -> None:
    with sp.auto_parallel(model(), 1, batch(), F.cross_entropy) as pm:
        x, y = batch()
        pm.step(x.long(), target=y)


def batchnotdivisible() -> None:
    plan("2xh100", sp.degrees(dp=2), microbatches=3)


def notsupported() -> None:
    plan(precision="fp16")


def nottraceable() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            return y.sum() if y.sum().item() > 0 else y.mean()

    sp.plan(Branching(), "2xh100", (torch.randn(8, 8),))


def nofeasibleplan() -> None:
    plan(memory_limit="1 KiB")


def conflictingconstraints() -> None:
    plan("2xh100", sp.degrees(pp=2), sp.pin("0.weight", stage=5))


def solvertimeout() -> None:
    import pulp

    from shardplan.planner.search.solver import Budget, solve

    # A market split problem (Cornuejols and Dawande 1998): small, and out of reach of branch and bound.
    draw = random.Random(0)
    problem = pulp.LpProblem()
    x = [problem.add_variable(f"x{i}", cat=pulp.LpBinary) for i in range(40)]
    for _ in range(5):
        weights = [draw.randrange(100) for _ in x]
        problem += pulp.lpSum(w * v for w, v in zip(weights, x)) == sum(weights) // 2
    solve(problem, Budget("highs", 0.01, 0.5))


def solverunavailable() -> None:
    import pulp

    from shardplan.planner.search.solver import Budget, solve

    with mock.patch("importlib.util.find_spec", return_value=None):  # a machine without it
        solve(pulp.LpProblem(), Budget("highs", 0.01, 10.0))


def planmismatch() -> None:
    made = plan(["cpu"], cache=False)
    sp.auto_parallel(model(), 1, batch(4), F.cross_entropy, plan=made)


def planfileerror() -> None:
    Path("plan.json").write_text('{"schema": 1, "mod')
    sp.Plan.load("plan.json")


def checkpointerror() -> None:
    with sp.auto_parallel(model(), 1, batch(), F.cross_entropy) as pm:
        pm.load("no-such-checkpoint")


def worldsizemismatch() -> None:
    with environment(RANK="0", WORLD_SIZE="3", LOCAL_RANK="0"):
        sp.auto_parallel(model(), 4, batch(), F.cross_entropy)


def notrunnablehere() -> None:
    x, y = batch()
    sp.auto_parallel(model(), "2xh100", (x, y), F.cross_entropy).step(x, target=y)


def workerfailed() -> None:
    x, y = batch()
    with sp.auto_parallel(model(), 1, (x, y), F.cross_entropy, optimizer=Runaway) as pm:
        pm.train_step(x, target=y)


def workertimeout() -> None:
    x, y = batch()
    with sp.auto_parallel(model(), 1, (x, y), F.cross_entropy, optimizer=Sleeper, timeout_seconds=5.0) as pm:
        pm.train_step(x, target=y)


def deadlock() -> None:
    from shardplan.planner.deadlock import check
    from shardplan.planner.instructions import parse_schedule

    late = "0F0 0RECV_GRAD0<1 0B0 0SEND_ACT0>1 0REDUCE_GRADS 0OPTIMIZER_STEP"
    other = "1RECV_ACT0<0 1F0 1B0 1SEND_GRAD0>0 1REDUCE_GRADS 1OPTIMIZER_STEP"
    check(parse_schedule(f"{late}\n{other}"), {(0, 1)})


def overloaded() -> None:
    x, y = batch()
    with sp.auto_parallel(model(), 1, (x, y), F.cross_entropy) as pm, pm.engine(max_wait_ms=500, max_queue=1) as engine:
        for row in x:
            engine.submit(row, timeout_seconds=0)


def leafchanged() -> None:
    x, y = batch()
    with sp.auto_parallel(Moody(), 1, (x, y), F.cross_entropy, constraints=[sp.leaf("1")]) as pm:
        pm.step(x * 1e9, target=y)


@contextmanager
def environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _is_of_model(optimizer: torch.optim.Optimizer) -> bool:
    return optimizer.param_groups[0]["params"][0].shape == (32, 8)


class Runaway(torch.optim.SGD):
    def __init__(self, params) -> None:
        super().__init__(params, lr=0.1)

    def step(self, closure=None):
        if _is_of_model(self):  # planning tries the factory on parameters of its own
            raise RuntimeError("the learning rate ran away")


class Sleeper(Runaway):
    def step(self, closure=None):
        if _is_of_model(self):
            time.sleep(60)


class Cut(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.abs().max().item() < 1e3 else x[:1]


class Moody(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), Cut(), nn.Linear(8, 4))


# -- the page ----------------------------------------------------------------------------------------------------------

SPAWNING = frozenset({"InputMismatch", "CheckpointError", "WorkerFailed", "WorkerTimeout", "LeafChanged", "Overloaded"})
"""Examples that start a worker."""
_EXIT = {
    1: "1: a failure of the job, or our bug",
    2: "2: usage",
    3: "3: no plan fits",
    4: "4: time limit without a plan",
    5: "5: not traceable",
    6: "6: plan, checkpoint or world does not match",
    7: "7: a check failed",
}


def classes() -> list[type[errors.ShardplanError]]:
    """Every class that is raised, by code."""
    found = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.ShardplanError)]
    return sorted((c for c in found if c is not errors.ShardplanError), key=lambda c: c.code)


def example(kind: type[errors.ShardplanError]) -> Callable[[], None]:
    """The function that provokes it."""
    return globals()[kind.__name__.lower()]


def provoke(kind: type[errors.ShardplanError]) -> errors.ShardplanError:
    """Runs the example in an empty folder."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            with mock.patch("sys.argv", ["train.py"]):
                example(kind)()
        except errors.ShardplanError as error:
            return error
        finally:
            os.chdir(before)
    raise AssertionError(f"the example of {kind.__name__} raised nothing")


def lines_of(kind: type[errors.ShardplanError]) -> str:
    """The example's own lines."""
    body = inspect.getsource(example(kind)).split("\n", 1)[1]
    return textwrap.dedent(body).rstrip()


def message(error: errors.ShardplanError) -> str:
    """What is printed, without a traceback's frames and the places of this machine."""
    kept = []
    for line in str(error).splitlines():
        if re.match(r"\s+(File \"|\^|~|Traceback|in )", line) or len(kept) >= 14:
            continue
        kept.append(re.sub(r"(/[\w.@+-]+)+/", "", line))
    return "\n".join(kept)


def page(found: dict[str, errors.ShardplanError]) -> str:
    """Markdown of all classes."""
    parts = [
        "# Errors\n",
        "Every error that shardplan raises on purpose has a code, a title, lines with numbers, and hints. On the",
        "command line it is printed to stderr and ends with the exit status given here. This page is made by",
        "`python -m tests.error_examples`.",
        "The examples share `model()` (two linear layers), `batch()` (8 samples) and `plan(devices, *constraints)` of",
        "`tests/error_examples.py`.\n",
        "| code | error | exit status |",
        "|---|---|---|",
    ]
    for kind in classes():
        anchor = f"{kind.code}-{kind.__name__}".lower()
        parts.append(f"| {kind.code} | [{kind.__name__}](#{anchor}) | {_EXIT[kind.exit_status]} |")
    for kind in classes():
        parts.append(f"\n## {kind.code} {kind.__name__}\n")
        parts.append(" ".join(inspect.cleandoc(kind.__doc__ or "").split()) + "\n")
        parts.append(f"```python\n{lines_of(kind)}\n```\n\n```\n{message(found[kind.__name__])}\n```")
    return "\n".join(parts) + "\n"


def main() -> None:
    PAGE.write_text(page({kind.__name__: provoke(kind) for kind in classes()}))


if __name__ == "__main__":
    main()
