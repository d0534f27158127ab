"""A random model as the source text of an ordinary module: what is run is what is printed when it fails."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

HEAD = """import torch
import torch.nn.functional as F
from torch import nn

D = torch.{dtype}
"""


@dataclass(slots=True)
class Program:
    """attributes: lines of ``__init__``; inputs: name -> expression that makes it; body: lines of ``forward``;
    returned: expression; loss: body of ``loss_fn(output, target)`` or None where the model returns its own loss;
    target: expression."""

    dtype: str
    attributes: list[str] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    body: list[str] = field(default_factory=list)
    returned: str = ""
    loss: str | None = None
    target: str = ""
    evaluating: bool = False

    def source(self) -> str:
        """A Python module with `Model`, `batch()` and, where the loss is not the model's own, `loss_fn`."""
        lines = [HEAD.format(dtype=self.dtype), "", "class Model(nn.Module):", "    def __init__(self):"]
        lines += [f"        {line}" for line in ("super().__init__()", *self.attributes)]
        lines += ["", f"    def forward(self, {', '.join(self.inputs)}):"]
        lines += [f"        {line}" for line in (*self.body, f"return {self.returned}")]
        lines += ["", "", "def batch():"]
        lines += [f"    {line}" for line in ("torch.manual_seed(1)", "found = {}")]
        lines += [f"    found[{name!r}] = {expression}" for name, expression in self.inputs.items()]
        lines += [f"    found['target'] = {self.target}"] if self.target else []
        lines += ["    return found"]
        if self.loss:
            lines += ["", "", "def loss_fn(output, target):", f"    return {self.loss}"]
        return "\n".join(lines) + "\n"

    def load(self) -> Loaded:
        return load(self.source(), self.evaluating)


@dataclass(slots=True)
class Loaded:
    """A model that was made, ready to run: the fields are those of `tests.models.Case`."""

    model: nn.Module
    batch: dict[str, Any]
    loss_fn: Callable[..., torch.Tensor] | None

    @property
    def kwargs(self) -> dict[str, Any]:
        return {name: value for name, value in self.batch.items() if name != "target"}

    @property
    def target(self) -> Any:
        return self.batch.get("target")


_COUNT = 0


def load(source: str, evaluating: bool = False) -> Loaded:
    """Run the source of a program. The numbers are the same every time."""
    global _COUNT
    _COUNT += 1
    name = f"<fuzz {_COUNT}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    space: dict[str, Any] = {}
    exec(compile(source, name, "exec"), space)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = space["Model"]().train(not evaluating)
        batch = space["batch"]()
    return Loaded(model, batch, space.get("loss_fn"))
