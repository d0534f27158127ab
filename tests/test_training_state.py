"""Checkpoints between plans, in the background, damaged ones; samplers; schedulers; metrics."""

from __future__ import annotations

import json
import os
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from shardplan import errors
from shardplan.rewrite import compile as compile_program
from shardplan.runtime import checkpoint
from shardplan.runtime.inputs import Inputs, Rows
from tests import jobs

STEPS = 9


def one_device(steps: int) -> list[float]:
    """The job without shardplan, dropout aside: its plan on one device."""
    with jobs.start(jobs.plan()) as pm:
        return jobs.train(pm, steps)


@pytest.fixture(scope="module")
def undisturbed() -> list[float]:
    return one_device(STEPS)


def test_one_device_is_plain_torch(tmp_path):
    """With dropout off, what the job does is the ordinary loop over the same batches; another dataset is refused."""
    model, samples = jobs.model().eval(), jobs.Samples()
    optimizer = jobs.adamw(model.parameters())
    scheduler = jobs.scheduler(optimizer)
    generator = torch.Generator().manual_seed(5 * 1_000_003)
    order = torch.randperm(len(samples), generator=generator)
    with jobs.start(jobs.plan(), weights=None) as pm:
        pm.eval()
        sampler = pm.sampler(samples, seed=5)
        for index, batch in enumerate(sampler):
            chosen = order[index * jobs.BATCH : (index + 1) * jobs.BATCH]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(samples.x[chosen]), samples.y[chosen])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            assert pm.train_step(batch).item() == pytest.approx(loss.item(), rel=1e-5)
        assert index == 4 and (sampler.epoch, sampler.position) == (1, 0)
        pm.train_step(next(iter(sampler)))
        pm.save(tmp_path / "state")
        with pytest.raises(errors.UsageError, match="keep=-1"):
            pm.save(tmp_path / "state", keep=-1)
        pm._samplers.clear()
        assert pm.resume(tmp_path / "state") == 6
        with pytest.raises(errors.CheckpointError, match="total: 40, now 41"):
            pm.sampler(jobs.Samples(41), seed=5)
        assert (pm.sampler(samples, seed=5).position, pm.sampler(samples).position) == (8, 0)


def test_training_goes_on_under_other_plans(tmp_path, undisturbed):
    """One device -> two pipeline stages -> data parallel: the losses are those of an undisturbed run."""
    losses: list[float] = []
    for plan in (jobs.plan(), jobs.plan(pp=2, microbatches=2), jobs.plan(dp=2)):
        with jobs.start(plan) as pm:
            assert pm.resume(tmp_path / "all") == len(losses)
            losses += jobs.train(pm, 3)
            handle = pm.save(tmp_path / "all", keep=2, wait=False, extra={"losses": losses})
            assert handle.wait() == str(tmp_path / "all" / f"step-{len(losses):08d}")
    assert losses == pytest.approx(undisturbed, rel=1e-5)
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == ["step-00000006", "step-00000009"]
    # The last one is damaged in one byte, then all are.
    weights = next((tmp_path / "all" / "step-00000009").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with jobs.start(jobs.plan()) as pm:
        assert pm.load(tmp_path / "all") == {"losses": losses[:6]}
        assert jobs.train(pm, 3) == pytest.approx(undisturbed[6:], rel=1e-5)
        with pytest.raises(errors.CheckpointError, match="does not have its checksum"):
            pm.load(tmp_path / "all" / "step-00000009")
        torn = tmp_path / "all" / "step-00000006" / "index.json"
        torn.write_text(torn.read_text()[:-40])
        with pytest.raises(errors.CheckpointError, match="holds no whole checkpoint"):
            pm.load(tmp_path / "all")
        assert pm.resume(tmp_path / "none") == 0
        # What is written in the background may fail; that is heard at the next call, and training goes on.
        (tmp_path / "file").write_text("")
        pm.save(tmp_path / "file" / "below", wait=False)
        jobs.train(pm, 1)
        with pytest.raises(errors.CheckpointError, match="cannot write"):
            pm.save(tmp_path / "good")
        pm.save(tmp_path / "good")
        with pytest.raises(errors.CheckpointError, match="JSON"):
            pm.save(tmp_path / "good", extra={1: 2})


def test_a_truncated_file_is_named(tmp_path):
    index = {"rank-00000.safetensors": {"nbytes": 4, "crc32": 0}}
    (tmp_path / "rank-00000.safetensors").write_bytes(b"abc")
    checkpoint.write_index(tmp_path, {}, [], index)
    with pytest.raises(errors.CheckpointError, match=r"rank-00000\.safetensors is torn: 3 bytes of 4"):
        checkpoint.check(tmp_path)
    (tmp_path / "rank-00000.safetensors").write_bytes(b"abcd")
    with pytest.raises(errors.CheckpointError, match="damaged"):
        checkpoint.check(tmp_path)
    (tmp_path / "rank-00000.safetensors").unlink()
    with pytest.raises(errors.CheckpointError, match="cannot be read"):
        checkpoint.check(tmp_path)


def test_a_checkpoint_between_two_renames_is_found(tmp_path):
    for step in (1, 2):
        where = checkpoint.of_step(tmp_path, step)
        where.mkdir()
        checkpoint.write_index(where, {"step": step}, [], {})
    last = checkpoint.of_step(tmp_path, 2)
    last.rename(last.with_name(f".{last.name}.previous"))
    (tmp_path / ".step-00000003.saving").mkdir()
    assert checkpoint.in_directory(tmp_path) == [last, checkpoint.of_step(tmp_path, 1)]
    assert checkpoint.read_index(last)["facts"] == {"step": 2}


def loaded(session):
    """How many samples this rank has asked for, of those that it was sent without (sample 0 shows their shapes)."""
    return len(session.values["loaders"][0]._source.dataset.loaded)


loaded.__module__ = "__main__"


def test_a_pipeline_tells_its_steps_and_loads_where_inputs_are_read(tmp_path):
    """Of three stages the one in the middle reads no input."""
    told = []
    with jobs.start(jobs.plan(pp=3, microbatches=2)) as pm:
        pm.metrics(told.append, jsonl=tmp_path / "log.jsonl", traces=tmp_path / "traces", every=2)
        losses = jobs.train(pm, 3, pm.sampler(jobs.Samples(24), seed=5))
        assert pm._ranks().workers.call(loaded) == [25, 1, 25]
    assert [found.loss for found in told] == losses
    assert [found.detail is not None for found in told] == [True, False, True]
    detail = told[0].detail
    # Which tensor is cut follows from the plan; that all its rows go forward and back, in fp32, does not.
    assert detail.message_nbytes % (2 * jobs.BATCH * 4) == 0 and detail.message_nbytes > 0
    assert {"forward", "backward", "optimizer"} <= detail.phases.keys()
    assert 0 <= detail.bubble < 1 and len(detail.memory_nbytes) == 3 and min(detail.memory_nbytes) > 1 << 20
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2] and [line["loss"] for line in lines] == losses
    assert "bubble" in lines[2] and "bubble" not in lines[1]
    traces = sorted(os.listdir(tmp_path / "traces"))
    assert traces == ["step-00000000.trace.json", "step-00000002.trace.json"]
    events = json.loads((tmp_path / "traces" / traces[0]).read_text())["traceEvents"]
    assert {event["name"] for event in events if event.get("cat") == "forward"} >= {"0F0", "0F1", "1F0", "1F1", "2F1"}


def test_replicas_load_their_rows_and_the_rest_of_an_epoch_is_a_smaller_batch():
    with jobs.start(jobs.plan(dp=2), seed=0) as pm:
        sampler = pm.sampler(jobs.Samples(11), drop_last=False, shuffle=False)
        assert len(sampler) == 2
        batches = iter(sampler)
        assert next(batches).count == 8
        pm.step(pm_batch := next(iter(sampler)))
        assert pm._ranks().workers.call(loaded) == [5, 5] and pm_batch.start == 0
        assert next(iter(sampler)).count == 3 and sampler.position == 8
        pm.step(next(iter(sampler)))
        assert (sampler.epoch, sampler.position) == (1, 0)
        with pytest.raises(errors.UsageError, match="len"):
            pm.sampler(iter([]))


def test_own_rows_are_cut_as_whole_inputs_are():
    """What a rank reads of its rows is what it reads of the whole batch, and other rows are refused."""
    samples = jobs.Samples()
    whole = {"input": samples.x[: jobs.BATCH], "target": samples.y[: jobs.BATCH]}
    for plan in (jobs.plan(dp=2, microbatches=2), jobs.plan(dp=2), jobs.plan(tp=2, microbatches=4)):
        program = compile_program(jobs.trace(), plan, "train")
        names = {spec.name for spec in program.inputs}
        batch = dict(zip(sorted(names), (whole["input"], whole["target"]), strict=True))
        for rank in range(2):
            placement = program.placement[0]
            make = partial(Inputs, program, placement, placement.coordinate(rank), torch.device("cpu"), names)
            one, other = make(), make()
            one.start(batch)
            runs = {name: tuple(found) for name, found in other.rows.items()}
            parts = {n: Rows(torch.cat([batch[n][a:b] for a, b in runs[n]]), runs[n], jobs.BATCH) for n in names}
            other.start(parts)
            for name in names:
                for microbatch in range(plan.microbatches):
                    assert torch.equal(one.part(name, microbatch), other.part(name, microbatch))
    with pytest.raises(errors.InputMismatch, match="rows 2 to 6 are needed"):
        Rows(torch.zeros(4, 2), ((0, 4),), 8).take(2, 6)
