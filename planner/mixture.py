"""The op ``shardplan::mixture``: rows that are sorted by expert, run through their experts, and put back in order.

Of ids [n] (the expert of every pair of a token and one of its choices), rows [n / fan, ...] and held tensors (weights
with one matrix an expert), with F the steps between sorting and putting back:

    order = argsort(ids),  ends[e] = number of ids <= e
    y[order] = F(rows[order // fan], ids[order], ends, held),      y [n, ...]

F consists of products of groups of rows (``aten._grouped_mm`` and ops like it, see `is_product`) and of ops that treat
every row by itself, so y[i] depends on row i alone: the op may be split along its rows although sorting mixes them, and
each expert may run where its weights are. `planner.passes.mixtures` finds such parts of a graph,
`planner.rules.mixtures` says how they split.

The steps are text, so the op is plain data: a JSON list of [op, args, kwargs] where {"r": i}, {"h": i}, {"s": i} stand
for rows, held tensors and earlier steps, {"i": 0} for the sorted ids, {"o": 0} for the ends, {"d": name} for a dtype.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_LIBRARY = torch.library.Library("shardplan", "FRAGMENT")
_ARGUMENTS = "(str steps, int experts, int[] fans, Tensor ids, Tensor[] rows, Tensor[] held) -> Tensor"
_LIBRARY.define(f"mixture{_ARGUMENTS}")
_LIBRARY.define(f"sent_mixture{_ARGUMENTS}")


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands in a step for rows ("r"), a held tensor ("h"), a step ("s"), the sorted ids ("i") or the ends ("o")."""

    kind: str
    index: int


@dataclass(frozen=True, slots=True)
class Step:
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def refs(self) -> list[Ref]:
        """In the order in which they stand."""
        found: list[Ref] = []
        substituted((self.args, self.kwargs), lambda ref: found.append(ref))
        return found


def steps_text(steps: Sequence[Step]) -> str:
    """Inverse of `parse_steps`."""
    return json.dumps([[_name(s.target), _written(s.args), _written(s.kwargs)] for s in steps], separators=(",", ":"))


@lru_cache(maxsize=1024)
def parse_steps(text: str) -> tuple[Step, ...]:
    return tuple(Step(_target(op), tuple(_read(args)), _read(kwargs)) for op, args, kwargs in json.loads(text))


def _name(target: Any) -> str:
    return "getitem" if target is operator.getitem else str(target)


def _target(name: str) -> Any:
    if name == "getitem":
        return operator.getitem
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _written(value: Any) -> Any:
    if isinstance(value, Ref):
        return {value.kind: value.index}
    if isinstance(value, torch.dtype):
        return {"d": str(value).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        return [_written(item) for item in value]
    if isinstance(value, dict):
        return {"k": {key: _written(item) for key, item in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} is not plain data")


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return [_read(item) for item in value]
    if isinstance(value, dict):
        ((kind, inner),) = value.items()
        if kind == "k":
            return {key: _read(item) for key, item in inner.items()}
        return getattr(torch, inner) if kind == "d" else Ref(kind, inner)
    return value


def substituted(value: Any, by: Callable[[Ref], Any]) -> Any:
    """The value with something else for every `Ref` in it."""
    if isinstance(value, Ref):
        return by(value)
    if isinstance(value, (list, tuple)):
        return type(value)(substituted(item, by) for item in value)
    if isinstance(value, dict):
        return {key: substituted(item, by) for key, item in value.items()}
    return value


# -- running -----------------------------------------------------------------------------------------------------------


def run_steps(
    steps: str,
    rows: Sequence[torch.Tensor],
    ids: torch.Tensor,
    ends: torch.Tensor,
    held: Sequence[torch.Tensor],
    seen: Callable[[Step, Any], None] | None = None,
) -> torch.Tensor:
    """F of rows that are sorted by their ids. seen: gets every step and what it gave."""
    made: list[Any] = []
    given = {"r": rows, "h": held, "s": made, "i": [ids], "o": [ends]}
    for step in parse_steps(steps):
        args, kwargs = substituted((step.args, step.kwargs), lambda ref: given[ref.kind][ref.index])
        made.append(step.target(*args, **kwargs))
        if seen is not None:
            seen(step, made[-1])
    return made[-1]


def run(
    steps: str,
    experts: int,
    fans: Sequence[int],
    ids: torch.Tensor,
    rows: Sequence[torch.Tensor],
    held: Sequence[torch.Tensor],
    places: torch.Tensor | None = None,
    count: int = 0,
) -> torch.Tensor:
    """places: where the ids stand among `count` pairs, if they are some of them; the others' results are zeros."""
    ordered, order = torch.sort(ids, stable=True)
    ends = torch.searchsorted(ordered, torch.arange(experts, device=ids.device), right=True, out_int32=True)
    at = order if places is None else places[order]
    taken = [tensor[at // fan if fan > 1 else at] for tensor, fan in zip(rows, fans, strict=True)]
    found = run_steps(steps, taken, ordered, ends, held)
    if places is None:
        return found[inverse(order)]
    return found.new_zeros((count, *found.shape[1:])).index_copy(0, at, found)


def inverse(order: torch.Tensor) -> torch.Tensor:
    """Of a permutation [n]: where each place went."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))


def run_own(
    steps: str,
    first: int,
    experts: int,
    fans: Sequence[int],
    ids: torch.Tensor,
    rows: Sequence[torch.Tensor],
    held: Sequence[torch.Tensor],
) -> torch.Tensor:
    """The same of the experts first, ..., first + experts - 1, whose parts of the held tensors these are; zeros for
    pairs of others. The ranks' results add up to those of `run`."""
    places = ((ids >= first) & (ids < first + experts)).nonzero().squeeze(1)
    return run(steps, experts, fans, ids[places] - first, rows, held, places, ids.shape[0])


_LIBRARY.impl("mixture", run, "CompositeImplicitAutograd")
MIXTURE = torch.ops.shardplan.mixture.default
SENT_MIXTURE = torch.ops.shardplan.sent_mixture.default
"""What a rank's call is named, for prices, where it sends pairs to the ranks of their experts; never run."""


def is_mixture(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is MIXTURE


@lru_cache(maxsize=1024)
def is_product(target: Any) -> bool:
    """Whether the op multiplies groups of rows, which end at its argument "offs", by a matrix each: PyTorch's, or one
    of a library that serves where PyTorch's cannot."""
    schema = getattr(target, "_schema", None)
    return (
        schema is not None
        and "grouped_mm" in schema.name
        and [a.name for a in schema.arguments][2:3] == ["offs"]
        and len(schema.returns) == 1
    )


def by_expert(steps: str) -> frozenset[int]:
    """Held tensors of which dim 0 counts the experts."""
    found: set[int] = set()
    for step in parse_steps(steps):
        if is_product(step.target) and step.args[1].kind == "h":
            found.add(step.args[1].index)
        elif step.target is aten.index.Tensor and step.args[0].kind == "h":
            found.add(step.args[0].index)
    return frozenset(found)


def own_experts(steps: str, experts: int, held: Sequence[tuple[int, ...]]) -> int:
    """Experts of a rank. held: shapes of its parts of the held tensors."""
    return min((held[i][0] for i in by_expert(steps)), default=experts)
