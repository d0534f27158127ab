"""The plan that splits nothing: one device, one microbatch. What every other plan has to compute."""

from __future__ import annotations

from shardplan.planner import schedules
from shardplan.planner.describe import describe_nodes
from shardplan.planner.placement import Mesh
from shardplan.planner.plan import DeviceSummary, Memory, Plan, StagePlan, Status, input_texts
from shardplan.planner.stages import split_stages
from shardplan.planner.trace import Trace, info


def unsplit(trace: Trace) -> Plan:
    """The whole trace on device 0; nothing is predicted."""
    split = split_stages(trace, (0,))
    names = tuple(segment.name for segment in trace.segments)
    stage = StagePlan(0, len(names), names, (0,), Mesh(("dp", "tp"), (1, 1)), 0.0, 0.0, 0.0, Memory())
    return Plan(
        model=trace.model_name,
        fingerprint=trace.fingerprint,
        batch_size=trace.batch_size,
        inputs=input_texts(
            (source.name, info(trace.node(n)).shape, str(info(trace.node(n)).dtype).removeprefix("torch."))
            for n, source in trace.sources.items()
            if source.kind == "input"
        ),
        devices=(DeviceSummary("any", 0, 0),),
        stages=(stage,),
        microbatches=1,
        schedule="gpipe",
        instructions=schedules.build("gpipe", 1, 1, (), training=trace.training),
        splits={},
        step_seconds=0.0,
        status=Status("given", 0.0, 0.0, "none"),
        nodes=describe_nodes(trace, split),
    )
