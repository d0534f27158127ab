"""Prices on record: what a search was told, as text, so that it can be repeated to the last digit on any machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import fx

from shardplan.planner.costs import profile, saves
from shardplan.planner.costs.base import Costs, OpCost, OpSaves, Overheads, coverage_of
from shardplan.planner.rules.localize import LocalCall

VERSION = 1


class RecordingCosts:
    """Passes every question on to `costs` and keeps the answers. Devices are kept as they are numbered."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self._answers: dict[str, Any] = {}

    def op(self, call: LocalCall, device: int) -> OpCost:
        """See `Costs.op`."""
        return OpCost(**self._keep(_op_key(call, device), lambda: asdict(self.costs.op(call, device))))

    def saves(self, node: fx.Node) -> OpSaves:
        """See `Costs.saves`."""
        return _saves_of(self._keep(_saves_key(node), lambda: asdict(self.costs.saves(node))))

    def collective(self, kind: str, nbytes: int, ranks: tuple[int, ...]) -> float:
        """See `Costs.collective`."""
        return self._keep(f"{kind}|{nbytes}|{list(ranks)}", lambda: self.costs.collective(kind, nbytes, ranks))

    def p2p(self, nbytes: int, source: int, target: int) -> float:
        """See `Costs.p2p`."""
        return self._keep(f"p2p|{nbytes}|{source}|{target}", lambda: self.costs.p2p(nbytes, source, target))

    def slowdown(self, kind: str, ranks: tuple[int, ...]) -> tuple[float, float]:
        """See `Costs.slowdown`. Records made before it was asked say that there is none."""
        first, others = self._keep(f"slowdown|{kind}|{list(ranks)}", lambda: list(self._slowdown(kind, ranks)))
        return first, others

    def _slowdown(self, kind: str, ranks: tuple[int, ...]) -> tuple[float, float]:
        return self.costs.slowdown(kind, ranks)

    def copy(self, nbytes: int, device: int) -> float:
        """See `Costs.copy`."""
        return self._keep(f"copy|{nbytes}|{device}", lambda: self.costs.copy(nbytes, device))

    def optimizer(self, nbytes: int, device: int) -> float:
        """See `Costs.optimizer`."""
        return self._keep(f"optimizer|{nbytes}|{device}", lambda: self.costs.optimizer(nbytes, device))

    def overheads(self, device: int) -> Overheads:
        """See `Costs.overheads`. Records made before there were any say that there are none."""
        return Overheads(**self._keep(f"overheads|{device}", lambda: asdict(self._overheads(device))))

    def _overheads(self, device: int) -> Overheads:
        return self.costs.overheads(device)

    def coverage(self) -> dict[str, float]:
        """See `CostModel.coverage`."""
        return coverage_of(OpCost(**answer) for key, answer in self._answers.items() if key.startswith("op|"))

    def text(self) -> str:
        """All answers so far, as JSON that `RecordedCosts.parse` reads."""
        return json.dumps({"version": VERSION, "prices": dict(sorted(self._answers.items()))}, indent=0) + "\n"

    def _keep(self, key: str, ask: Callable[[], Any]) -> Any:
        if key not in self._answers:
            self._answers[key] = ask()
        return self._answers[key]


class RecordedCosts(RecordingCosts):
    """Answers from a record; what it lacks is asked of `costs` and listed in `unknown`.

    Without `costs` a question that is not on record raises KeyError.
    """

    def __init__(self, prices: dict[str, Any], costs: Costs | None = None) -> None:
        self._answers = dict(prices)
        self.unknown: list[str] = []
        self._rest = costs

    @staticmethod
    def parse(text: str, costs: Costs | None = None) -> RecordedCosts:
        """Inverse of `RecordingCosts.text`. Raises ValueError where the text is no record."""
        form = json.loads(text)
        if not isinstance(form, dict) or form.get("version") != VERSION or not isinstance(form.get("prices"), dict):
            raise ValueError(f"not a record of prices of version {VERSION}")
        return RecordedCosts(form["prices"], costs)

    @property
    def costs(self) -> Costs:
        """What is asked where the record has no answer. Raises KeyError without one."""
        if self._rest is None:
            raise KeyError("this price is not on record")
        return self._rest

    def _overheads(self, device: int) -> Overheads:
        return Overheads()

    def _slowdown(self, kind: str, ranks: tuple[int, ...]) -> tuple[float, float]:
        return 0.0, 0.0

    def _keep(self, key: str, ask: Callable[[], Any]) -> Any:
        if key not in self._answers:
            try:
                self._answers[key] = ask()
            except KeyError as error:
                raise KeyError(f"{error.args[0]}: {key}") from None
            self.unknown.append(key)
        return self._answers[key]


def _op_key(call: LocalCall, device: int) -> str:
    results = [(str(value.dtype), list(value.shape), value.needs_grad) for value in call.outputs]
    return f"op|{device}|{profile.call_key(call)}|{results}"


def _saves_key(node: fx.Node) -> str:
    return f"saves|{saves.key_of(node)}"


def _saves_of(form: dict[str, Any]) -> OpSaves:
    return OpSaves(
        tuple(form["inputs"]),
        tuple(form["outputs"]),
        form["extra_nbytes_per_output_byte"],
    )
