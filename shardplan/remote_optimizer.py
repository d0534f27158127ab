"""The optimizer of a job whose ranks are worker processes, as the process that drives them sees it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

_Options = dict[str, Any]


class RemoteOptimizer(torch.optim.Optimizer):
    """Parameter groups with the options that the ranks' optimizers have; tensors and their state are with the ranks.

    An option that is set here (by hand, or by a learning-rate scheduler) holds from the next optimizer step on. params
    of a group: parameters on the meta device, of which only shapes mean something, names: theirs. `step` and
    `zero_grad` are those of the model.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], step: Callable[[], None], zero_grad: Callable[[], None]
    ) -> None:
        """groups: {"parameters": shape by name, "options": ...} each."""
        self._step, self._zero_grad = step, zero_grad
        made = []
        for group in groups:
            shapes = group["parameters"].values()
            held = [nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False) for shape in shapes]
            made.append({**group["options"], "params": held, "names": list(group["parameters"])})
        super().__init__(made, {})
        self._sent = self._options()

    def take(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take up what the ranks have."""
        for mine, group in zip(self.param_groups, groups, strict=True):
            mine.update(group["options"])
        self._sent = self._options()

    def step(self, closure: Any = None) -> Any:
        """The model's `optimizer_step`."""
        assert closure is None
        self._step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The model's `zero_grad`."""
        self._zero_grad()

    def _options(self) -> list[_Options]:
        hidden = ("params", "names")
        return [{k: copy.deepcopy(v) for k, v in group.items() if k not in hidden} for group in self.param_groups]

    def changes(self) -> list[_Options]:
        """Options by group that were set since they were last asked for; [] for none."""
        now = self._options()
        pairs = zip(now, self._sent, strict=True)
        found = [{k: v for k, v in new.items() if k not in old or _differ(v, old[k])} for new, old in pairs]
        self._sent = now
        return found if any(found) else []

    def stepped(self) -> None:
        """The ranks have stepped: schedulers expect to hear of it."""
        self._opt_called = True


def _differ(one: Any, two: Any) -> bool:
    same = one == two
    return not bool(same.all() if isinstance(same, torch.Tensor) else same)
