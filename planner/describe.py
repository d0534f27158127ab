"""Node summaries of a trace: what a plan keeps so that it can explain itself without the model."""

from __future__ import annotations

from collections import defaultdict

from torch import fx

from shardplan.planner.plan import NodeSummary
from shardplan.planner.stages import StageSplit
from shardplan.planner.trace import Trace, infos, module_path, needs_grad, resolve, tensor_args


def describe_nodes(trace: Trace, split: StageSplit) -> dict[str, NodeSummary]:
    """Summary of every op, parameter, buffer, constant and input, by node name, for `Plan.nodes`."""
    readers: dict[str, set[int]] = defaultdict(set)
    # Shared nodes are computed on every stage that reads them, so stages flow from readers to what they read.
    for node in reversed(list(trace.nodes())):
        for stage in (split.stage_of[node.name],) if node.name in split.stage_of else readers[node.name]:
            for argument in tensor_args(node):
                readers[resolve(argument)[0].name].add(stage)
    found = {}
    for node in trace.nodes():
        if node.op == "output" or resolve(node)[0] is not node:
            continue
        source = trace.sources.get(node.name)
        stages = {split.stage_of[node.name]} if node.name in split.stage_of else readers[node.name]
        found[node.name] = NodeSummary(
            order=len(found),
            op=source.kind if source else op_name(node),
            name=source.name if source else module_path(node),
            stages=tuple(sorted(stages)),
            inputs=tuple(_reference(argument) for argument in tensor_args(node)),
            outputs=tuple(f"{_dtype(i.dtype)}[{','.join(map(str, i.shape))}]" for i in infos(node)),
            differentiable=source.trainable if source and source.kind == "param" else needs_grad(node),
        )
    return found


def op_name(node: fx.Node) -> str:
    """ "aten.linear" for an ATen op, the plain name of another function."""
    packet = getattr(node.target, "_overloadpacket", None)
    if packet is not None:
        return str(packet)
    return getattr(node.target, "__name__", str(node.target))


def _reference(argument: fx.Node) -> str:
    maker, index = resolve(argument)
    return f"{maker.name}#{index}" if index else maker.name


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
