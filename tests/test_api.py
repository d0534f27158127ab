"""`auto_parallel` from a plain script, with the plan that the planner chose, against the model on one device."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import shardplan as sp
from shardplan import errors
from shardplan.batch import canonical, example_batch
from tests import targets
from tests.models import make


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def eager_loss(case, model) -> torch.Tensor:
    output = model(**case.kwargs)
    return case.loss_fn(output, case.target) if case.loss_fn else output.loss


@pytest.mark.parametrize("name", ["resnet", "bytegpt"])
def test_the_chosen_plan_computes_what_one_device_computes(name):
    case = make(name, 0)
    alone = copy.deepcopy(case.model)
    with sp.auto_parallel(case.model, ["cpu", "cpu"], case.batch, case.loss_fn, optimizer=adamw, time_limit=20.0) as pm:
        assert pm.plan.status.outcome in ("optimal", "feasible")
        loss = pm.step(**case.kwargs, target=case.target)
        expected = eager_loss(case, alone)
        expected.backward()
        assert relative(loss, expected.detach()) < 1e-5
        gradients = pm.full_gradients()
        for parameter_name, parameter in alone.named_parameters():
            if parameter.grad is not None:
                assert relative(gradients[parameter_name], parameter.grad) < 1e-5, parameter_name
        # The step has updated running statistics; start again from one state.
        pm.load_state_dict(alone.state_dict())
        optimizer = adamw(alone.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            expected = eager_loss(case, alone)
            expected.backward()
            optimizer.step()
            assert relative(pm.train_step(**case.kwargs, target=case.target), expected.detach()) < 1e-4
        found = pm.full_state_dict()
        assert found.keys() == alone.state_dict().keys()
        for state_name, value in alone.state_dict().items():
            if value.is_floating_point():
                assert relative(found[state_name], value) < 1e-4, state_name
        case.model.load_state_dict(found)


class Packed(nn.Module):
    """Nested output, an optional input, and a plain value."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, scale: float = 1.0, labels: torch.Tensor | None = None) -> dict:
        hidden = torch.relu(self.first(x)) * scale
        logits = self.second(hidden)
        loss = F.cross_entropy(logits, labels) if labels is not None else None
        return {"loss": loss, "logits": logits, "parts": [hidden, (x.shape[0], "text")]}


def same(found, expected) -> bool:
    a, b = pytree.tree_flatten(found), pytree.tree_flatten(expected)
    close = all(torch.allclose(x, y, atol=1e-6) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a[0], b[0]))
    return a[1] == b[1] and close


def test_calls_give_outputs_as_the_model_builds_them():
    torch.manual_seed(0)
    model, x, labels = Packed(), torch.randn(8, 8), torch.randint(4, (8,))
    with sp.auto_parallel(model, ["cpu"] * 2, {"x": x, "scale": 2.0, "labels": labels}) as pm:
        assert same(pm(x, 2.0, labels), model(x, 2.0, labels))
        assert same(pm(x, labels=labels, scale=2.0), model(x, 2.0, labels))
        assert same(pm(x, scale=2.0), model(x, 2.0))  # no labels, no loss
        assert pm.step(labels=labels, x=x, scale=2.0).item() == pytest.approx(model(x, 2.0, labels)["loss"].item())
        assert same(pm(x, 3.0), model(x, 3.0))  # another constant is another graph
        with pytest.raises(errors.InputMismatch, match="input labels is missing"):
            pm.step(x, 2.0)
        gradients = pm.full_gradients()
        twice = pm.step(x, 2.0, labels)
        assert torch.allclose(pm.full_gradients()["first.weight"], 2 * gradients["first.weight"])
        pm.zero_grad()
        assert pm.full_gradients() == {} and twice.ndim == 0


class Moody(nn.Module):
    """Differs between the modes by an op, by statistics and by a branch of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.second = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.dropout(torch.relu(self.norm(self.first(x))), 0.5, self.training)
        return self.second(hidden) * (1.0 if self.training else 2.0)


@pytest.mark.parametrize("degrees", [{"dp": 2}, {"tp": 2}, {"pp": 2}], ids=str)
def test_calls_that_were_not_planned(degrees, caplog):
    """A smaller last batch, one that does not divide, another length, evaluation: all equal one device."""
    case = make("llama", 0)
    alone = copy.deepcopy(case.model)
    with sp.auto_parallel(
        case.model, ["cpu"] * 2, case.batch, optimizer=adamw, constraints=[sp.degrees(**degrees)]
    ) as pm:
        optimizer = adamw(alone.parameters())
        for rows, length in ((8, 16), (6, 16), (3, 16), (8, 12), (3, 16), (8, 16)):
            ids, labels = (case.batch[name][:rows, :length] for name in ("input_ids", "labels"))
            optimizer.zero_grad()
            expected = alone(input_ids=ids, labels=labels).loss
            expected.backward()
            optimizer.step()
            assert relative(pm.train_step(input_ids=ids, labels=labels), expected.detach()) < 1e-4, (rows, length)
        told = [record.message for record in caplog.records if "is not the planned call" in record.message]
        assert len(told) == 3 and "int64[6,16]" in told[0] and "int64[8,12]" in told[2]
        assert ("every replica computes all of it" in told[1]) == ("dp" in degrees)
        with pytest.raises(errors.InputMismatch, match="different numbers of samples"):
            pm.step(input_ids=case.batch["input_ids"][:4], labels=case.batch["labels"])
        found = pm.eval()(input_ids=case.batch["input_ids"][:5])
        assert torch.allclose(found.logits, alone.eval()(input_ids=case.batch["input_ids"][:5]).logits, atol=1e-4)


def test_evaluation_is_another_graph():
    torch.manual_seed(0)
    model, x, y = Moody(), torch.randn(8, 8), torch.randint(4, (8,))
    with sp.auto_parallel(model, ["cpu"] * 2, (x, y), F.cross_entropy) as pm:
        for _ in range(2):
            pm.step(x, target=y)
        alone = Moody()
        alone.load_state_dict(pm.full_state_dict())
        assert alone.norm.num_batches_tracked == 2
        assert same(pm.eval()(x), alone.eval()(x))
        assert same(pm(x[:3]), alone(x[:3]))
        assert not same(pm.train()(x), alone(x))


def test_few_calls_are_kept(monkeypatch):
    monkeypatch.setattr("shardplan.calls.HELD", 2)
    model, (x, y), loss_fn = targets.mlp()
    with sp.auto_parallel(model, ["cpu"] * 2, (x, y), loss_fn) as pm:
        for rows in (8, 7, 6, 5, 7, 5):
            expected = loss_fn(model(x[:rows]), y[:rows]).item()
            assert pm.step(x[:rows], target=y[:rows]).item() == pytest.approx(expected, rel=1e-5)
        with pytest.raises(errors.InputMismatch, match="planned for float32"):
            pm.step(x.double(), target=y)


def test_planning_waits_for_the_first_call_where_there_is_no_example():
    model, (x, y), loss_fn = targets.mlp()
    pm = sp.auto_parallel(model, ["cpu"] * 2, loss_fn=loss_fn, optimizer=adamw)
    with pytest.raises(errors.UsageError, match="no plan yet"):
        _ = pm.plan
    with pm:
        assert pm.train_step(x, target=y).item() == pytest.approx(loss_fn(model(x), y).item(), rel=1e-5)
        assert pm.plan.batch_size == 8
    assert "Sequential" in str(pm.plan.model)


def test_training_state_loads_under_another_plan(tmp_path):
    model, (x, y), loss_fn = targets.mlp()
    losses = []
    for degrees, action in ((sp.degrees(tp=2), "save"), (sp.degrees(pp=2), "load")):
        with sp.auto_parallel(
            model, ["cpu"] * 2, (x, y), loss_fn, optimizer=adamw, constraints=[degrees], clip_norm=0.5
        ) as pm:
            if action == "save":
                pm.train_step(x, target=y)
                pm.save(tmp_path / "state")
            else:
                pm.load(tmp_path / "state")
            losses.append([pm.train_step(x, target=y).item() for _ in range(3)])
            measured = pm.measure(x, target=y, steps=2)
            assert measured.step_seconds > 0 and len(measured.stage_seconds) == len(pm.plan.stages)
            pm.plan.report(tmp_path / f"{action}.html", measured)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (tmp_path / "load.html").stat().st_size > 5000


def test_a_saved_plan_is_used_as_it_is(tmp_path):
    model, example, loss_fn = targets.mlp()
    plan = sp.plan(model, ["cpu"] * 2, example, loss_fn, constraints=[sp.degrees(dp=2)])
    plan.save(tmp_path / "plan.json")
    assert sp.Plan.load(tmp_path / "plan.json") == plan
    with sp.auto_parallel(model, ["cpu"] * 2, example, loss_fn, plan=tmp_path / "plan.json") as pm:
        assert pm.plan == plan


def test_a_meta_model_can_be_planned():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    example = (torch.empty(8, 8, device="meta"), torch.empty(8, dtype=torch.int64, device="meta"))
    assert sp.plan(model, "2xh100", example, F.cross_entropy).batch_size == 8


# -- batches -----------------------------------------------------------------------------------------------------------


def test_every_way_to_call_is_one_call():
    model = Packed()
    x, labels = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64)
    calls = [
        canonical(model, (x, 2.0, labels), {}, None),
        canonical(model, (x,), {"labels": labels, "scale": 2.0}, None),
        canonical(model, (), {"labels": labels, "scale": 2.0, "x": x}, None),
        example_batch(model, (x, 2.0, labels), False),
        example_batch(model, {"x": x, "scale": 2.0, "labels": labels}, False),
    ]
    for call in calls:
        assert call.args == () and list(call.kwargs) == ["x", "scale", "labels"]
    with pytest.raises(errors.InputMismatch, match="no_such"):
        canonical(model, (x,), {"no_such": 1}, None)


def test_the_example_names_the_target():
    model, (x, y), _ = targets.mlp()
    for example in ((x, y), [x, y], {"input": x, "target": y}):
        batch = example_batch(model, example, True)
        assert batch.kwargs == {"input": x} and batch.target is y
    with pytest.raises(errors.UsageError, match="no target"):
        example_batch(model, x, True)
