"""Traces equal the models they came from: loss, every gradient, outputs and buffers; and what a Trace promises."""

from __future__ import annotations

import functools
import pickle
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import models
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from shardplan.errors import NotTraceable, UsageError
from shardplan.planner import capture, export, passes
from shardplan.planner.export import trace_model
from shardplan.planner.trace import info, is_tensor, module_path, mutated, needs_grad

pytestmark = pytest.mark.timeout(120)


def trace_case(case):
    return trace_model(case.model, (), case.kwargs, loss_fn=case.loss_fn, target=case.target)


@functools.cache
def traced(name):
    case = models.make(name)
    return case, trace_case(case)


def assert_same(case, trace, tolerance=1e-6):
    """The trace's loss, outputs, buffers and gradients against eager, relative to each tensor's norm."""
    found, wanted = models.run_trace(trace, case.model, case.batch), models.run_eager(case)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=tolerance, atol=0)
    assert found.gradients.keys() == wanted.gradients.keys()
    assert len(found.outputs) == len(wanted.outputs)
    pairs = {f"gradient {k}": (found.gradients[k], v) for k, v in wanted.gradients.items()}
    pairs |= {f"buffer {k}": (found.buffers[k], v) for k, v in wanted.buffers.items() if k in found.buffers}
    pairs |= {f"output {i}": pair for i, pair in enumerate(zip(found.outputs, wanted.outputs, strict=True))}
    for label, (a, b) in pairs.items():
        assert a.dtype == b.dtype and a.shape == b.shape, label
        assert float((a.double() - b.double()).norm()) <= tolerance * float(b.double().norm()) + 1e-12, label


ALL = [*models.MODELS, *models.EXTRAS]


@pytest.mark.parametrize("name", ALL)
def test_trace_equals_eager(name):
    case, trace = traced(name)
    assert_same(case, trace)


@pytest.mark.parametrize("name", ["llama", "t5", "resnet"])
def test_make_fx_fallback_equals_eager(name, monkeypatch):
    def fail(*_):
        raise RuntimeError("export is off")

    monkeypatch.setattr(capture, "_export", fail)
    case = models.make(name)
    trace = trace_case(case)
    assert trace.method == "make_fx" and "export is off" in trace.notes[0]
    assert_same(case, trace)


@pytest.mark.parametrize("name", ALL)
def test_every_pass_leaves_true_shapes(name, monkeypatch):
    monkeypatch.setattr(export, "normalize", functools.partial(passes.normalize, deep=True))
    assert trace_case(models.make(name)).fingerprint == traced(name)[1].fingerprint


@pytest.mark.parametrize("name", ALL)
def test_form(name):
    case, trace = traced(name)
    trace.graph.lint()
    assert {s.name for s in trace.sources.values() if s.kind == "param"} == {
        n for n, _ in case.model.named_parameters()
    }
    for node in trace.nodes():
        assert node.op in ("placeholder", "call_function", "output")
        if node.op == "call_function":
            assert "assert" not in node.name and "set_grad" not in node.name
            assert not is_tensor(node) or info(node).shape is not None
    # Forward and loss of a layer stay within what a person can read.
    assert len(list(trace.nodes())) < 320


def test_tied_parameters_are_one_placeholder():
    _, trace = traced("gpt2")
    (tied,) = [s for s in trace.sources.values() if s.aliases]
    assert tied.name == "transformer.wte.weight" and tied.aliases == ("lm_head.weight",)
    _, trace = traced("t5")
    (tied,) = [s for s in trace.sources.values() if s.aliases and s.kind == "param"]
    assert {tied.name, *tied.aliases} >= {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_causal_is_recovered(name):
    _, trace = traced(name)
    attention = [n for n in trace.nodes() if "scaled_dot_product" in str(n.target)]
    assert len(attention) == 2
    for node in attention:
        assert node.args[3] is None and node.args[5] is True
    square = [n.name for n in trace.nodes() if is_tensor(n) and info(n).shape[1:] in ((1, 16, 16), (4, 16, 16))]
    assert not square


def test_padding_keeps_its_mask_without_batch_indices():
    _, trace = traced("llama_padded")
    attention = [n for n in trace.nodes() if "scaled_dot_product" in str(n.target)]
    assert all(n.args[3] is not None and n.args[3].name in trace.shared for n in attention)
    assert not any("aten.index.Tensor" in str(n.target) for n in trace.nodes())


def test_gradients_and_buffers_are_marked():
    case, trace = traced("resnet")
    written = {trace.sources[b.name].name for node in trace.nodes() for b in mutated(node)}
    assert written == {name for name, _ in case.model.named_buffers()}
    assert all(needs_grad(node) for node in trace.parameters().values())
    case, trace = traced("llama")
    for node in trace.nodes():
        if node.op == "call_function":
            assert needs_grad(node) == (node.name not in trace.shared)


def test_frozen_parameters_need_no_gradient():
    case = models.make("mlp")
    case.model.inner.requires_grad_(False)
    trace = trace_case(case)
    assert not needs_grad(trace.node("linear")) and needs_grad(trace.node("linear_1"))
    assert "linear" not in trace.shared
    assert_same(case, trace)


def test_inputs_and_outputs_are_described():
    _, trace = traced("llama")
    inputs = [s for s in trace.sources.values() if s.kind == "input"]
    assert [(s.name, s.batch_dim, s.leaf) for s in inputs] == [("input_ids", 0, 0), ("labels", 0, 1)]
    assert trace.batch_size == 8 and trace.output_leaves == (1, 2) and trace.loss_leaf == 0
    _, trace = traced("bytegpt")
    inputs = [s for s in trace.sources.values() if s.kind == "input"]
    assert [(s.name, s.leaf) for s in inputs] == [("ids", 0), ("target", -1)] and trace.loss_leaf is None


class Structured(nn.Module):
    """Takes and returns nested structures; one input has no batch dim."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x, scale, flag=True, *, extra=None):
        y = self.a(x) * scale
        return {"y": y + extra["k"][0] if flag else y, "n": 3, "rest": (x, None, "text")}


def test_structured_call():
    extra = {"k": [torch.ones(8, 8)[0], None]}
    x = torch.randn(4, 8)
    trace = trace_model(
        Structured(), (x, 2), {"extra": extra}, loss_fn=lambda o, t: F.mse_loss(o["y"], t["a"]), target={"a": x}
    )
    inputs = [(s.name, s.batch_dim, s.leaf) for s in trace.sources.values() if s.kind == "input"]
    assert inputs == [("x", 0, 0), ("extra.k.0", None, 2), ("target.a", 0, -1)]
    assert any("extra.k.0" in note for note in trace.notes)
    assert trace.output_leaves == (1, (3,), 2, (None,), ("text",))
    built = pytree.tree_unflatten(["y", 3, "x", None, "text"], trace.out_spec)
    assert built == {"y": "y", "n": 3, "rest": ("x", None, "text")}


def test_output_structure_survives_in_another_process():
    _, trace = traced("llama")
    code = (
        "import pickle, sys; from torch.utils import _pytree as p\n"
        "spec = pickle.load(sys.stdin.buffer)\n"
        "print(type(p.tree_unflatten([1, 2], spec)).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(trace.out_spec), capture_output=True, timeout=100, check=True
    )
    assert done.stdout.decode().strip() == "CausalLMOutputWithPast"


def test_module_paths_are_the_users():
    _, trace = traced("llama")
    paths = {module_path(n) for n in trace.nodes() if n.op == "call_function"}
    assert {"model.layers.1.mlp.up_proj", "lm_head"} <= paths
    assert not any(path.startswith("model.model") for path in paths)


def test_the_model_is_left_alone():
    case = models.make("resnet")
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    case.model.eval()
    assert any("eval mode" in note for note in trace_case(case).notes)
    assert not case.model.training
    trace_model(models.make("llama").model, (), {"input_ids": torch.ones(8, 16).long()}, training=False)
    for name, value in case.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_inference_without_a_loss():
    case = models.make("llama")
    trace = trace_model(case.model, (), {"input_ids": case.batch["input_ids"]}, training=False)
    assert case.model.training and case.model.config.use_cache
    found = models.run_trace(trace, case.model, {"input_ids": case.batch["input_ids"]})
    assert found.loss is None
    with torch.no_grad():
        wanted = case.model(input_ids=case.batch["input_ids"]).logits
    torch.testing.assert_close(found.outputs[0], wanted)


def test_llama_8b_on_meta_traces_without_memory():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    ids = torch.empty(512, 8192, dtype=torch.long, device="meta")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    trace = trace_model(model, (), {"input_ids": ids, "labels": ids})
    seconds = time.process_time() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(f"Llama-3-8B: {seconds:.1f} CPU-s, {grown / 2**20:.0f} MiB, {len(list(trace.nodes()))} nodes")
    assert seconds < 60 and grown < 2**30
    assert all(n.args[5] for n in trace.nodes() if "scaled_dot_product" in str(n.target))
    assert len(trace.segments) == 66 and len({s.kind for s in trace.segments}) == 4


# -- errors ------------------------------------------------------------------------------------------------------------


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Linear(8, 8)

    def forward(self, x):
        y = self.w(x)
        if y.max() > 0.5:
            return y * 2
        return y


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = Router()

    def forward(self, x):
        return self.router(x)


def line_of(text: str) -> str:
    """file:line of the only line of this file that starts with `text`."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if line.strip().startswith(text)]
    return f"{__file__}:{number}"


X = torch.randn(8, 8)


def refused(model, kind=NotTraceable, args=(X,), **options):
    settings = {"loss_fn": F.mse_loss, "target": X} | options
    with pytest.raises(kind) as caught:
        trace_model(model, args, {}, **settings)
    return caught.value


def test_branch_on_data_names_statement_and_module(capfd):
    error = refused(Routed().router)
    assert error.code == "SP201" and error.title == "the model depends on the numbers in a tensor"
    assert error.details[0] == f"{line_of('if y.max()')}: if y.max() > 0.5:"
    assert len(error.hints) == 1 and 'leaf("name")' in error.hints[0]
    assert capfd.readouterr() == ("", "")


class TakesItem(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y * y.sum().item()


class TakesMask(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y[y > 0].cumsum(0).mean().expand(8, 8)


class Rounding(torch.autograd.Function):
    """Straight through: autograd would give zero."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class StraightThrough(nn.Linear):
    def forward(self, x):
        return Rounding.apply(super().forward(x))


class Square(torch.autograd.Function):
    """A backward that says what autograd would."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x)
        ctx.scale = scale
        return x * x * scale

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad * ctx.scale, None


class Squares(nn.Linear):
    def forward(self, x):
        return Square.apply(super().forward(x), 3.0)


def test_custom_functions_with_a_plain_backward_are_traced():
    case = models.Case(Squares(8, 8), {"x": X, "target": X}, F.mse_loss)
    before = vars(torch.autograd.Function)["apply"]
    assert_same(case, trace_case(case))
    assert vars(torch.autograd.Function)["apply"] is before


class ChangesParameter(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-1, 1)
        return super().forward(x)


class ChangesUnderNoGrad(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        with torch.no_grad():
            y.mul_(2)
        return y


def test_writes_under_no_grad_keep_the_gradient():
    case = models.Case(ChangesUnderNoGrad(8, 8), {"x": X, "target": X}, F.mse_loss)
    assert_same(case, trace_case(case))


@pytest.mark.parametrize(
    ("model", "statement"),
    [
        (TakesItem, "return y * y.sum().item()"),
        (TakesMask, "return y[y > 0]"),
        (StraightThrough, "return Rounding.apply("),
        (ChangesParameter, "self.weight.clamp_(-1, 1)"),
    ],
)
def test_what_no_graph_can_hold_is_refused(model, statement):
    assert refused(model(8, 8)).details[0].startswith(line_of(statement))


class Fails(nn.Linear):
    def forward(self, x):
        raise ValueError("from the model")


def test_an_error_of_the_model_is_shown():
    error = refused(Fails(8, 8))
    assert error.details[0].startswith(line_of('raise ValueError("from')) and "from the model" in str(error)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"model": F.relu}, "not an nn.Module"),
        ({"args": [X]}, "not a tuple"),
        ({"args": (3,)}, "no tensor"),
        ({"args": (threading.Lock(),)}, "among the inputs"),
        ({"target": None}, "no target"),
        ({"loss_fn": None}, "no loss_fn"),
        ({"loss_fn": None, "target": None}, "output is not a scalar loss and no loss_fn"),
        ({"loss_fn": lambda o, t: (o - t).sum(0)}, "shape [8]"),
        ({"loss_fn": nn.Linear(8, 8)}, "parameters of its own"),
        ({"model": nn.LazyLinear(8)}, "no shape yet"),
        ({"model": nn.Linear(8, 8).requires_grad_(False)}, "any trainable parameter"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_usage_errors(options, text):
    settings = {"model": nn.Linear(8, 8)} | options
    assert text in refused(settings.pop("model"), UsageError, **settings).title


# -- models that cannot be copied, and losses that hold on to the model ------------------------------------------------


class Locked(nn.Linear):
    """Cannot be deep-copied."""

    def __init__(self):
        super().__init__(8, 8)
        self.lock = threading.Lock()


@pytest.mark.parametrize("kind", [Locked, lambda: nn.Linear(8, 8)])
def test_loss_that_reads_the_model_keeps_its_gradients(kind):
    model = kind()
    case = models.Case(model, {"input": X, "target": X}, lambda o, t: F.mse_loss(F.linear(o, model.weight), t))
    trace = trace_case(case)
    assert not trace.constants
    assert_same(case, trace)
    assert type(model.weight.data) is torch.Tensor


def test_buffers_of_a_loss_module_are_constants():
    loss = nn.CrossEntropyLoss(weight=torch.rand(8))
    case = models.Case(nn.Linear(8, 8), {"input": X, "target": torch.randint(0, 8, (8,))}, loss)
    trace = trace_case(case)
    assert len(trace.constants) == 1
    assert_same(case, trace)
