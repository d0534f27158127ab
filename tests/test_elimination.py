"""Elimination against brute force: every weighting, every pair of layouts at the ends, values that many ops read."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest

from shardplan.planner.search import elimination
from shardplan.planner.search.elimination import eliminate
from shardplan.planner.search.problem import Option, Price, SegmentProblem, Weights, total_price
from tests.test_search import random_segment


def with_ends(rng: random.Random, problem: SegmentProblem) -> SegmentProblem:
    enter = rng.choice([-1, rng.randrange(len(problem.ops))])
    leave = ((rng.randrange(len(problem.ops)), 0), tuple(rng.sample(range(3), rng.randint(1, 2))))
    return replace(problem, enter=enter, leave=rng.choice([None, leave]))


def check(problem: SegmentProblem, weights: list[Weights]) -> tuple[int, int]:
    """-> (pairs of layouts, impossible ones) that agree with all choices tried."""
    found = eliminate(problem, weights)
    assert found is not None
    seen = impossible = 0
    for weighting, matrix in zip(weights, found, strict=True):
        for enters, leaves in itertools.product(*map(range, problem.ends)):
            fixed, _ = problem.between(enters, leaves)
            choices = itertools.product(*(range(len(options)) for options in fixed.ops))
            prices = [price for c in choices if (price := total_price(fixed, c)) is not None]
            best = min(map(weighting.of, prices), default=math.inf)
            seen += 1
            if best == math.inf:
                impossible += 1
                assert matrix.objective[enters, leaves] == math.inf and (enters, leaves) not in matrix.options
                continue
            assert matrix.objective[enters, leaves] == pytest.approx(best, rel=1e-9)
            price = total_price(problem, matrix.options[enters, leaves])
            assert price is not None and weighting.of(price) == pytest.approx(best, rel=1e-9)
    return seen, impossible


@pytest.mark.parametrize("wide", [elimination._WIDE, 4])
def test_against_brute_force(wide, monkeypatch):
    """With readers joined two by two where tables are `wide` as well."""
    monkeypatch.setattr(elimination, "_WIDE", wide)
    rng = random.Random(wide)
    seen = impossible = 0
    for _ in range(150):
        weights = [
            Weights(
                *(rng.random(), rng.random() * rng.randint(0, 1), rng.randint(1, 3), rng.choice([1.0, 2.0])),
                rng.random(),
            )
            for _ in range(2)
        ]
        a, b = check(with_ends(rng, random_segment(rng)), weights)
        seen, impossible = seen + a, impossible + b
    assert 0 < impossible < seen


def fan_out(readers: int) -> SegmentProblem:
    """One value that many ops read, each in one of three states."""
    rng = random.Random(readers)
    maker = tuple(Option(Price(rng.random()), (s,), ()) for s in range(2))
    ops = [tuple(Option(Price(rng.random()), (0,), (((0, 0), s),)) for s in range(3)) for _ in range(readers)]
    conversions = {((0, 0), s, t): Price(rng.random()) for s in range(3) for t in range(3) if s != t}
    return SegmentProblem(("x",) * (readers + 1), (maker, *ops), conversions, ("R", "S(0)", "S(1)"))


def test_a_value_with_many_readers_is_converted_once():
    assert check(fan_out(6), [Weights()]) == (1, 0)
    wide = fan_out(40)  # 3**40 choices: the sum over readers has to be split up
    matrix = (eliminate(wide, [Weights()]) or [])[0]
    price = total_price(wide, matrix.options[0, 0])
    assert price is not None and price.forward_seconds == pytest.approx(matrix.objective[0, 0])


def test_tables_that_grow_too_large_are_refused(monkeypatch):
    monkeypatch.setattr(elimination, "_LARGEST", 4)
    assert eliminate(fan_out(6), [Weights()]) is None
