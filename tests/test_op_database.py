"""A sample of PyTorch's operator database: no rule of it is wrong. All of it: ``make rules``."""

from __future__ import annotations

import random
import warnings

import pytest

from tests.op_database import Finding, as_op, call_has_rule, calls_of, entries, examine, splittable

EVERY = 7
"""One entry in so many is run here; the same ones in every run."""


def sampled() -> list[str]:
    names = sorted({entry.name for entry in entries()})
    random.Random(0).shuffle(names)
    return names[::EVERY]


@pytest.mark.parametrize("name", sampled())
def test_no_rule_is_wrong(name):
    finding = Finding()
    seen: dict[str, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for entry in entries([name]):
            for call in calls_of(entry, most=4):
                count = seen[str(call.target)] = seen.get(str(call.target), 0) + 1
                if not splittable(call) or count > (3 if call_has_rule(call) else 1):
                    continue
                op = as_op(call)
                if op is not None:
                    examine(op, finding, sizes=(2,))
    assert not finding.wrong
