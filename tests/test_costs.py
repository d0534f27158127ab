"""Costs: what is measured is right in kind, kept, and found again; what is not is modelled from it."""

from __future__ import annotations

import math
import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from shardplan.planner.cluster import Cluster
from shardplan.planner.costs import profile
from shardplan.planner.costs.links import LinkModel
from shardplan.planner.costs.model import CostModel
from shardplan.planner.costs.recorded import RecordedCosts, RecordingCosts
from shardplan.planner.costs.roofline import flops, is_view, modelled_seconds
from shardplan.planner.costs.saves import observe
from shardplan.planner.costs.store import Sample, Store
from shardplan.planner.export import trace_model
from shardplan.planner.placement import Mesh
from shardplan.planner.rules import local_call
from shardplan.planner.rules.localize import LocalCall, Slot
from shardplan.planner.trace import TensorInfo, infos, resolve
from tests.models import make

aten = torch.ops.aten
ONE = Mesh(("dp", "tp"), (1, 1))
SAMPLE = Sample("k", "f", 1e-3, 2e-3, 3e-3, 4e-3)


def linear_call(rows: int, inner: int = 64, outer: int = 64, grad: bool = True) -> LocalCall:
    shapes = [(rows, inner), (outer, inner), (rows, outer)]
    x, w, y = (TensorInfo(shape, torch.float32, grad) for shape in shapes)
    return LocalCall(aten.linear.default, (Slot(0), Slot(1)), {}, (x, w), (y,))


def trace_of(name: str):
    case = make(name, 0)
    return trace_model(case.model, (), case.kwargs, loss_fn=case.loss_fn, target=case.target)


def ops(trace):
    return [n for n in trace.nodes() if n.op == "call_function" and resolve(n)[0] is n and infos(n)]


def cost_model(store: Store | None = None, devices: str = "cpu:2", **settings) -> CostModel:
    cluster = Cluster.parse(devices)
    return CostModel(cluster, LinkModel(cluster), store, **settings)


# -- the store ---------------------------------------------------------------------------------------------------------


def test_store_keeps_and_the_first_measurement_stays(tmp_path):
    store = Store(tmp_path / "costs.sqlite")
    store.put_text("links", "{}")
    store.put_samples([SAMPLE])
    store.put_samples([Sample("k", "f", 9.0, 9.0, 9.0, 9.0)])
    store.close()
    again = Store(tmp_path / "costs.sqlite")
    assert again.get_text("links") == "{}" and again.get_text("none") is None
    assert again.sample("k") == SAMPLE and again.sample("none") is None
    assert again.family("f") == [SAMPLE] and again.family("none") == []
    again.close()


@pytest.mark.parametrize("content", [b"no database at all, but long enough to be looked at" * 10, None])
def test_a_damaged_or_foreign_file_is_put_aside(tmp_path, content):
    path = tmp_path / "costs.sqlite"
    if content is None:
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA user_version = 77")
        connection.commit()
        connection.close()
    else:
        path.write_bytes(content)
    store = Store(path)
    store.put_samples([SAMPLE])
    assert store.sample("k") == SAMPLE
    assert path.with_name("costs.sqlite.damaged").exists()
    store.close()


def test_damage_is_told(tmp_path, caplog):
    (tmp_path / "costs.sqlite").write_bytes(b"nonsense " * 1000)
    Store(tmp_path / "costs.sqlite").close()
    assert "costs.sqlite" in caplog.text and "begun anew" in caplog.text


def test_a_file_that_is_damaged_under_way_is_given_up(tmp_path, caplog):
    path = tmp_path / "costs.sqlite"
    store, other = Store(path), Store(path)
    for index in range(200):
        store.put_samples([Sample(f"k{index}" * 50, "f", 1.0, 1.0, 1.0, 1.0)])
    store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    assert other.family("f") == [] and "costs.sqlite" in caplog.text
    other.put_samples([SAMPLE])
    assert other.sample("k") == SAMPLE
    store.close()
    other.close()


@pytest.mark.parametrize("number", [-1.0, math.nan, math.inf, 1e5])
def test_absurd_seconds_are_neither_kept_nor_believed(tmp_path, number):
    path = tmp_path / "costs.sqlite"
    store = Store(path)
    store.put_samples([Sample("k", "f", number, 1.0, 1.0, 1.0)])
    assert store.sample("k") is None and store.family("f") == []
    store._connection.execute("INSERT INTO samples VALUES ('k', 'f', 1.0, ?, 1.0, 1.0, 0, 0)", (number,))
    store._connection.commit()
    assert store.sample("k") is None and store.family("f") == []
    store.put_samples([SAMPLE])  # takes its place
    assert store.sample("k") == SAMPLE
    store.close()


_FILL = """
import sys
from shardplan.planner.costs.store import Sample, Store
store = Store(sys.argv[1])
for index in range(int(sys.argv[2]), int(sys.argv[2]) + 40):
    store.put_samples([Sample(f"k{index}", "f", 1.0, 1.0, 1.0, 1.0)])
"""


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_share_a_store(tmp_path, damaged):
    path = str(tmp_path / "costs.sqlite")
    if damaged:
        (tmp_path / "costs.sqlite").write_bytes(b"nonsense " * 1000)
    others = [subprocess.Popen([sys.executable, "-c", _FILL, path, str(20 * index)]) for index in range(4)]
    assert [process.wait(60) for process in others] == [0] * 4
    store = Store(path)
    assert len(store.family("f")) == 100
    store.close()


def test_the_users_store(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDPLAN_CACHE", str(tmp_path / "here"))
    assert Store.open() is Store.open() and Store.open().path == str(tmp_path / "here" / "costs.sqlite")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SHARDPLAN_CACHE", str(tmp_path / "file"))
    assert Store.open().path == ":memory:"


# -- counting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "resnet", "vit"])
def test_flops_are_those_that_torch_counts(name):
    from torch.utils.flop_counter import FlopCounterMode

    case = make(name, 0)
    trace = trace_model(case.model, (), case.kwargs, loss_fn=case.loss_fn, target=case.target)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        case.model(**case.kwargs)
    calls = [local_call(node, {}, ONE) for node in ops(trace)]
    attention = aten.scaled_dot_product_attention.default  # which the counter does not see on the CPU
    assert sum(flops(c) for c in calls if c.target is not attention) == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )


def test_flops_of_attention():
    shapes = [(2, 4, 8, 16), (2, 4, 32, 16), (2, 4, 32, 24), (2, 4, 8, 24)]
    query, key, value, out = (TensorInfo(shape, torch.float32) for shape in shapes)
    slots, target = (Slot(0), Slot(1), Slot(2)), aten.scaled_dot_product_attention.default
    whole = 2 * (2 * 4 * 8 * 32) * (16 + 24)
    assert flops(LocalCall(target, slots, {}, (query, key, value), (out,))) == whole
    assert flops(LocalCall(target, slots, {"is_causal": True}, (query, key, value), (out,))) == whole / 2
    assert flops(LocalCall(target, (*slots, None, 0.0, True), {}, (query, key, value), (out,))) == whole / 2


def test_views_are_known():
    assert is_view(aten.view.default) and is_view(aten.transpose.int)
    assert not is_view(aten.linear.default) and not is_view(aten.add_.Tensor)


def test_the_model_grows_with_the_work_and_the_device():
    h100 = Cluster.parse("h100").devices[0].kind
    seconds = [sum(modelled_seconds(linear_call(rows, 4096, 4096), h100)) for rows in (64, 1024, 16384)]
    assert seconds == sorted(seconds) and seconds[2] / seconds[1] == pytest.approx(16, rel=0.3)
    assert modelled_seconds(linear_call(64, grad=False), h100)[1] == 0.0
    peak = 2 * 16384 * 4096 * 4096 / h100.peak_flops(torch.float32)
    assert peak < modelled_seconds(linear_call(16384, 4096, 4096), h100)[0] < 2 * peak


# -- measuring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5", "bert", "resnet", "mixtral", "vit"])
def test_every_op_of_a_model_can_be_measured_by_itself(name):
    costs = cost_model(budget_seconds=60.0)
    missing = [n for n in ops(trace_of(name)) if costs.op(local_call(n, {}, ONE), 0).source != "measured"]
    assert not missing


def test_measured_times_are_of_the_right_size():
    """A matrix product takes about as long as one timed by hand, its backward about twice that."""
    call = linear_call(512, 512, 512)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = profile.measure(call, torch.device("cpu"))
        x, w = torch.randn(512, 512), torch.randn(512, 512)
        by_hand = min(profile._reading(lambda: torch.nn.functional.linear(x, w), torch.device("cpu"), 3) for _ in "12")
    finally:
        torch.set_num_threads(before)
    assert found is not None
    assert by_hand / 4 < found.forward_seconds < by_hand * 4
    assert 0.8 < found.backward_seconds / found.forward_seconds < 6


def test_measurements_are_kept_and_do_not_change(tmp_path):
    path = tmp_path / "costs.sqlite"
    first = cost_model(Store(path)).op(linear_call(64), 1)
    model = cost_model(Store(path))
    assert model.op(linear_call(64), 0) == first and first.source == "measured"
    assert model.profile_seconds == 0.0


def test_sizes_between_measurements_are_interpolated():
    store = Store(":memory:")
    measured = cost_model(store).op(linear_call(1024), 0)
    model = cost_model(store, budget_seconds=0.0)
    near, far = model.op(linear_call(2048), 0), model.op(linear_call(1024 * 64), 0)
    assert (near.source, far.source) == ("interpolated", "modelled")
    assert near.forward_seconds == pytest.approx(2 * measured.forward_seconds, rel=0.2)
    assert near.backward_seconds == pytest.approx(2 * measured.backward_seconds, rel=0.2)
    other = model.op(linear_call(2048, grad=False), 0)
    assert other.source == "modelled" and other.backward_seconds == 0.0


def test_what_was_never_measured_is_scaled_as_what_was():
    costs = cost_model()
    seen = costs.op(linear_call(512, 256, 256), 0)
    costs._budget_seconds = 0.0
    kind = costs.cluster.devices[0].kind
    ratio = (seen.forward_seconds + seen.backward_seconds) / sum(modelled_seconds(linear_call(512, 256, 256), kind))
    for call in (linear_call(256, grad=False), replace(linear_call(256), target=aten.matmul.default)):
        found = costs.op(call, 0)
        assert found.source == "modelled"
        assert found.forward_seconds == pytest.approx(ratio * modelled_seconds(call, kind)[0])


@pytest.mark.parametrize("device, efficiency", [("a100", (0.6, 0.8)), ("h100", (0.5, 0.7)), ("b200", (0.4, 0.6))])
def test_large_products_reach_a_plausible_share_of_the_peak(device, efficiency):
    kind = Cluster.parse(device).devices[0].kind
    shapes = [TensorInfo((8192, 8192), torch.bfloat16)] * 3
    call = LocalCall(aten.mm.default, (Slot(0), Slot(1)), {}, tuple(shapes[:2]), (shapes[2],))
    share = flops(call) / kind.peak_flops(torch.bfloat16) / modelled_seconds(call, kind)[0]
    assert efficiency[0] < share < efficiency[1]


def test_devices_that_are_only_described_are_modelled():
    costs = cost_model(devices="8xh100")
    assert costs.op(linear_call(4096), 3).source == "modelled"
    assert costs.profile_seconds == 0.0
    assert costs.copy(1 << 30, 0) > 2 * (1 << 30) / 3.35e12
    assert costs.optimizer(1 << 30, 0) > costs.copy(1 << 30, 0)
    assert not math.isnan(costs.collective("all_reduce", 1 << 20, (0, 1)))


def test_copies_and_the_optimizer_are_measured_here():
    costs = cost_model()
    assert 0 < costs.copy(1 << 12, 0) < costs.copy(1 << 24, 0)
    each = costs.optimizer(0, 1)
    assert 0 < each < costs.optimizer(1 << 20, 0)
    assert costs.optimizer(1 << 20, 0) - each == pytest.approx(2 * (costs.optimizer(1 << 19, 1) - each))
    assert cost_model(optimizer=None).optimizer(1 << 20, 0) == 0.0


def test_coverage_is_a_share_of_seconds_and_warming_asks_everything_once():
    costs = cost_model(budget_seconds=0.05)
    calls = [linear_call(rows) for rows in (8, 16, 256, 256)]
    seen: list[tuple[int, int]] = []
    costs.warm([*calls, linear_call(1 << 16, 1024, 1024)], 0, lambda *step: seen.append(step))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert costs.op(linear_call(1 << 16, 1024, 1024), 0).source != "measured"  # would take the whole budget
    assert sum(costs.coverage().values()) == pytest.approx(1.0) and costs.coverage()["measured"] < 0.5


def test_keys_tell_calls_apart():
    base = linear_call(8)
    grown = TensorInfo((16, 64), torch.float32, True)
    half = TensorInfo((8, 64), torch.bfloat16, True)
    frozen = TensorInfo((8, 64), torch.float32, False)
    others = [replace(base, inputs=(x, base.inputs[1])) for x in (grown, half, frozen)]
    others += [
        replace(base, target=aten.matmul.default),
        replace(base, args=(Slot(1), Slot(0))),
        replace(base, args=(*base.args, 3)),
        replace(base, args=(*base.args, 3.0)),
        replace(base, kwargs={"a": 1}),
        replace(base, kwargs={"a": 2}),
    ]
    keys = {profile.call_key(call) for call in [base, *others]}
    assert len(keys) == 1 + len(others)
    assert profile.call_key(linear_call(8)) == profile.call_key(base)


def test_the_place_of_a_measurement_is_in_its_key(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = profile.device_key(cpu)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert profile.device_key(cpu) != before and torch.__version__ in before
    with profile.as_a_rank():
        assert torch.get_num_threads() == 2


def test_every_measurement_is_positive_and_finite():
    trace = trace_of("llama")
    for node in ops(trace):
        found = profile.measure(local_call(node, {}, ONE), torch.device("cpu"))
        assert found is not None
        assert 0 < found.forward_seconds < 1 and 0 <= found.backward_seconds < 1
        assert (found.backward_seconds > 0) == any(result.needs_grad for result in infos(node))


def test_prices_are_replayed_to_the_last_digit():
    trace = trace_of("bytegpt")
    recording = RecordingCosts(cost_model())

    def ask(costs):
        calls = [(costs.op(local_call(n, {}, ONE), 1), costs.saves(n)) for n in ops(trace)]
        moves = costs.collective("all_reduce", 12345, (0, 1)), costs.p2p(77, 0, 1), costs.copy(999, 0)
        return calls, moves, costs.optimizer(4096, 1)

    told = ask(recording)
    again = RecordedCosts.parse(recording.text())
    assert ask(again) == told and again.unknown == []
    assert again.text() == recording.text() and again.coverage() == recording.coverage()
    with pytest.raises(KeyError, match="not on record: copy"):
        again.copy(1000, 0)
    helped = RecordedCosts.parse(recording.text(), cost_model(measure=False))
    assert helped.copy(1000, 0) > 0 and helped.unknown == ["copy|1000|0"]
    with pytest.raises(ValueError, match="record"):
        RecordedCosts.parse("{}")


# -- what autograd keeps -----------------------------------------------------------------------------------------------


def kept_by_eager(model: nn.Module, batch: dict, run) -> int:
    """Bytes that autograd keeps of a forward pass, parameters, buffers and the batch left out, every memory once."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), *batch.values()]}
    seen: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = run()
    total = sum(storage.nbytes() for storage in seen.values())
    loss.backward()
    return total


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "resnet"])
def test_kept_bytes_are_those_of_eager_autograd(name):
    from shardplan.planner.search.memory import Keeps

    case = make(name, 0)
    trace = trace_model(case.model, (), case.kwargs, loss_fn=case.loss_fn, target=case.target)
    keeps = Keeps(trace, cost_model(measure=False))
    predicted = 0.0
    for node in ops(trace):
        whole = sum(result.nbytes for result in infos(node))
        predicted += keeps.extra_nbytes(node, whole)
        predicted += sum(r.nbytes for i, r in enumerate(infos(node)) if keeps.is_kept(node, i))

    def run():
        output = case.model(**case.kwargs)
        return case.loss_fn(output, case.target) if case.loss_fn else output.loss

    assert predicted == pytest.approx(kept_by_eager(case.model, case.batch, run), rel=0.1)


F = torch.nn.functional
X, Y, W, B = (3, 8, 6), (3, 8, 6), (10, 6), (10,)
KEEPERS = {
    "linear": (lambda x, w, b: F.linear(x, w, b), [X, W, B]),
    "linear of the input": (lambda x, w: F.linear(x.detach(), w), [X, W]),
    "matmul": (lambda x, y: x @ y.transpose(1, 2), [X, Y]),
    "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [(2, 2, 8, 4)] * 3),
    "attention, masked": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m.detach() > 0.0),
        [(2, 2, 8, 4)] * 3 + [(8, 8)],
    ),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (6,), w, b), [X, (6,), (6,)]),
    "gelu": (F.gelu, [X]),
    "silu": (F.silu, [X]),
    "relu": (torch.relu, [X]),
    "tanh": (torch.tanh, [X]),
    "exp": (torch.exp, [X]),
    "rsqrt": (lambda x: torch.rsqrt(x * x + 1), [X]),
    "pow": (lambda x: x.pow(2), [X]),
    "mul": (lambda x, y: x * y, [X, Y]),
    "mul by itself": (lambda x: x * x, [X]),
    "mul by the batch": (lambda x, y: x * y.detach(), [X, Y]),
    "div": (lambda x, y: x / y, [X, Y]),
    "add": (lambda x, y: x + y, [X, Y]),
    "softmax": (lambda x: torch.softmax(x, -1), [X]),
    "log_softmax": (lambda x: torch.log_softmax(x, -1), [X]),
    "embedding": (lambda w: F.embedding(torch.arange(8) % 10, w), [W]),
    "cross entropy": (lambda x: F.cross_entropy(x, torch.arange(10) % 6), [W]),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b), [(2, 3, 8, 8), (4, 3, 3, 3), (4,)]),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), [(4, 3, 5, 5), (3,), (3,)]),
    "dropout": (lambda x: F.dropout(x, 0.5, True), [X]),
    "views": (lambda x: x.view(24, 6).transpose(0, 1)[:3].unsqueeze(0), [X]),
    "max_pool": (lambda x: F.max_pool2d(x, 2), [(2, 3, 8, 8)]),
    "where": (lambda x, y: torch.where(x.detach() > 0, x, y), [X, Y]),
}


class Lambda(nn.Module):
    """A function of parameters, so that every operand needs a gradient."""

    def __init__(self, function, shapes) -> None:
        super().__init__()
        self.function = function
        self.operands = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(*[operand * 2 for operand in self.operands]).sum() + x.sum()


@pytest.mark.parametrize("name", KEEPERS)
def test_kept_bytes_of_an_op_are_those_of_eager_autograd(name):
    """Every operand is the result of an op, so that whatever is kept of it counts."""
    from shardplan.planner.search.memory import Keeps

    torch.manual_seed(0)
    model, batch = Lambda(*KEEPERS[name]), {"x": torch.ones(2)}
    trace = trace_model(model, (), batch)
    keeps = Keeps(trace, cost_model(measure=False))
    predicted = 0.0
    for node in ops(trace):
        predicted += keeps.extra_nbytes(node, sum(result.nbytes for result in infos(node)))
        predicted += sum(r.nbytes for i, r in enumerate(infos(node)) if keeps.is_kept(node, i))
    real = kept_by_eager(model, batch, lambda: model(**batch))
    assert predicted == pytest.approx(real, abs=16), trace.module.code


def test_layers_of_a_kind_share_what_autograd_keeps():
    trace = trace_of("llama")
    costs = cost_model(measure=False)
    found = [(costs.saves(node), observe(node)) for node in ops(trace)]
    assert all(shared == own for shared, own in found)
    assert len(costs._saves) < len(found)


def test_a_loss_keeps_something_as_large_as_the_logits():
    trace = trace_of("llama")
    node = next(n for n in ops(trace) if n.target is aten.cross_entropy_loss.default)
    found = observe(node)
    assert found.inputs[0] and found.extra_nbytes_per_output_byte <= 4.0


def test_nothing_is_kept_without_gradients():
    trace = trace_of("llama")
    node = next(n for n in ops(trace) if not any(result.needs_grad for result in infos(n)))
    found = observe(node)
    assert not any(found.inputs) and not any(found.outputs)
