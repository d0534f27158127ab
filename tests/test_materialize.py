"""Every rank makes or reads its own part: values under any plan, gradients, weight files in and out, memory, errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import shardplan as sp
from shardplan import errors
from shardplan.planner.export import trace_model
from shardplan.rewrite import compile
from shardplan.runtime.tensor_files import read_header
from shardplan.runtime.weight_files import find
from shardplan.values import stored_of, supply_of, to_write
from tests import models
from tests.plans import random_plan
from tests.ranks import pool

PLANS = [({}, 1), ({"dp": 2}, 2), ({"tp": 2}, 1), ({"pp": 2}, 2)]


@cache
def traced(name):
    """A model without values, a batch, the trace."""
    case = models.make(name)
    model = sp.meta_model(lambda: models.make(name).model)
    return model, case, trace_model(model, (), case.kwargs, loss_fn=case.loss_fn, target=case.target)


def programs_of(trace, degrees, microbatches):
    plan = random_plan(trace, **degrees, microbatches=microbatches, seed=1)
    return {"train": compile(trace, plan)}


def inputs(case, trace):
    return {s.name: case.batch[s.name] for s in trace.sources.values() if s.kind == "input"}


def run(rank, programs, supply, batch, write=None):
    """Runs in every rank. Rank 0 answers with whole tensors, every rank with the shapes it holds."""
    import torch.distributed as dist

    from shardplan.runtime.engine import Engine
    from shardplan.runtime.rank_calls import same_values
    from shardplan.runtime.worker import Session

    supply = same_values(Session(rank, dist.get_world_size(), "cpu"), supply)
    engine = Engine(programs, rank, dist.get_world_size(), "cpu")
    engine.load_parts(supply)
    answer = {"held": {name: tuple(value.shape) for name, value in engine.shards.tensors().items()}}
    answer["state"] = engine.full_state_dict()
    answer["loss"] = engine.step(batch)
    answer["gradients"] = engine.full_gradients()
    if write:
        path, announced, rest, max_nbytes, others = write
        engine.save_weights(path, announced, rest, max_nbytes, others)
    engine.close()
    return answer


def eager(name, state, case):
    model = models.make(name).model
    model.load_state_dict({k: v for k, v in state.items() if k in model.state_dict()})
    output = model(**case.kwargs)
    loss = output.loss if case.loss_fn is None else case.loss_fn(output, case.target)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "t5", "bytegpt"])
def test_values_are_the_same_under_every_plan(name):
    model, case, trace = traced(name)
    states = []
    for degrees, microbatches in PLANS:
        programs = programs_of(trace, degrees, microbatches)
        supply = supply_of(model, None, None, 0, programs, True)
        assert supply.recipes.keys() == dict(model.named_parameters()).keys() and not supply.stored
        answers = pool(programs["train"].world_size).run(run, programs, supply, inputs(case, trace))
        states.append(answers[0]["state"])
        loss, gradients = eager(name, states[-1], case)
        torch.testing.assert_close(answers[0]["loss"], loss, rtol=1e-5, atol=1e-6)
        for parameter, gradient in gradients.items():
            error = (answers[0]["gradients"][parameter] - gradient).norm() / gradient.norm().clamp(min=1e-6)
            assert error < 1e-4, parameter
    for state in states[1:]:
        assert all(torch.equal(state[key], value) for key, value in states[0].items())


def test_weights_are_written_whole_and_read_in_slices(tmp_path):
    from transformers import LlamaForCausalLM

    model, case, trace = traced("llama")
    programs = programs_of(trace, {"tp": 2}, 1)
    supply = supply_of(model, None, None, 0, programs, True)
    config = {"config.json": json.dumps(models.make("llama").model.config.to_dict(), default=str).encode()}
    write = (tmp_path / "ours", to_write(model), supply.only(()), 20_000, config)
    (first, _) = pool(2).run(run, programs, supply, inputs(case, trace), write)
    files = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert len(files) > 3 and "model.safetensors.index.json" in files and not list(tmp_path.glob(".*"))
    assert all(path.stat().st_size < 24_000 for path in (tmp_path / "ours").glob("*.safetensors"))

    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, first["state"][name])
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.25)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    expected = {name: value.clone() for name, value in theirs.state_dict().items()}
    theirs.half().save_pretrained(tmp_path / "half")
    for directory, tolerance in (("theirs", 0.0), ("half", 1e-3)):
        programs = programs_of(trace, {"pp": 2}, 2)
        supply = supply_of(model, tmp_path / directory, None, 0, programs, True)
        assert not supply.recipes and supply.stored.keys() == dict(model.named_parameters()).keys()
        (answer, _) = pool(2).run(run, programs, supply, inputs(case, trace))
        for name, value in expected.items():
            torch.testing.assert_close(answer["state"][name], value, rtol=tolerance, atol=tolerance)


def test_a_rank_reads_only_what_it_holds(tmp_path):
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    from shardplan.runtime.tensor_files import OpenFiles

    taken = []

    class Counting(OpenFiles):
        def take(self, file, name, where=()):
            taken.append((name, where))
            return super().take(file, name, where)

    from shardplan.runtime.progress import Items
    from shardplan.runtime.supply import Supply, Values

    supply = Supply(stored=stored_of(model, tmp_path / "w.safetensors"))
    with Counting() as files:
        values = Values(supply, files, torch.device("cpu"), Items("reading", 1))
        pieces = [[(2, 4), (10, 12)], [(0, 8)]]
        part = values.part("0.weight", (16, 8), pieces, torch.float32)
    assert torch.equal(part, model[0].weight[[2, 3, 10, 11]])
    assert taken == [("0.weight", (slice(2, 4), slice(0, 8))), ("0.weight", (slice(10, 12), slice(0, 8)))]


# -- the whole way -----------------------------------------------------------------------------------------------------


class Tower(nn.Module):
    """A model whose output layer is tied to its input, with a table that only the constructor knows."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.inner = nn.Linear(16, 16)
        self.unused = nn.Parameter(torch.randn(3))
        self.out = nn.Linear(16, 32, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("positions", torch.arange(8.0).sin().unsqueeze(1), persistent=False)

    def forward(self, ids):
        return self.out(torch.tanh(self.inner(self.embed(ids) + self.positions)))


def token_loss(logits, target):
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def test_auto_parallel_runs_a_model_without_values(tmp_path):
    ids = torch.randint(32, (4, 8))
    model = sp.meta_model(Tower)
    arguments = {"example_inputs": (ids, ids), "loss_fn": token_loss, "optimizer": sgd}
    plan = random_plan(trace_model(model, (ids,), loss_fn=token_loss, target=ids), tp=2)
    with sp.auto_parallel(model, ["cpu"] * 2, **arguments, plan=plan) as pm:
        start = pm.full_state_dict()
        pm.save_weights(tmp_path / "weights")
        loss = pm.train_step(ids, target=ids)
        after = pm.full_state_dict()
        with pytest.raises(errors.UsageError, match="not a"):
            pm.save_weights(tmp_path / "again", max_shard="a lot")
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "notes.txt").write_text("mine")
        with pytest.raises(errors.CheckpointError, match="would be lost"):
            pm.save_weights(tmp_path / "taken")
    assert (tmp_path / "taken" / "notes.txt").read_text() == "mine"
    alone = Tower()
    alone.load_state_dict(start)
    expected = token_loss(alone(ids), ids)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    expected.backward()
    for name, parameter in alone.named_parameters():
        moved = start[name] - 0.1 * (parameter.grad if parameter.grad is not None else 0)
        torch.testing.assert_close(after[name], moved, rtol=1e-4, atol=1e-6)
    written = load_file(tmp_path / "weights" / "model.safetensors")
    assert written.keys() == start.keys() - {"out.weight"}
    assert all(torch.equal(value, start[name]) for name, value in written.items())

    real = Tower()  # has values of its own, which give way
    with sp.auto_parallel(real, ["cpu"] * 2, **arguments, plan=plan, weights=tmp_path / "weights") as pm:
        again = pm.full_state_dict()
        assert all(torch.equal(value, start[name]) for name, value in again.items())
        pm.load_state_dict(after)
        assert all(torch.equal(value, after[name]) for name, value in pm.full_state_dict().items())


# -- memory ------------------------------------------------------------------------------------------------------------

MEASURE = """
import re, sys, torch
from torch import nn
import shardplan as sp
from shardplan.planner.placement import Mesh, S, R
from shardplan.rewrite.program import Program, StageRanks, TensorSpec
from shardplan.runtime.parameters import Shards
from shardplan.values import supply_of

def peak_mib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

model = sp.meta_model(lambda: nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(24))))
mesh = Mesh(("mb", "tp"), (1, 4))
specs = tuple(TensorSpec(n, tuple(p.shape), p.dtype, (R, S(0)), True, (), (0,)) for n, p in model.named_parameters())
program = Program("train", (), (StageRanks(mesh, (0, 1, 2, 3)),), (), 1, specs, (), ())
for weights in (None, sys.argv[1]):
    supply = supply_of(model, weights, None, 0, {"train": program}, True)
    shards = Shards(program, 1, torch.device("cpu"))
    torch.zeros(2048, 2048).normal_()
    open("/proc/self/clear_refs", "w").write("5")
    before = peak_mib()
    shards.load(supply)
    print(peak_mib() - before, sum(p.numel() * 4 for p in shards.parameters.values()) >> 20)
    del shards
"""


def test_a_rank_holds_its_shards_and_one_tensor(tmp_path):
    file = tmp_path / "w.safetensors"
    save_file({f"{i}.weight": torch.zeros(2048, 2048) for i in range(24)}, file)
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(file)]
    root = Path(__file__).parent.parent
    # Freed blocks go back to the system at once, so that what is resident is what is alive: whether the allocator can
    # use the holes that it keeps again depends on where it happened to put small blocks.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=root, env=environment)
    (made, own), (read, own_again) = [map(float, line.split()) for line in done.stdout.splitlines()]
    assert own == own_again == 24 * 4
    # All 24 layers are 384 MiB. Pages of a mapped file are the system's, but count while they are mapped.
    assert own < made < own + 2 * 16 + 24
    assert own < read < 2 * own + 2 * 16 + 24


# -- errors ------------------------------------------------------------------------------------------------------------


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.layer = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x):
        return self.layer(x * self.scale + self.table)


def bare_programs(model):
    x = torch.randn(4, 4)
    trace = trace_model(model, (x,), loss_fn=F.mse_loss, target=x)
    return {"train": compile(trace, random_plan(trace))}


def test_what_has_no_values_is_named(tmp_path):
    with torch.device("meta"):
        model = Bare()
    programs = bare_programs(model)
    with pytest.raises(errors.UsageError) as found:
        supply_of(model, None, None, 0, programs, True)
    assert "2 tensors" in found.value.title and found.value.details == ("scale (Bare)", "table (Bare)")
    assert any("meta_model" in hint for hint in found.value.hints)

    def init(module):
        if isinstance(module, Bare):
            nn.init.ones_(module.scale)

    with pytest.raises(errors.UsageError, match=r"table \(Bare\)"):
        supply_of(model, None, init, 0, programs, True)
    save_file(Bare().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(errors.UsageError, match=r"table \(Bare\)"):
        supply_of(model, tmp_path / "w.safetensors", None, 0, programs, True)
    made = sp.meta_model(Bare)
    assert supply_of(made, None, None, 0, programs, True).whole.keys() == {"table"}
    with pytest.raises(errors.UsageError, match="has values"):
        supply_of(Bare(), None, init, 0, programs, True)


def test_weights_of_another_model_are_refused(tmp_path):
    file = tmp_path / "w.safetensors"
    model = Bare()
    state = {name: value.contiguous() for name, value in model.state_dict().items()}

    def problems(tensors):
        save_file(tensors, file)
        with pytest.raises(errors.CheckpointError, match="does not hold the weights") as found:
            stored_of(model, file)
        return found.value.details

    assert problems({"scale": state["scale"]}) == ("missing: layer.weight", "missing: layer.bias")
    assert problems({**state, "more": torch.zeros(1)}) == ("unexpected: more",)
    assert problems({**state, "scale": torch.zeros(5)}) == ("scale: [5], the model has [4]",)
    assert problems({**state, "scale": torch.zeros(4, dtype=torch.int64)}) == ("scale: int64, the model has float32",)
    quantised = torch.zeros(4, dtype=torch.float8_e4m3fn)
    assert problems({**state, "scale": quantised}) == ("scale: float8_e4m3fn, the model has float32",)
    save_file({**state, "table": torch.zeros(4)}, file)
    assert stored_of(model, file).keys() == state.keys(), "a buffer that the model computes is not read"
    save_file({f"model.{name}": value for name, value in state.items()}, file)
    assert stored_of(model, file)["layer.weight"].name == "model.layer.weight"
    save_file(state, file)
    wrapped = nn.ModuleDict({"inner": nn.ModuleDict({"model": model})})
    assert stored_of(wrapped, file)["inner.model.scale"].name == "scale"


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(errors.CheckpointError, match="there is no"):
        find(tmp_path / "nothing")
    with pytest.raises(errors.CheckpointError, match="holds no safetensors"):
        find(tmp_path)
    with pytest.raises(errors.CheckpointError, match="no weight files"):
        find([])
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(64)}, file)
    with pytest.raises(errors.CheckpointError, match="a is in two files"):
        find([file, file])
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(errors.CheckpointError, match="not a whole safetensors file"):
        read_header(file)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(errors.CheckpointError, match="cannot be read"):
        find(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(errors.CheckpointError, match="there is no file"):
        find(tmp_path)
