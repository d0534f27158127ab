"""Calibration: evidence from measured jobs corrects the plans to come, in bounds, and can be taken back."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import profile_gpu
from shardplan.calibrating import keep_evidence
from shardplan.planner.cluster import Cluster
from shardplan.planner.constraints import degrees
from shardplan.planner.costs import calibration, profile, shipped
from shardplan.planner.costs.calibration import Evidence, corrections
from shardplan.planner.costs.company import Company
from shardplan.planner.costs.evidence import evidence_of
from shardplan.planner.costs.links import LinkModel
from shardplan.planner.costs.model import CostModel
from shardplan.planner.costs.store import Store
from shardplan.planner.plan import Plan
from shardplan.planner.report.measured import Measured
from shardplan.planner.search import SolveOptions, solve
from tests.test_costs import linear_call, trace_of

LINEAR = "aten.linear.default"
PLACE = profile.device_key(torch.device("cpu"))
TRACE = trace_of("bytegpt")


@pytest.fixture
def store(tmp_path):
    found = Store(tmp_path / "costs.sqlite")
    yield found
    found.close()


def planned(store: Store | None, ranks: int = 1, *given, **settings) -> Plan:
    cluster = Cluster.cpu(ranks)
    costs = CostModel(cluster, LinkModel(cluster), store, model=TRACE.fingerprint)
    return solve(TRACE, cluster, costs, SolveOptions(constraints=given, optimizer_factor=2.0, **settings))


def slower(plan: Plan, factor: float, memory: float = 1.0) -> Measured:
    """What a machine would measure on which all of a plan takes `factor` times as long, timing included."""
    phases, ops = [], []
    for stage in plan.stages:
        reduce = stage.once_seconds - stage.optimizer_seconds - plan.overheads["step"]
        phases.append(
            {
                "forward": factor * stage.forward_seconds,
                "backward": factor * stage.backward_seconds,
                "optimizer": factor * stage.optimizer_seconds,
                "reduce": factor * max(reduce, 0.0),
                "rest": factor * plan.overheads["step"],
            }
        )
        timed = {name: tuple(1.5 * factor * s for s in seconds) for name, seconds in stage.op_seconds.items()}
        timed["start"] = (1.5 * factor * plan.overheads["forward"], 1.5 * factor * plan.overheads["backward"], 0.0)
        timed["gradients"] = (0.0, 1.5 * factor * stage.adding_seconds, 0.0)
        ops.append(timed)
    step = factor * plan.step_seconds
    peaks = tuple(round(memory * m.peak_nbytes) for m in plan.memory())
    return Measured(step, (), peaks, phases=tuple(phases), computing=tuple(phases), ops=tuple(ops))


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.7])
def test_the_same_job_planned_again_predicts_what_was_measured(store, factor):
    first = planned(store, microbatches=2)
    seen = slower(first, factor, memory=1.1)
    keep_evidence(first, seen, [PLACE], store)
    again = planned(store, microbatches=2)
    assert again.calibrated_by == 1 and again.calibration[f"op {LINEAR} forward"] == pytest.approx(factor, rel=0.03)
    assert again.step_seconds == pytest.approx(seen.step_seconds, rel=0.03)
    assert again.memory()[0].peak_nbytes == pytest.approx(seen.peak_nbytes[0], rel=0.01)
    assert Plan.from_json(again.to_json()) == again
    # Calibrated again with the machine as it was: evidence is against the uncorrected model, so nothing moves.
    keep_evidence(again, slower(again, 1.0), [PLACE], store)
    assert planned(store, microbatches=2).step_seconds == pytest.approx(again.step_seconds, rel=0.03)


def test_corrections_can_be_taken_back(store):
    first = planned(store)
    keep_evidence(first, slower(first, 2.0), [PLACE], store)
    assert planned(store).step_seconds > 1.5 * first.step_seconds
    assert calibration.reset(store, PLACE) == 1 and calibration.reset(store, PLACE) == 0
    again = planned(store)
    assert (again.step_seconds, again.calibration) == (first.step_seconds, {})


def test_a_pipeline_is_closed_by_its_messages(store):
    first = planned(store, 2, degrees(pp=2, dp=1, tp=1), microbatches=4)
    seen = slower(first, 1.0)
    found = evidence_of(first, replace(seen, step_seconds=1.2 * first.step_seconds))
    assert found.message is not None and found.message > 1
    keep_evidence(first, replace(seen, step_seconds=1.2 * first.step_seconds), [PLACE] * 2, store)
    again = planned(store, 2, degrees(pp=2, dp=1, tp=1), microbatches=4)
    assert again.step_seconds == pytest.approx(1.2 * first.step_seconds, rel=0.03)


def test_kernels_that_replace_ops_stand_for_those_not_seen():
    plan = planned(None)
    seen = slower(plan, 1.0)
    ops = dict(seen.ops[0])
    loss = ops.pop("aten.cross_entropy_loss.default")
    ops["kernels.cross_entropy"] = tuple(3 * s for s in loss)
    found = evidence_of(plan, replace(seen, ops=(ops,)))
    assert found.ops["aten.cross_entropy_loss.default"][0] > 2 * found.ops[LINEAR][0]


def test_own_evidence_first_then_the_median_in_bounds():
    jobs = [Evidence(f"m{i}", "p", {LINEAR: (ratio, math.nan)}) for i, ratio in enumerate((1.0, 1.2, 80.0))]
    assert corrections(jobs).of(LINEAR) == (1.2, 1.0)
    assert corrections(jobs).of("aten.gelu.default") == (1.2, 1.0)
    assert corrections(jobs, "m2").of(LINEAR) == (4.0, 1.0)
    assert corrections(jobs, "m0").own and not corrections(jobs).own and corrections(jobs).jobs == 3
    late = corrections([Evidence("m", "p", {}, 9.0, -1.0, math.inf, 1e9, 1e9, memory=0.1)])
    assert (late.forward_seconds, late.backward_seconds, late.step_seconds) == (5e-3, 0.0, 0.0)
    assert (late.optimizer, late.reduce, late.memory) == (4.0, 4.0, 1.0)


def test_an_op_is_priced_by_its_class(store):
    plain = CostModel(Cluster.cpu(1), LinkModel(Cluster.cpu(1)), store).op(linear_call(64), 0)
    calibration.add(store, PLACE, Evidence("m", "p", {LINEAR: (2.0, 3.0)}))
    found = CostModel(Cluster.cpu(1), LinkModel(Cluster.cpu(1)), store).op(linear_call(64), 0)
    assert found.forward_seconds == pytest.approx(2 * plain.forward_seconds)
    assert found.backward_seconds == pytest.approx(3 * plain.backward_seconds)


@pytest.mark.parametrize(
    "text", ["nonsense", "{}", '[{"model": 1}]', '[{"model": "m", "plan": "p", "ops": {"a": 3}}]', "[null, 3]"]
)
def test_damaged_evidence_is_none(store, text):
    store.put_text(calibration.key_of(PLACE), text)
    assert calibration.load(store, PLACE) == []
    calibration.add(store, PLACE, Evidence("m", "p", {LINEAR: (2.0, 2.0)}))
    assert [job.model for job in calibration.load(store, PLACE)] == ["m"]


_ADD = """
import sys
from shardplan.planner.costs import calibration
from shardplan.planner.costs.calibration import Evidence
from shardplan.planner.costs.store import Store
for i in range(5):
    calibration.add(Store(sys.argv[1]), "here", Evidence(f"{sys.argv[2]} {i}", "p"))
"""


def test_processes_lose_no_evidence_of_each_other(tmp_path):
    path = str(tmp_path / "costs.sqlite")
    started = [subprocess.Popen([sys.executable, "-c", _ADD, path, str(n)]) for n in range(2)]
    assert [process.wait(60) for process in started] == [0, 0]
    store = Store(path)
    assert len(calibration.load(store, "here")) == 10
    store.close()


def test_a_job_measured_again_takes_its_own_place(store):
    for ratio in (2.0, 3.0):
        calibration.add(store, PLACE, Evidence("m", "p", {LINEAR: (ratio, ratio)}))
    assert [job.ops[LINEAR] for job in calibration.load(store, PLACE)] == [(3.0, 3.0)]


@pytest.mark.parametrize("text", ["", "[]", '{"forward": 7}', json.dumps({"forward": 0.2, "backward": -1.0})])
def test_what_others_cost_an_op_is_measured_anew_where_damaged(text):
    assert Company.parse(text) is None


def test_company_round_trip_and_bounds():
    found = profile.measure_device(torch.device("cpu"))
    assert Company.parse(found.to_json()) == found
    assert 0 <= found.forward <= 1 and 0 < found.pass_seconds < 1e-3


def test_a_shipped_profile_is_read_for_its_kind(tmp_path, monkeypatch):
    out = tmp_path / "profile_h100.toml"
    command = [
        sys.executable,
        "benchmarks/profile_gpu.py",
        "--device",
        "cpu",
        "--tiny",
        "--kind",
        "h100",
        "-o",
        str(out),
    ]
    subprocess.run(command, check=True, timeout=60, env={**os.environ, "PYTHONPATH": "."}, capture_output=True)
    made = shipped.samples("h100", tmp_path)
    assert len(made) > 15 and all(sample.forward_seconds > 0 for sample in made)
    assert shipped.samples("a100", tmp_path) == ()
    monkeypatch.setattr(shipped, "samples", lambda kind: made if kind == "h100" else ())
    call = next(call for call in profile_gpu.grid(tiny=True))
    for devices, source in (("2xh100", "measured"), ("2xa100", "modelled")):
        cluster = Cluster.parse(devices)
        assert CostModel(cluster, LinkModel(cluster), measure=False).op(call, 0).source == source
    wider = replace(call, inputs=(replace(call.inputs[0], shape=(32, 32)), call.inputs[1]))
    cluster = Cluster.parse("2xh100")
    assert CostModel(cluster, LinkModel(cluster), measure=False).op(wider, 0).source == "interpolated"


def test_a_device_finds_its_preset():
    assert profile_gpu.kind_of("NVIDIA H100 80GB HBM3").startswith("h100")
    with pytest.raises(SystemExit):
        profile_gpu.kind_of("unheard of")
