"""Checks of numbers are traced past, and only they: every other branch on data is refused at its statement."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shardplan.errors import NotTraceable
from shardplan.planner import data_checks
from shardplan.planner.export import trace_model
from tests import models
from tests.checks_of_data import (
    asserts,
    chooses,
    chooses_behind_a_check,
    chooses_by_the_same_question,
    fails_on_one_side,
    library_checks,
    never,
    raises,
    raises_behind_a_reading,
    raises_in_a_function,
    raises_later,
    sizes_of_checks,
)
from tests.test_trace import assert_same

pytestmark = pytest.mark.timeout(60)


class Checked(nn.Module):
    """Two linears around a function of (hidden, x)."""

    def __init__(self, between):
        super().__init__()
        self.between = [between]
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(self.between[0](self.a(x), x))


PASSED = (raises, asserts, raises_behind_a_reading, raises_in_a_function, library_checks, sizes_of_checks)


def case_of(between):
    torch.manual_seed(0)
    return models.Case(Checked(between), {"x": torch.randn(8, 8), "target": torch.randn(8, 8)}, F.mse_loss)


def traced(case):
    return trace_model(case.model, (), case.kwargs, loss_fn=case.loss_fn, target=case.target)


@pytest.mark.parametrize("between", PASSED, ids=lambda f: f.__name__)
def test_checks_are_passed_over(between):
    case = case_of(between)
    trace = traced(case)
    assert_same(case, trace)
    names = {str(node.target) for node in trace.nodes()}
    assert not any("item" in name or "assert" in name or "nonzero" in name for name in names)
    noted = [note for note in trace.notes if "a check of the numbers is passed over" in note]
    assert bool(noted) == (between is not sizes_of_checks)


@pytest.mark.parametrize(
    ("between", "statement"),
    [
        (chooses, "if (x > 0).any():"),
        (chooses_behind_a_check, "if (x > 0).any():"),
        (raises_later, "if (x > 0).any():"),
        (fails_on_one_side, "if (x > 1e6).any():"),
        (chooses_by_the_same_question, "return bool((x < -1e6).any())"),
    ],
)
def test_branches_are_refused_where_they_are(between, statement):
    with pytest.raises(NotTraceable) as caught:
        traced(case_of(between))
    assert statement in caught.value.details[0]


def test_a_model_that_always_raises_says_so():
    with pytest.raises(NotTraceable) as caught:
        traced(case_of(never))
    assert "ValueError" in " ".join(caught.value.details)


def test_checks_at_one_statement_are_proven_once(monkeypatch):
    tried = []
    trial = data_checks._trial
    monkeypatch.setattr(
        data_checks, "_trial", lambda attempt, answers: tried.append(answers) or trial(attempt, answers)
    )
    traced(case_of(raises_in_a_function))
    assert len(tried) == 1
