"""Every decision of a plan names the next best: checked against plans searched with the other decision forced."""

from __future__ import annotations

import dataclasses

import pytest

from shardplan.planner.cluster import Cluster
from shardplan.planner.constraints import degrees
from shardplan.planner.plan import Decision, Plan
from shardplan.planner.report.why import reasons, sentence
from tests import test_mixed
from tests.report_plans import GIB, pipeline_plan
from tests.test_search import planned

AXES = {"pipeline stages": "pp", "replicas": "dp", "tensor parallelism": "tp"}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned(Cluster.parse("4xh100"), gap=0.1)


def by_topic(plan: Plan) -> dict[str, Decision]:
    return {decision.topic: decision for decision in plan.decisions}


def test_no_plan_with_the_other_decision_beats_what_is_said(plan):
    """What is proven is a bound, and what was found is a plan."""
    found = by_topic(plan)
    assert {*AXES, "microbatches", "devices in use", "recomputation", "storage"} <= set(found)
    for topic, axis in AXES.items():
        decision = found[topic]
        assert decision.seconds is not None and decision.other != decision.chosen
        forced = planned(Cluster.parse("4xh100"), degrees(**{axis: int(decision.other)}), gap=0.1)
        assert forced.step_seconds >= decision.seconds * (1 - 1e-9), topic


def test_other_storage_is_what_a_search_with_that_storage_finds(plan):
    """The same mesh, the parameters stored as the decision says: the whole search gives the same step."""
    mesh = plan.stages[0].mesh
    wanted = degrees(pp=1, dp=mesh.size("dp"), tp=mesh.size("tp"))
    (decision,) = (d for d in plan.decisions if d.topic == "storage" and d.other == "whole on every replica")
    forced = planned(
        Cluster.parse("4xh100"), wanted, gap=0.001, zero=0, microbatches=plan.microbatches, rematerialize=False
    )
    assert decision.seconds == pytest.approx(forced.step_seconds, rel=0.02)
    assert decision.nbytes == pytest.approx(forced.stages[0].memory.peak_nbytes, rel=0.1)


def test_splits_of_large_tensors_have_a_next_best():
    plan = planned(Cluster.parse("2xh100"), degrees(tp=2), gap=0.1)
    splits = [d for d in plan.decisions if d.topic.startswith("split of ")]
    assert splits and all(d.chosen != d.other and d.seconds is not None for d in splits)
    # Everything else of the segment was free to change: nothing is gained beyond the gap.
    assert min(d.seconds or 0.0 for d in splits) >= plan.step_seconds * 0.9
    assert "  why: split of " in plan.explain(splits[0].name)


def test_unequal_devices_say_why_these():
    plan = test_mixed.planned(test_mixed.cluster_of((test_mixed.FAST, 2), (test_mixed.SLOW, 2)), gap=0.1)
    assert "recomputation" in by_topic(plan)
    assert all(sentence(plan, d).endswith(".") for d in plan.decisions)


def test_sentences():
    plan = dataclasses.replace(pipeline_plan(), decisions=())
    step = plan.step_seconds

    def said(**given: object) -> str:
        made = {"topic": "replicas", "chosen": "2", "other": "4", "seconds": 1.25 * step} | given
        return sentence(plan, Decision(**made))  # type: ignore[arg-type]

    assert said(proven=True).startswith("replicas: 2, not 4: no plan with 4 takes less than ")
    assert said(proven=True, seconds=0.5 * step).startswith(
        "replicas: 2, not 4: the best with 4 was not sought further; it takes at least "
    )
    assert said(name="pp1 dp4", why="25% slower: 9 ms more computing").endswith(
        "a step, +25 % (pp1 dp4), 9 ms more computing."
    )
    assert said(seconds=None, why="does not fit into memory") == "replicas: 2, not 4: does not fit into memory."
    assert ", but needs 30.0 GiB on stage 1, 10.0 GiB more than there is." in said(
        nbytes=30 * GIB, stage=1, limit_nbytes=20 * GIB
    )
    assert ", and needs 10.0 GiB instead of 15.5 GiB on stage 0." in said(nbytes=10 * GIB, limit_nbytes=20 * GIB)
    assert said(seconds=step).endswith(", as long.")


def test_the_schedule_is_compared_by_simulation():
    (reason,) = [r for r in reasons(pipeline_plan(4, 1, 8)) if r.startswith("schedule: ")]
    assert reason.startswith("schedule: 1f1b, not gpipe: that takes ") and "needs" in reason
