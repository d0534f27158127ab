"""Plans made by hand for the report's tests."""

from __future__ import annotations

import dataclasses

from shardplan.planner import schedules
from shardplan.planner.placement import Mesh
from shardplan.planner.plan import Alternative, DeviceSummary, Memory, NodeSummary, Plan, StageLink, StagePlan, Status
from shardplan.planner.report import Measured
from shardplan.planner.report.facts import simulate_plan
from shardplan.planner.timeline import Event, Timeline

GIB = 1 << 30


def pipeline_plan(stages: int = 2, tp: int = 2, microbatches: int = 4, layers: int = 4, schedule: str = "1f1b") -> Plan:
    """A decoder of `layers` layers on stages x tp devices; times in round milliseconds."""
    per_stage = layers // stages
    planned = []
    for stage in range(stages):
        blocks = [f"model.layers.{i}.mlp" for i in range(stage * per_stage, (stage + 1) * per_stage)]
        first = stage * per_stage
        memory = Memory(3 * GIB, 3 * GIB, 6 * GIB, (stages - stage) * GIB, GIB // 2, GIB, 20 * GIB)
        planned.append(
            StagePlan(
                first,
                first + per_stage,
                tuple((["embed"] if stage == 0 else []) + blocks + (["head+loss"] if stage == stages - 1 else [])),
                tuple(range(stage * tp, (stage + 1) * tp)),
                Mesh(("dp", "tp"), (1, tp)),
                0.010,
                0.020,
                0.005,
                memory,
                (blocks[0],) if stage == 0 else (),
            )
        )
    edges = {(s, s + 1) for s in range(stages - 1)}
    links = tuple(StageLink(s, t, 1 << 20, 0.001, 1 << 20, 0.001) for s, t in sorted(edges))
    nodes, splits = _graph(layers, per_stage)
    plan = Plan(
        model="Decoder",
        fingerprint="f00d",
        batch_size=8,
        inputs={"ids": "int64[8,128]"},
        devices=tuple(DeviceSummary("a10g", 0, 20 * GIB) for _ in range(stages * tp)),
        stages=tuple(planned),
        microbatches=microbatches,
        schedule=schedule,
        instructions=schedules.build(schedule, stages, microbatches, edges),
        splits=splits,
        step_seconds=0.0,
        status=Status("optimal", 0.16, 0.01, "highs", 1.5, ("time of stage 1",), {"solved": 12, "pruned": 30}),
        baselines=(
            Alternative("ddp", None, 26 * GIB, "does not fit: 26 GiB of 20 GiB"),
            Alternative("tensor parallel", 0.31, 14 * GIB, "all-reduces take 61 % of the step"),
        ),
        runners_up=(Alternative("pp4 x tp1", 0.2, 15 * GIB, "bubble 43 %"),),
        coverage={"measured": 0.9, "modelled": 0.1},
        replicated_ops=(("custom.router", 2, 0.03, "it is not registered"),),
        discovered_ops=(("custom.norm", 4, "S(0) D -> S(0)"),),
        constraints=('pin("*.layers.0.*", stage=0)',),
        notes=("dropout is drawn per shard",),
        trace_seconds=1.0,
        profile_seconds=2.0,
        links=links,
        nodes=nodes,
    )
    return _with_step(plan)


def _with_step(plan: Plan) -> Plan:
    return dataclasses.replace(plan, step_seconds=simulate_plan(plan).step_seconds)


def _graph(layers: int, per_stage: int) -> tuple[dict[str, NodeSummary], dict[str, dict[str, str]]]:
    nodes: dict[str, NodeSummary] = {}
    splits: dict[str, dict[str, str]] = {"tp": {}, "mb": {}}

    def add(node: str, tp: str, mb: str, op: str, name: str, stage: int, inputs: tuple[str, ...], out: str) -> None:
        nodes[node] = NodeSummary(len(nodes), op, name, (stage,), inputs, (out,), op not in ("input", "buffer"))
        splits["tp"][node] = tp
        if mb:
            splits["mb"][node] = mb

    add("ids", "-:  -> R", "b:  -> S(0)", "input", "ids", 0, (), "int64[8,128]")
    add("p_embed", "-:  -> R", "", "param", "embed.weight", 0, (), "float32[1000,64]")
    add(
        "embedding", "-: R R -> R", "b: R S(0) -> S(0)", "aten.embedding", "embed", 0, ("p_embed", "ids"),
        "float32[8,128,64]",
    )  # fmt: skip
    value = "embedding"
    for layer in range(layers):
        stage, module = layer // per_stage, f"model.layers.{layer}.mlp"
        up, down = f"p_layers_{layer}_up", f"p_layers_{layer}_down"
        add(up, "n:  -> S(0)", "", "param", f"{module}.up_proj.weight", stage, (), "float32[256,64]")
        add(down, "k:  -> S(1)", "", "param", f"{module}.down_proj.weight", stage, (), "float32[64,256]")
        hidden, out = f"linear_{2 * layer}", f"linear_{2 * layer + 1}"
        add(
            hidden, "n: D S(0) -> S(2)", "b: S(0) R -> S(0)", "aten.linear", f"{module}.up_proj", stage, (value, up),
            "float32[8,128,256]",
        )  # fmt: skip
        add(
            out, "k: S(2) S(1) -> P", "b: S(0) R -> S(0)", "aten.linear", f"{module}.down_proj", stage, (hidden, down),
            "float32[8,128,64]",
        )  # fmt: skip
        value = out
    return nodes, splits


def measured(plan: Plan) -> Measured:
    """A measurement ten percent slower than the plan."""
    return Measured(
        step_seconds=plan.step_seconds * 1.1,
        stage_seconds=tuple(0.13 + 0.01 * s for s in range(len(plan.stages))),
        peak_nbytes=tuple(14 * GIB + rank * GIB // 4 for rank in range(len(plan.devices))),
        single_device_seconds=0.4,
        steps=5,
        timeline=_slower(simulate_plan(plan).timeline("measured"), 1.1),
    )


def _slower(timeline: Timeline, factor: float) -> Timeline:
    def stretch(event: Event) -> Event:
        return event._replace(start_seconds=event.start_seconds * factor, end_seconds=event.end_seconds * factor)

    tracks = (track._replace(events=tuple(map(stretch, track.events)), counters=()) for track in timeline.tracks)
    return Timeline(timeline.name, tuple(tracks))
