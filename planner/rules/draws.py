"""Small sizes and random values to try an op with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from shardplan.planner.rules.question import Question
from shardplan.planner.trace import TensorInfo

_BASES = (
    (2, 3, 5, 7, 11, 13, 17, 19, 23),
    (1, 2, 3, 5, 7, 11, 13, 17, 19),
    (4, 8, 12, 20, 28, 44, 52, 68, 76),
)
"""Sets of sizes, in units of `_UNIT`; two of primes, so that sizes are not related by accident; and one in which the
groups that a size consists of can be divided among shards."""
VARIANTS = len(_BASES)
_UNIT = 4
SHARDS = (2, 4)
_MOST_ELEMENTS = 1 << 17
_WIDEST_CONSTANT = 256


# -- sizes -------------------------------------------------------------------------------------------------------------


def scalings(question: Question, variant: int) -> Iterator[Question]:
    """The question at small sizes that four shards divide, likeliest to run first. variant: which set of sizes."""
    extents = sorted({e for t in question.tensors for e in t.shape if e > 1})
    constants = sorted({c for c in _integers((question.args, question.kwargs)) if c > 1})
    seen: list[Question] = []
    for mapping in (
        _related(extents, constants, _BASES[variant], sums=True, multiples=False),
        _related(extents, constants, _BASES[variant], sums=True, multiples=True),
        _related(extents, constants, _BASES[variant], sums=False, multiples=False),
        _divided(extents, _BASES[variant][0] * _UNIT),
        {e: e for e in extents},
    ):
        for follow in (True, False):
            small = _scaled(question, mapping, follow)
            if small not in seen and sum(math.prod(t.shape) for t in small.tensors) <= _MOST_ELEMENTS:
                seen.append(small)
                yield small


def shard_counts(question: Question) -> tuple[int, ...]:
    """Numbers of shards to try: two, four, and what a constant that divides a size is divided by, which shows whether
    the dim consists of groups that must stay together."""
    extents = [e for t in question.tensors for e in t.shape]
    primes = {
        next(p for p in range(2, c + 1) if c % p == 0)
        for c in _integers((question.args, question.kwargs))
        if 2 <= c <= _WIDEST_CONSTANT and any(e % c == 0 for e in extents)
    }
    return (*SHARDS, *sorted(primes - set(SHARDS)))


def group_sizes(question: Question) -> list[int]:
    """Constants that may be the size of groups which a dim consists of: those that are no sizes, but divide one."""
    extents = {e for t in question.tensors for e in t.shape}
    constants = set(_integers((question.args, [v for _, v in question.kwargs]))) - extents
    return sorted(c for c in constants if 2 <= c <= _WIDEST_CONSTANT and any(e % c == 0 and e > c for e in extents))


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _integers(item)


def _related(
    extents: list[int], constants: list[int], base: tuple[int, ...], sums: bool, multiples: bool
) -> dict[int, int]:
    """New sizes that keep products (and sums) of sizes, and divisibility by constants that are no sizes.

    multiples: a size that is so many times another as a constant says stays that. Otherwise shards of the new size are
    no multiples of the constant, if it can be helped, which refutes splits that cut its groups.
    """
    found: dict[int, int] = {}
    fresh = iter(base)
    factors = {c: c for c in constants if c not in extents}
    for extent in extents:
        image = None
        known = {**factors, **found} if multiples else found
        for a in found:
            if extent % a == 0 and extent // a in known and extent // a > 1:
                image = found[a] * known[extent // a]
                break
            if sums and extent - a in found:
                image = found[a] + found[extent - a]
        step = math.lcm(_UNIT, *(c for c in factors if c <= _WIDEST_CONSTANT and extent % c == 0))
        while image is None or image in found.values():
            image = next(fresh, len(found) + 23) * step
        found[extent] = image
    return found


def _divided(extents: list[int], first: int) -> dict[int, int]:
    """New sizes in the same order, each dividing the next."""
    return {extent: first << i for i, extent in enumerate(extents)}


def _scaled(question: Question, mapping: dict[int, int], follow: bool) -> Question:
    """follow: constants that equal a size become the new size."""

    def constant(value: Any) -> Any:
        if isinstance(value, list):
            return [constant(item) for item in value]
        return mapping.get(value, value) if isinstance(value, int) and not isinstance(value, bool) else value

    tensors = tuple(replace(t, shape=tuple(mapping.get(e, e) for e in t.shape)) for t in question.tensors)
    if not follow:
        return replace(question, tensors=tensors)
    return replace(
        question,
        args=tuple(constant(a) for a in question.args),
        kwargs=tuple((k, constant(v)) for k, v in question.kwargs),
        tensors=tensors,
    )


# -- values ------------------------------------------------------------------------------------------------------------

Floats = Callable[[tuple[int, ...]], torch.Tensor]
Integers = Callable[[tuple[int, ...], int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Draw:
    """One way to draw the arguments.

    floats: shape -> fp64. integers: (shape, bound) -> indices below the bound, mostly. density: share of true entries
    of a mask, 0 for a single one.
    """

    name: str
    floats: Floats
    integers: Integers
    density: float

    def values(self, question: Question) -> list[torch.Tensor]:
        """Fresh arguments, in the dtypes of the question."""
        bound = _bound(question)
        return [self.value(t, bound) for t in question.tensors]

    def value(self, tensor: TensorInfo, bound: int) -> torch.Tensor:
        shape, dtype = tensor.shape, tensor.dtype
        if dtype == torch.bool:
            if self.density:
                return torch.rand(shape) < self.density
            found = torch.zeros(shape, dtype=torch.bool)
            if found.numel():
                found.view(-1)[int(torch.randint(found.numel(), ()))] = True
            return found
        if dtype.is_complex:
            return torch.complex(self.floats(shape), self.floats(shape)).to(dtype)
        if dtype.is_floating_point:
            return self.floats(shape).to(dtype)
        return self.integers(shape, bound).to(dtype)


def _bound(question: Question) -> int:
    """Indices below it are valid whatever dim they index."""
    sizes = [e for t in question.tensors if t.dtype.is_floating_point or t.dtype.is_complex for e in t.shape if e > 1]
    return min(sizes, default=0) or min((c for c in _integers((question.args, question.kwargs)) if c > 1), default=4)


def _normal(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _uneven(shape: tuple[int, ...]) -> torch.Tensor:
    """Every place along every dim has a scale of its own."""
    found = _normal(shape)
    for dim, extent in enumerate(shape):
        scale = torch.logspace(-1, 1, extent, dtype=torch.float64)[torch.randperm(extent)]
        found = found * scale.view([-1 if d == dim else 1 for d in range(len(shape))])
    return found


def _outlier(shape: tuple[int, ...]) -> torch.Tensor:
    found = 1e-3 * _normal(shape)
    if found.numel():
        found.view(-1)[int(torch.randint(found.numel(), ()))] = 1e3
    return found


def _definite(shape: tuple[int, ...]) -> torch.Tensor:
    """Positive definite matrices, where the last two dims are those of one."""
    found = _normal(shape)
    if len(shape) > 1 and shape[-1] == shape[-2]:
        found = found @ found.mT + shape[-1] * torch.eye(shape[-1], dtype=torch.float64)
    return found


def _indices(shape: tuple[int, ...], bound: int) -> torch.Tensor:
    return torch.randint(0, max(bound, 1), shape)


def _sorted(shape: tuple[int, ...], bound: int) -> torch.Tensor:
    return _indices(shape, bound).sort(-1).values if shape else _indices(shape, bound)


def _offsets(shape: tuple[int, ...], bound: int) -> torch.Tensor:
    """Rising from zero, no two alike where there are enough."""
    return torch.arange(math.prod(shape)).view(shape) % max(bound, 1)


def _sentinel(value: int) -> Integers:
    def draw(shape: tuple[int, ...], bound: int) -> torch.Tensor:
        return torch.where(torch.rand(shape) < 0.3, value, _indices(shape, bound))

    return draw


DRAWS = (
    Draw("normal", _normal, _indices, 0.5),
    Draw("large", lambda shape: 1e4 * _normal(shape), _indices, 0.9),
    Draw("uneven", _uneven, _sorted, 0.1),
    Draw("positive", lambda shape: 0.5 + torch.rand(shape, dtype=torch.float64), _offsets, 0.0),
    Draw("unit", lambda shape: torch.rand(shape, dtype=torch.float64), _indices, 0.5),
    Draw("ties", lambda shape: torch.randint(-1, 2, shape).double(), _sentinel(0), 0.3),
    Draw("outlier", _outlier, _indices, 1.0),
    Draw("negative", lambda shape: -1e2 * torch.rand(shape, dtype=torch.float64), _indices, 0.5),
    Draw("faint", lambda shape: torch.rand(shape, dtype=torch.float64) ** 4, _sorted, 0.7),
    Draw("rising", lambda shape: torch.rand(shape, dtype=torch.float64).cumsum(-1 if shape else 0), _sorted, 0.5),
    Draw("definite", _definite, _indices, 0.5),
    Draw("definite large", lambda shape: 50 * _definite(shape), _offsets, 0.5),
    Draw("ignored", _normal, _sentinel(-100), 0.5),
    Draw("last", _normal, _sentinel(-1), 0.5),
    Draw("void", _normal, _sentinel(255), 0.5),
)
"""All of them refute; an op need not take them all."""
