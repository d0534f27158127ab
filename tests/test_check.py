"""`shardplan check`: right plans pass, a wrong one is refused with the op at fault."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import shardplan as sp
from shardplan import cli
from shardplan.checking import check
from shardplan.planner.placement import R, S
from shardplan.planner.plan import Plan
from shardplan.planner.rules import Strategy
from tests import targets
from tests.models import make

ROOT = Path(__file__).resolve().parent.parent
MLP = f"{ROOT / 'tests' / 'targets.py'}:mlp"


@pytest.fixture(scope="module")
def wrong_plan(tmp_path_factory) -> Path:
    """Tensor parallel, and the sum after the second layer is left out."""
    model, example, loss_fn = targets.mlp()
    plan = sp.plan(model, ["cpu"] * 2, example, loss_fn, constraints=[sp.degrees(tp=2)])
    last = [name for name, summary in plan.nodes.items() if summary.op == "aten.linear"][-1]
    weight = plan.nodes[last].inputs[1]
    strategy = Strategy("k", (S(1), S(1), R), (R,))
    splits = {**plan.splits["tp"], last: str(strategy), weight: str(Strategy("s1", (), (S(1),)))}
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    replace(plan, splits={**plan.splits, "tp": splits}).save(path)
    return path


def test_a_wrong_plan_fails_and_names_the_op(wrong_plan, capsys):
    assert cli.run(["check", MLP, "--devices", "cpu:2", "--plan", str(wrong_plan), "--json"]) == 7
    found = json.loads(capsys.readouterr().out)
    assert not found["equal"] and found["schema"] == 1
    assert (found["first"]["phase"], found["first"]["op"], found["first"]["module"]) == ("forward", "aten.linear", "2")
    assert {c["what"] for c in found["compared"] if c["error"] > c["tolerance"]} >= {"loss", "gradient"}
    assert cli.run(["check", MLP, "--devices", "cpu:2", "--plan", str(wrong_plan), "--quiet"]) == 7
    text = capsys.readouterr().out
    assert "First difference: forward of aten.linear in 2" in text and "differ" in text
    # The tolerance is the user's.
    assert cli.run(["check", MLP, "--devices", "cpu:2", "--plan", str(wrong_plan), "--tolerance", "100"]) == 0


def test_a_right_plan_passes(capsys):
    assert cli.run(["check", MLP, "--devices", "cpu:2", "--tp", "2", "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert found["equal"] and found["first"] is None and "tp2" in found["degrees"]
    assert [c["name"] for c in found["compared"] if c["what"] == "gradient"] == [
        "0.weight", "0.bias", "2.weight", "2.bias",
    ]  # fmt: skip


class Mixed(nn.Module):
    """Dropout, batch statistics, a frozen parameter and a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.second = nn.Linear(16, 4)
        self.second.bias.requires_grad_(False)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.drop(torch.relu(self.norm(self.first(x))))
        return {"hidden": hidden, "logits": self.second(hidden)}


def loss_of(output: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output["logits"], target)


@pytest.mark.parametrize("degrees", [{"dp": 2}, {"tp": 2}, {"pp": 2}], ids=str)
def test_models_that_draw_and_count(degrees):
    torch.manual_seed(1)
    model, x, y = Mixed(), torch.randn(8, 8), torch.randint(4, (8,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = check(model, ["cpu"] * 2, (x, y), loss_of, seed=5, constraints=[sp.degrees(**degrees)])
    assert found.equal, str(found)
    assert found.against == "the unsplit program"
    assert {item.what for item in found.compared} == {"loss", "gradient", "buffer", "output"}
    assert model.training and all(torch.equal(before[name], v) for name, v in model.state_dict().items())


def test_a_hugging_face_model():
    case = make("llama", 0)
    found = check(case.model, ["cpu"] * 2, case.batch, constraints=[sp.degrees(tp=2)])
    assert found.equal and found.against == "the model on one device", str(found)
    assert isinstance(found.plan, Plan) and "computes what one device computes" in str(found)
