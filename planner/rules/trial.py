"""Find out by running an op how it may be split. Runs in a process of its own (see `planner.rules.laboratory`).

The op is run whole on small random tensors, and then on shards of them, forward and backward. A way to split its
arguments is kept where, for every draw, for 2 and 4 shards and for two sets of sizes,

* concatenating, adding up or taking any one of the shards' results gives the whole result, and
* the gradients obey the states of `planner.placement`: of a shard it is the shard of the whole gradient, of a whole
  argument it is the whole one (``R``) or a summand of it (``D``), and of a summand it is the whole one.

Draws are there to refute: large and small numbers, ties, outliers, masks with a single entry, labels with sentinels. A
result that never changes between draws proves nothing, so a split is not kept for it unless the result is split too.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from shardplan.planner.placement import D, P, Placement, R, S
from shardplan.planner.rules.draws import DRAWS, SHARDS, group_sizes, scalings, shard_counts
from shardplan.planner.rules.question import Question, fill
from shardplan.planner.rules.strategy import Strategy

MOST_CANDIDATES = 3000
LEAST_DRAWS = 2

_TOLERANCE = {torch.float64: 1e-8, torch.complex128: 1e-8, torch.float32: 2e-4, torch.complex64: 2e-4}
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, AssertionError, AttributeError,
             KeyError, ZeroDivisionError, ArithmeticError)  # fmt: skip

Marker = Callable[[str], bool]
"""Told what is about to run ("draw 3", "split 17"); false: it brought an earlier process down, do not run it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """strategies: texts that `Strategy.parse` reads, without the replicated one; where those have a number of groups,
    these have the size of a group. reason: why the op could not be tried, empty where it was."""

    strategies: tuple[str, ...] = ()
    reason: str = ""


class _Refuted(Exception):
    """A candidate does not hold."""


@dataclass(slots=True)
class Whole:
    """The op on whole tensors: arguments, results, cotangents of the results and gradients of the arguments."""

    question: Question
    values: list[torch.Tensor]
    results: list[torch.Tensor]
    flows: list[bool]
    cotangents: list[torch.Tensor]
    gradients: list[torch.Tensor | None]


@dataclass(slots=True)
class Candidate:
    """A way to split the arguments, and what still may hold for the rest: the states that every draw so far allows, of
    results and of arguments that are not split. group: split dims consist of groups of so many entries, which stay
    together (the features of a head); 0: of single entries."""

    name: str
    placements: tuple[Placement | None, ...]
    results: list[tuple[Placement, ...]] = field(default_factory=list)
    arguments: list[tuple[Placement, ...]] = field(default_factory=list)
    scale: bool = False
    group: int = 0

    def narrow(self, results: list[tuple[Placement, ...]], arguments: list[tuple[Placement, ...]]) -> None:
        """Keep what one more run allows too. Raises _Refuted where nothing is left."""
        self.results = _both(self.results, results)
        self.arguments = _both(self.arguments, arguments)

    def strategy(self, varies: Sequence[bool]) -> Strategy | None:
        """varies: which results are not the same in all draws."""
        outputs = tuple(options[0] for options in self.results)
        if any(not out.is_shard and not changes for out, changes in zip(outputs, varies, strict=True)):
            return None
        inputs = tuple(options[0] for options in self.arguments)
        return Strategy(self.name, inputs, outputs, None, self.scale, self.group)


def _both(before: list[tuple[Placement, ...]], now: list[tuple[Placement, ...]]) -> list[tuple[Placement, ...]]:
    if not before:
        return now
    found = [tuple(p for p in old if p in new) for old, new in zip(before, now, strict=True)]
    if not all(found):
        raise _Refuted
    return found


# -- running -----------------------------------------------------------------------------------------------------------


def run(target: Any, question: Question, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensor results of the op. Raises whatever it raises."""
    result = fill(target, question, values)
    leaves = pytree.tree_leaves(result)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def gradients(
    results: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """One per leaf, None for a leaf that takes none."""
    live = [(r, c) for r, c in zip(results, cotangents, strict=True) if r.requires_grad]
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    if not live or not asked:
        return [torch.zeros_like(leaf) if leaf.requires_grad else None for leaf in leaves]
    found = iter(torch.autograd.grad([r for r, _ in live], asked, [c for _, c in live], allow_unused=True))
    given = [next(found) if leaf.requires_grad else None for leaf in leaves]
    return [
        torch.zeros_like(leaf) if leaf.requires_grad and g is None else g.to_dense() if g is not None else None
        for leaf, g in zip(leaves, given, strict=True)
    ]


def leaves_of(question: Question, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [v.detach().clone().requires_grad_(t.needs_grad) for v, t in zip(values, question.tensors, strict=True)]


def whole_run(target: Any, question: Question, values: list[torch.Tensor]) -> Whole | None:
    """The op whole; None where it is not a function of its arguments, or gives almost no numbers."""
    leaves = leaves_of(question, values)
    results = run(target, question, leaves)
    cotangents = [torch.randn_like(r) if r.requires_grad else torch.zeros_like(r) for r in results]
    found = gradients(results, leaves, cotangents)
    if not all(torch.equal(leaf.detach(), v) for leaf, v in zip(leaves, values, strict=True)):
        return None
    again = run(target, question, values)
    if len(again) != len(results) or not all(
        a.shape == r.shape and a.dtype == r.dtype and close(a, r.detach()) for a, r in zip(again, results, strict=True)
    ):
        return None
    results_ = [r.detach() for r in results]
    numbers = sum(r.numel() for r in results_)
    finite = sum(int(r.isfinite().sum()) for r in results_)
    if numbers and finite < 0.5 * numbers:
        return None
    return Whole(question, values, results_, [r.requires_grad for r in results], cotangents, found)


def close(mine: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal but for rounding; rounding grows with the largest number of the tensor."""
    if mine.shape != wanted.shape or mine.dtype != wanted.dtype:
        return False
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return torch.equal(mine, wanted)
    tolerance = _TOLERANCE.get(wanted.dtype, 2e-2)
    sizes = wanted.abs()
    sizes = sizes[sizes.isfinite()]
    largest = max(float(sizes.max()) if sizes.numel() else 0.0, 1e-3)
    return torch.allclose(mine, wanted, rtol=tolerance, atol=tolerance * largest, equal_nan=True)


# -- one candidate, one draw -------------------------------------------------------------------------------------------


def attempt(target: Any, whole: Whole, candidate: Candidate, shards: int, backward: bool) -> None:
    """Run the op on shards and narrow the candidate down. Raises _Refuted, or what the op raises."""
    question = whole.question
    if not _divide(whole, candidate, shards):
        raise _Refuted
    parts = [_parts(v, p, shards) for v, p in zip(whole.values, candidate.placements, strict=True)]
    leaves, results = [], []
    for rank in range(shards):
        mine = [part[rank] for part in parts]
        leaves.append(leaves_of(question, mine) if backward else mine)
        found = run(target, question, leaves[-1])
        if len(found) != len(whole.results):
            raise _Refuted
        results.append(found if not candidate.scale else [r * (1.0 / shards) for r in found])
    states = [
        _states_of_result([r[i].detach() for r in results], wanted, candidate) for i, wanted in enumerate(whole.results)
    ]
    arguments: list[tuple[Placement, ...]] = [(p or R,) for p in candidate.placements]
    states = _both(candidate.results, states)
    if backward:
        cotangents = [
            _parts(c, options[0] if options[0].is_shard else None, shards)
            for c, options in zip(whole.cotangents, states, strict=True)
        ]
        per_rank = []
        for rank in range(shards):
            if [r.requires_grad for r in results[rank]] != whole.flows:
                raise _Refuted
            per_rank.append(gradients(results[rank], leaves[rank], [c[rank] for c in cotangents]))
        arguments = [
            _states_of_gradient([g[i] for g in per_rank], wanted, p, shards)
            for i, (wanted, p) in enumerate(zip(whole.gradients, candidate.placements, strict=True))
        ]
    candidate.narrow(states, arguments)


def _divide(whole: Whole, candidate: Candidate, shards: int) -> bool:
    """Whether the split dims consist of so many equal parts, none of which cuts a group."""
    pairs = zip(whole.values, candidate.placements, strict=True)
    extents = [v.shape[p.dim] for v, p in pairs if p is not None and p.is_shard]
    if candidate.group:
        extents = [e if e % candidate.group else e // candidate.group for e in extents]
    return not any(extent % shards for extent in extents)


def _parts(value: torch.Tensor, placement: Placement | None, shards: int) -> list[torch.Tensor]:
    if placement is None:
        return [value] * shards
    if placement.is_shard:
        return [part.contiguous() for part in value.chunk(shards, placement.dim)]
    summands = [torch.randn_like(value) for _ in range(shards - 1)]
    return [value - sum(summands[1:], summands[0]), *summands]


def _states_of_result(parts: list[torch.Tensor], whole: torch.Tensor, candidate: Candidate) -> tuple[Placement, ...]:
    """Placements under which these are the parts of the whole."""
    shapes = {part.shape for part in parts}
    if len(shapes) != 1 or parts[0].dim() != whole.dim():
        raise _Refuted
    found: list[Placement] = []
    local = parts[0].shape
    differ = [d for d in range(whole.dim()) if local[d] != whole.shape[d]]
    summed = P in candidate.placements or candidate.scale
    if len(differ) == 1 and local[differ[0]] * len(parts) == whole.shape[differ[0]] and not summed:
        if close(torch.cat(parts, differ[0]), whole):
            found.append(S(differ[0]))
    elif not differ:
        if not summed and all(close(part, whole) for part in parts):
            found.append(R)
        if whole.dtype != torch.bool and close(sum(parts[1:], parts[0]), whole):
            found.append(P)
    if not found:
        raise _Refuted
    return tuple(found)


def _states_of_gradient(
    parts: list[torch.Tensor | None], whole: torch.Tensor | None, placement: Placement | None, shards: int
) -> tuple[Placement, ...]:
    """Placements of the argument under which these are the gradients of its parts."""
    if whole is None:
        return (R,) if placement is None else (placement,)
    mine = [part for part in parts if part is not None]
    if len(mine) != shards:
        raise _Refuted
    if placement is not None and placement.is_shard:
        slices = whole.chunk(shards, placement.dim)
        if all(close_to(part, wanted, whole) for part, wanted in zip(mine, slices, strict=True)):
            return (placement,)
    elif placement is not None:
        if all(close(part, whole) for part in mine):
            return (placement,)
    else:
        # A gradient that is zero satisfies both; a summand is the likelier state beside split arguments.
        found = (
            *([D] if close(sum(mine[1:], mine[0]), whole) else []),
            *([R] if all(map(close, mine, [whole] * shards)) else []),
        )
        if found:
            return found
    raise _Refuted


def close_to(mine: torch.Tensor, wanted: torch.Tensor, whole: torch.Tensor) -> bool:
    """`close`, with the rounding of the tensor that `wanted` is a part of."""
    return close(mine, wanted) or (
        mine.shape == wanted.shape
        and bool(((mine - wanted).abs() <= _TOLERANCE.get(whole.dtype, 2e-2) * whole.abs().max()).all())
    )


# -- the whole search --------------------------------------------------------------------------------------------------


def candidates(question: Question) -> Iterator[Candidate]:
    """Every way to split some arguments along one dim each; then the ways to pass summands on."""
    options = [[None, *(S(dim) for dim, extent in enumerate(t.shape) if extent > 1)] for t in question.tensors]

    def extents(placements: Sequence[Placement | None]) -> set[int]:
        return {t.shape[p.dim] for t, p in zip(question.tensors, placements, strict=True) if p is not None}

    count = math.prod(map(len, options))
    floats = [i for i, t in enumerate(question.tensors) if t.dtype.is_floating_point or t.dtype.is_complex]
    for placements in itertools.islice(itertools.product(*options), 50 * MOST_CANDIDATES):
        sizes = extents(placements)
        # A letter that two tensors share has one extent in both, or one is a multiple of the other (grouped heads).
        alike = len(sizes) == 1 or (count <= MOST_CANDIDATES and sizes and not max(sizes) % min(sizes))
        if alike:
            yield Candidate(_name(placements), placements)
            # What is added to a sum of summands (a bias) is a summand itself.
            if sum(p is not None for p in placements) > 1:
                for slot in floats:
                    if placements[slot] is None:
                        added = tuple(P if i == slot else p for i, p in enumerate(placements))
                        yield Candidate(_name(placements), added)
    for slots in dict.fromkeys([*((i,) for i in floats), tuple(floats)]):
        if slots:
            yield Candidate("p", tuple(P if i in slots else None for i in range(len(question.tensors))))


def _name(placements: Sequence[Placement | None]) -> str:
    """The first argument that is split, and its dim."""
    slot, placement = next((i, p) for i, p in enumerate(placements) if p is not None and p.is_shard)
    return f"x{slot}.{placement.dim}"


def search(target: Any, question: Question, mark: Marker, seconds: float) -> Answer:
    """Try the op. seconds: of the processor, after which only what is proven already is returned."""
    deadline = time.process_time() + seconds
    torch.manual_seed(0)
    trials, reason = [], ""
    groups = group_sizes(question)
    for variant in range(3 if groups else 2):
        found, why = _first_runnable(target, question, variant, mark)
        reason = reason or why
        if found:
            trials.append(found)
    if not trials or max(map(len, trials)) < LEAST_DRAWS:
        return Answer(reason=reason or "it gives no numbers on random tensors")
    kept: list[Strategy] = []
    varies = _varying(trials)
    small = max(trials, key=len)[0].question
    for index, candidate in enumerate(itertools.islice(candidates(small), MOST_CANDIDATES)):
        if time.process_time() > deadline:
            break
        if not mark(f"split {index}"):
            continue
        linear = P in candidate.placements
        for group, scale in [(0, False)] if linear else itertools.product((0, *groups), (False, True)):
            proven = _prove(target, trials, replace(candidate, scale=scale, group=group))
            strategy = proven.strategy(varies) if proven else None
            if strategy is not None:
                kept.append(strategy)
                break
    return Answer(tuple(map(str, _minimal(kept))))


def _first_runnable(target: Any, question: Question, variant: int, mark: Marker) -> tuple[list[Whole], str]:
    """The op whole, for all draws that it takes, at the first sizes at which it runs at all; or why it never does."""
    reason = ""
    for number, small in enumerate(scalings(question, variant)):
        found = []
        for draw in DRAWS:
            if not mark(f"draw {variant} {number} {draw.name}"):
                reason = reason or "it crashed"
                continue
            try:
                whole = whole_run(target, small, draw.values(small))
            except _FAILURES as error:
                reason = reason or _first_line(error)
                continue
            if whole is None:
                reason = reason or "it is not a function of its arguments, or gives no numbers on random ones"
            else:
                found.append(whole)
        if len(found) >= LEAST_DRAWS:
            return found, ""
    return [], reason


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]


def _varying(trials: list[list[Whole]]) -> list[bool]:
    """Which results are not the same in all draws."""
    first = max(trials, key=len)
    return [
        any(w.results[i].shape != r.shape or not torch.equal(w.results[i], r) for w in first[1:])
        for i, r in enumerate(first[0].results)
    ]


def _prove(target: Any, trials: list[list[Whole]], candidate: Candidate) -> Candidate | None:
    """The candidate after all draws, or None. The cheapest refutation comes first: forward only, in two shards."""
    flows = any(any(whole.flows) for trial in trials for whole in trial)
    ran = set()
    try:
        if not candidate.group:
            attempt(target, trials[0][0], candidate, SHARDS[0], False)
            candidate.arguments = []
        for number, trial in enumerate(trials):
            for whole in trial:
                counts = shard_counts(whole.question)
                # Two sets of sizes, each with its own numbers of shards, refute what four combinations would.
                if len(trials) > 1 and not candidate.group:
                    counts = counts[1:] if number else counts[:1]
                for shards in counts:
                    if _divide(whole, candidate, shards):
                        attempt(target, whole, candidate, shards, flows)
                        ran.add(shards)
                    elif shards in SHARDS and not candidate.group:
                        return None
    except (_Refuted, *_FAILURES):
        return None
    return candidate if ran.issuperset(SHARDS) else None


def _minimal(found: list[Strategy]) -> list[Strategy]:
    """Without those that split more arguments than another needs for the same results."""

    def needs_less(one: Strategy, other: Strategy) -> bool:
        if (one.outputs, one.scale, one.groups) != (other.outputs, other.scale, other.groups):
            return False
        return all(a == b or (a in (R, D) and b.is_shard) for a, b in zip(one.inputs, other.inputs, strict=True))

    return [mine for mine in found if not any(one is not mine and needs_less(one, mine) for one in found)]
