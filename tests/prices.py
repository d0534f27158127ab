"""Deterministic prices for tests of the search: a plain roofline, links from the cluster, real facts on memory."""

from __future__ import annotations

import torch
from torch import fx

from shardplan.planner.cluster import Cluster
from shardplan.planner.costs.base import OpCost, OpSaves, Overheads
from shardplan.planner.costs.links import LinkModel
from shardplan.planner.rules import LocalCall
from shardplan.planner.rules.views import PERMUTES, RESHAPES
from shardplan.planner.trace import infos, needs_grad, tensor_args

aten = torch.ops.aten
_MATMULS = {aten.linear.default, aten.addmm.default, aten.matmul.default, aten.conv2d.default}


class SimplePrices:
    """`Costs` without measuring: flops and bytes over fixed speeds, plus 5 us an op."""

    def __init__(self, cluster: Cluster, flops_per_s: float = 2e10, bytes_per_s: float = 1e10) -> None:
        self.links = LinkModel(cluster)
        self.flops_per_s = flops_per_s
        self.bytes_per_s = bytes_per_s

    def op(self, call: LocalCall, device: int) -> OpCost:
        moved = sum(i.nbytes for i in (*call.inputs, *call.outputs))
        flops = 0.0
        if call.target in _MATMULS and call.outputs:
            out = call.outputs[0].nbytes / call.outputs[0].dtype.itemsize
            weight = call.inputs[-1 if call.target is aten.matmul.default else 1]
            inner = weight.nbytes / weight.dtype.itemsize / max(weight.shape[0], 1)
            flops = 2 * out * inner
        view = call.target in RESHAPES or call.target in PERMUTES
        forward = 5e-6 + (0.0 if view else flops / self.flops_per_s + moved / self.bytes_per_s)
        backward = 2 * forward if any(i.needs_grad for i in call.inputs) else 0.0
        return OpCost(forward, backward)

    def saves(self, node: fx.Node) -> OpSaves:
        arguments = tensor_args(node)
        keeps = node.target not in RESHAPES | PERMUTES | {aten.add.Tensor} and any(map(needs_grad, arguments))
        return OpSaves((keeps,) * len(arguments), (False,) * len(infos(node)))

    def collective(self, kind: str, nbytes: int, ranks: tuple[int, ...]) -> float:
        return self.links.collective(kind, nbytes, ranks)

    def p2p(self, nbytes: int, source: int, target: int) -> float:
        return self.links.p2p(nbytes, source, target)

    def slowdown(self, kind: str, ranks: tuple[int, ...]) -> tuple[float, float]:
        return self.links.slowdown(kind, ranks)

    def copy(self, nbytes: int, device: int) -> float:
        return 2 * nbytes / self.bytes_per_s

    def optimizer(self, nbytes: int, device: int) -> float:
        return 5 * nbytes / self.bytes_per_s

    def overheads(self, device: int) -> Overheads:
        return Overheads()


class KindPrices(SimplePrices):
    """The same at the speeds of the device's kind."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.cluster = cluster

    def op(self, call: LocalCall, device: int) -> OpCost:
        kind = self.cluster.devices[device].kind
        self.flops_per_s, self.bytes_per_s = kind.peak_flops("fp32"), kind.memory_bytes_per_s
        return super().op(call, device)
