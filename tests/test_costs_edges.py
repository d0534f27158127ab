"""Costs at the edges: rarer products, attention that only GPUs fuse, long ops, a store that cannot be written."""

from __future__ import annotations

import sqlite3

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shardplan.planner.cluster import Cluster
from shardplan.planner.costs import profile
from shardplan.planner.costs import store as stores
from shardplan.planner.costs.links import LinkModel
from shardplan.planner.costs.model import CostModel
from shardplan.planner.costs.roofline import flops
from shardplan.planner.costs.saves import observe
from shardplan.planner.costs.store import Sample, Store
from shardplan.planner.export import trace_model
from shardplan.planner.rules.localize import LocalCall, Slot
from shardplan.planner.trace import TensorInfo

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
X, Y = Slot(0), Slot(1)
PRODUCTS = {
    "conv2d, same": (aten.conv2d.padding, (X, Y, None, [1, 1], "same"), [(2, 3, 8, 8), (4, 3, 3, 3)]),
    "conv1d, valid": (aten.conv1d.padding, (X, Y, None, [1], "valid"), [(2, 4, 9), (6, 2, 3)], 2),
    "conv_transpose2d": (aten.conv_transpose2d.input, (X, Y, None, [2, 2]), [(2, 3, 8, 8), (3, 4, 3, 3)]),
    "einsum": (aten.einsum.default, ("bij,bjk->bik", [X, Y]), [(2, 3, 4), (2, 4, 5)]),
    "einsum, ellipsis": (aten.einsum.default, ("...ij,jk->...ik", [X, Y]), [(2, 3, 4, 5), (5, 6)]),
    "einsum, broadcast": (aten.einsum.default, ("...ij,...jk->...ik", [X, Y]), [(7, 2, 4, 5), (2, 5, 6)]),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_flops_of_rarer_products_are_those_that_torch_counts(name):
    target, args, shapes, *groups = PRODUCTS[name]
    if groups:
        args = (*args, [1], groups[0])
    tensors = [torch.randn(shape) for shape in shapes]
    with FlopCounterMode(display=False) as counter:
        result = target(*profile._filled(args, tensors))
    inputs = tuple(TensorInfo(shape, torch.float32) for shape in shapes)
    call = LocalCall(target, args, {}, inputs, (TensorInfo(tuple(result.shape), torch.float32),))
    assert flops(call) == counter.get_total_flops() > 0


class Attention(nn.Module):
    """Queries, keys and values are results of ops, so that whatever is kept of them counts."""

    def __init__(self, dropout: float, masked: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 64, 16, dtype=dtype))
        self.mask = nn.Parameter(torch.randn(64, 64, dtype=dtype)) if masked else None
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.weight * 2, self.weight * 3, self.weight * 4
        mask = None if self.mask is None else self.mask * 2
        found = nn.functional.scaled_dot_product_attention(q, k, v, mask, self.dropout)
        return found.float().sum() + x.sum()


def attention_node(dropout: float, masked: bool = False, dtype: torch.dtype = torch.float32):
    trace = trace_model(Attention(dropout, masked, dtype), (), {"x": torch.ones(2)})
    return next(node for node in trace.nodes() if node.target is ATTENTION)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpus_keep_no_scores_of_attention(masked, dtype):
    node = attention_node(0.0, masked, dtype)
    gpu = observe(node, "cuda")
    assert gpu.inputs == (True,) * (4 if masked else 3) and gpu.outputs == (True,)
    assert gpu.extra_nbytes_per_output_byte * 2 * 4 * 64 * 16 * dtype.itemsize == 2 * 4 * 64 * 4


def test_scores_are_kept_under_dropout_everywhere():
    """[2, 4, 64, 16]: matrices of [2, 4, 64, 64], four times the result each."""
    node = attention_node(0.1)
    assert observe(node, "cuda") == observe(node)
    assert observe(node).extra_nbytes_per_output_byte > 4


def test_gpus_keep_of_attention_what_the_fused_kernel_of_the_cpu_does():
    node = attention_node(0.0)
    assert observe(node, "cuda") == observe(node)


def test_double_precision_is_fused_nowhere():
    node = attention_node(0.1, dtype=torch.float64)
    assert observe(node, "cuda") == observe(node)


def test_the_model_asks_for_the_kind_of_its_devices():
    node = attention_node(0.0, masked=True)
    for devices, kind in (("8xh100", "cuda"), ("cpu:2", "cpu")):
        cluster = Cluster.parse(devices)
        assert CostModel(cluster, LinkModel(cluster), measure=False).saves(node) == observe(node, kind)


def test_a_long_op_is_run_once_and_a_short_one_more_often(monkeypatch):
    for once, least, most in ((0.5, 1, 1), (0.01, 4, 11)):
        runs: list[int] = []
        monkeypatch.setattr(profile, "_reading", lambda action, device, inner, s=once, r=runs: r.append(inner) or s)
        assert profile._timed(lambda: None, torch.device("cpu")) == once
        assert least <= len(runs) <= most


def test_a_store_that_stays_locked_is_waited_for_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(stores, "_WAIT_SECONDS", 0.1)
    path = tmp_path / "costs.sqlite"
    store = Store(path)
    store.put_samples([Sample("before", "f", 1.0, 1.0, 1.0, 1.0)])
    holder = sqlite3.connect(path)
    holder.execute("BEGIN IMMEDIATE")
    for index in range(5):
        store.put_samples([Sample(f"k{index}", "f", 1.0, 1.0, 1.0, 1.0)])
    assert len(caplog.records) == 1 and "no longer kept" in caplog.text
    assert [sample.key for sample in store.family("f")] == ["before"]  # reading goes on
    holder.close()
    store.close()
