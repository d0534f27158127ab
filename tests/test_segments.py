"""Segments cover the compute nodes once, in order, and repeat where the model repeats."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import models
import pytest
import torch
from test_trace import ALL, trace_case, traced
from torch import nn
from torch.nn import functional as F

from shardplan.planner.cuts import find_cuts, is_heavy
from shardplan.planner.segments import fill_segments, structure
from shardplan.planner.trace import resolve

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("name", ALL)
def test_segments_cover_the_compute_nodes_in_order(name):
    _, trace = traced(name)
    compute = [n.name for n in trace.nodes() if n.op == "call_function" and n.name not in trace.shared]
    assert [node for segment in trace.segments for node in segment.nodes] == compute
    assert len({segment.name for segment in trace.segments}) == len(trace.segments)
    home = {node: i for i, segment in enumerate(trace.segments) for node in segment.nodes}
    for segment in trace.segments:
        assert any(is_heavy(trace.node(n)) for n in segment.nodes), segment.name
    for node in compute:
        maker, _ = resolve(trace.node(node))
        assert home[maker.name] == home[node]


@pytest.mark.parametrize("name", ALL)
def test_shared_nodes_depend_on_no_parameter(name):
    _, trace = traced(name)
    parameters = set(trace.parameters().values())
    for node in trace.nodes():
        if node.name in trace.shared:
            for argument in node.all_input_nodes:
                assert argument not in parameters
                assert argument.op == "placeholder" or argument.name in trace.shared


def kinds(name, **changes):
    trace = traced(name)[1] if not changes else trace_case(models.make(name, **changes))
    return [segment.kind for segment in trace.segments], [segment.name for segment in trace.segments]


def test_decoders_split_into_halves():
    assert kinds("llama") == (
        [0, 1, 2, 1, 2, 3],
        [
            "model.embed_tokens",
            "model.layers.0.self_attn",
            "model.layers.0.mlp",
            "model.layers.1.self_attn",
            "model.layers.1.mlp",
            "lm_head+loss",
        ],
    )
    assert kinds("gpt2")[0] == kinds("bytegpt")[0] == kinds("mixtral")[0] == [0, 1, 2, 1, 2, 3]
    assert kinds("llama", layers=4)[0] == [0, *[1, 2] * 4, 3]


def test_encoders_split_into_halves():
    assert kinds("bert")[0][:5] == [0, 1, 2, 1, 2]
    assert kinds("vit")[0] == kinds("encoder")[0] == [0, 1, 2, 1, 2, 3]


def test_encoder_decoder():
    found, names = kinds("t5", layers=3)
    # The first layer of each stack makes the position bias that the others use.
    decoder = [i for i, n in enumerate(names) if n.startswith("decoder.block")]
    assert len(decoder) == 9
    assert found[decoder[3]] == found[decoder[6]] != found[decoder[0]]
    assert found[decoder[1]] == found[decoder[4]] == found[decoder[7]]
    assert found[decoder[2]] == found[decoder[5]] == found[decoder[8]]


def test_chains_and_skips():
    assert kinds("resnet")[0] == [0, 1, 1, 2, 3, 4]
    assert kinds("mlp")[0] == [0, 1, 1, 1, 1, 1, 1, 2]


class Parallel(nn.Module):
    """Layers whose attention and mlp read the same norm and are added up once, with attention written out."""

    def __init__(self, layers=3, width=8):
        super().__init__()
        names = ["q", "k", "v", "o", "up", "down"]
        self.first = nn.Linear(width, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(width, width) for n in names} | {"norm": nn.LayerNorm(width)})
            for _ in range(layers)
        )

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            h = layer["norm"](x)
            q, k, v = layer["q"](h), layer["k"](h), layer["v"](h)
            attended = layer["o"](torch.softmax(q @ k.transpose(1, 2), -1) @ v)
            x = attended + layer["down"](F.gelu(layer["up"](h))) + x
        return x


def test_parallel_layers_are_not_cut_inside():
    shape = (8, 4, 8)
    case = models.Case(Parallel(), {"x": torch.randn(shape), "target": torch.randn(shape)}, F.mse_loss)
    found = trace_case(case).segments
    assert [s.name for s in found] == ["first", "layers.0", "layers.1", "layers.2+loss"]
    assert found[1].kind == found[2].kind


class Nested(nn.Module):
    """A U-Net of linears: level i keeps its value for its mirror image."""

    def __init__(self, depth=5):
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(8, 8) for _ in range(2 * depth))
        self.up = nn.ModuleList(nn.Linear(8, 8) for _ in range(2 * depth))
        self.depth = depth

    def forward(self, x):
        kept = []
        for i in range(self.depth):
            x = F.relu(self.down[2 * i + 1](F.relu(self.down[2 * i](x))))
            kept.append(x)
        for i in range(self.depth):
            x = F.relu(self.up[2 * i + 1](F.relu(self.up[2 * i](x)))) + kept.pop()
        return x


def test_long_skips_do_not_hide_cuts():
    case = models.Case(Nested(), {"x": torch.randn(8, 8), "target": torch.randn(8, 8)}, F.mse_loss)
    assert len(trace_case(case).segments) >= 12


def test_segments_of_a_kind_agree_node_by_node():
    _, trace = traced("t5")
    by_kind = {}
    for segment in trace.segments:
        by_kind.setdefault(segment.kind, []).append(segment)
    assert any(len(group) > 1 for group in by_kind.values())
    for group in by_kind.values():
        for one, two in pairwise(group):
            for a, b in zip(map(trace.node, one.nodes), map(trace.node, two.nodes), strict=True):
                assert a.target is b.target and len(a.args) == len(b.args)
                assert a.meta["val"].shape == b.meta["val"].shape
                for x, y in zip(a.args, b.args, strict=True):
                    inside = isinstance(x, torch.fx.Node) and x.name in one.nodes
                    if inside:
                        assert one.nodes.index(x.name) == two.nodes.index(y.name)
                    elif not isinstance(x, (torch.fx.Node, list)):
                        assert x == y


def test_kind_changes_with_wiring_shape_and_static_arguments():
    class Two(nn.Module):
        def __init__(self, second):
            super().__init__()
            self.a, self.b, self.second = nn.Linear(8, 8), nn.Linear(8, 8), [second]

        def forward(self, x):
            y = F.gelu(self.a(x))
            return self.second[0](self, y)

    def kinds_of(second):
        case = models.Case(Two(second), {"x": torch.randn(8, 8), "target": torch.randn(8, 8)}, F.mse_loss)
        trace = trace_case(case)
        texts = [structure([trace.node(n) for n in s.nodes], trace) for s in trace.segments]
        return texts

    base = kinds_of(lambda m, y: F.gelu(m.b(y)))
    assert base == kinds_of(lambda m, y: F.gelu(m.b(y)))
    for other in (
        lambda m, y: F.gelu(m.b(y), approximate="tanh"),
        lambda m, y: F.gelu(F.linear(y, m.b.bias[:, None] * m.b.weight)),
        lambda m, y: F.gelu(F.linear(y, m.a.weight, m.b.bias)) * m.b.weight,
    ):
        assert kinds_of(other) != base


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_fingerprint_is_the_same_in_another_process():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import models, torch\n"
        "from shardplan.planner.export import trace_model\n"
        "torch.rand(3)\n"
        "for name in ('gpt2', 'resnet', 'encoder'):\n"
        "    c = models.make(name, seed=5)\n"
        "    print(trace_model(c.model, (), c.kwargs, loss_fn=c.loss_fn, target=c.target).fingerprint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, timeout=100, check=True
    )
    assert done.stdout.decode().split() == [traced(n)[1].fingerprint for n in ("gpt2", "resnet", "encoder")]


def test_fingerprint_of_a_meta_model_is_that_of_a_real_one():
    case = models.make("llama")
    with torch.device("meta"):
        model = type(case.model)(case.model.config)
    batch = {name: value.to("meta") for name, value in case.batch.items()}
    model.train()
    assert trace_case(models.Case(model, batch)).fingerprint == traced("llama")[1].fingerprint


def test_fingerprint_changes_with_the_job():
    found = {traced(name)[1].fingerprint for name in ALL}
    assert len(found) == len(ALL)
    case = models.make("bytegpt")
    batch = {name: value[:4] for name, value in case.batch.items()}
    assert trace_case(models.Case(case.model, batch, case.loss_fn)).fingerprint not in found
    case.model.norm.bias.requires_grad_(False)
    assert trace_case(case).fingerprint not in found


# -- size --------------------------------------------------------------------------------------------------------------


def test_linear_time_in_the_number_of_nodes():
    graph = torch.fx.Graph()
    value = torch.empty(4, 4)

    def call(target, *args):
        node = graph.call_function(target, args)
        node.meta["val"] = value
        return node

    x = graph.placeholder("x")
    x.meta["val"] = value
    for _ in range(3000):
        y = x
        for _ in range(4):
            y = call(torch.ops.aten.gelu.default, call(torch.ops.aten.mm.default, y, y))
        x = call(torch.ops.aten.add.Tensor, x, y)
    graph.output((x,))
    compute = [n for n in graph.nodes if n.op == "call_function"]
    started = time.process_time()
    bounds = find_cuts(compute)
    assert time.process_time() - started < 8
    assert bounds[0] == 0 and bounds[-1] == len(compute) and len(bounds) >= 3001


def test_filling_again_gives_the_same():
    _, trace = traced("t5")
    before = trace.segments, trace.shared, trace.fingerprint
    fill_segments(trace)
    assert (trace.segments, trace.shared, trace.fingerprint) == before
