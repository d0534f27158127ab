"""Parts of the rank engine one by one: collectives, messages, gradient sums, state, errors."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardplan.errors import InputMismatch, NotSupported, UsageError
from shardplan.planner import schedules
from shardplan.planner.instructions import Op
from shardplan.planner.placement import Mesh, R, S, local_slices
from shardplan.planner.receipts import receipts
from shardplan.planner.transfers import overlaps
from shardplan.rewrite.parts import runs
from shardplan.rewrite.program import Argument, Program, Result, StageCode, StageRanks, TensorSpec
from tests.ranks import RankError, pool

F32 = torch.float32
HIDDEN = 4


def two_stages(microbatches=4, second="return (torch.ops.aten.linear.default(h, w).square().sum(),)", tied=False):
    """x -> relu(x w0) on rank 0 -> loss on rank 1, with the batch split over microbatches."""
    mesh = Mesh(("dp", "mb", "tp"), (1, microbatches, 1))
    batch = 2
    layout, whole = (R, S(0), R), (batch * microbatches, HIDDEN)
    names = ("w", "w") if tied else ("w0", "w1")
    first = StageCode(
        "import torch\ndef stage(comm, device, x, w):\n    return (torch.relu(torch.ops.aten.linear.default(x, w)),)\n",
        (Argument("input", "x", (batch, HIDDEN), F32), Argument("param", names[0], (HIDDEN, HIDDEN), F32)),
        (Result("send", "h", (batch, HIDDEN), F32, True, (1,), layout=layout, global_shape=whole),),
    )
    last = StageCode(
        f"import torch\ndef stage(comm, device, h, w):\n    {second}\n",
        (
            Argument("recv", "h", (batch, HIDDEN), F32, True, 0, layout),
            Argument("param", names[1], (HIDDEN, HIDDEN), F32),
        ),
        (Result("loss", "loss", (), F32, True, layout=(R, R, R)),),
    )
    held = {name: tuple(s for s in (0, 1) if names[s] == name) for name in names}
    return Program(
        "train",
        (first, last),
        (StageRanks(mesh, (0,)), StageRanks(mesh, (1,))),
        schedules.build("1f1b", 2, microbatches, {(0, 1)}),
        microbatches,
        tuple(TensorSpec(n, (HIDDEN, HIDDEN), F32, (R, R, R), True, (), stages) for n, stages in held.items()),
        (),
        (TensorSpec("x", (batch * microbatches, HIDDEN), F32, (R, S(0), R), stages=(0,)),),
        loss_stage=1,
    )


def two_ranks(layout, stage="return (torch.ops.aten.linear.default(x, w).square().sum() / 2,)", extra=()):
    """One stage on two ranks of tp; w lies in `layout`."""
    mesh = Mesh(("dp", "mb", "tp"), (1, 1, 2))
    code = StageCode(
        f"import torch\ndef stage(comm, device, x, w):\n    {stage}\n",
        (Argument("input", "x", (2, HIDDEN), F32), Argument("param", "w", (HIDDEN, HIDDEN), F32)),
        (Result("loss", "loss", (), F32, True, layout=(R, R, R)),),
    )
    return Program(
        "train",
        (code,),
        (StageRanks(mesh, (0, 1)),),
        schedules.build("1f1b", 1, 1, set()),
        1,
        (TensorSpec("w", (12, HIDDEN), F32, (R, R, layout), True, (), (0,)),),
        (),
        (TensorSpec("x", (2, HIDDEN), F32, (R, R, R), stages=(0,)),),
        loss_stage=0,
    )


def weights(*names, rows=HIDDEN):
    torch.manual_seed(0)
    return {name: torch.randn(rows, HIDDEN) for name in names}


def engine_of(rank, program, state, factory=None, separate=None):
    from shardplan.runtime.engine import Engine
    from shardplan.runtime.groups import Groups

    engine = Engine({"train": program}, rank, 2, "cpu", factory)
    if separate is not None:
        engine.groups = Groups(separate)
    engine.load_full(state)
    return engine


# -- collectives -------------------------------------------------------------------------------------------------------


def collectives(rank, ranks):
    """Every primitive on every axis, of values that name their rank: (name, axis, result)."""
    from shardplan.runtime.comm import DistComm
    from shardplan.runtime.groups import Groups

    placement = StageRanks(Mesh(("dp", "mb", "tp"), (2, 3, 2)), ranks)
    groups = Groups()
    for axis in ("dp", "tp"):
        groups.of_stage(placement, (axis,))
    comm = DistComm(placement, rank, groups)
    x = (torch.arange(24.0).reshape(4, 6) + 100 * rank).t().contiguous().t()  # not contiguous
    found = {"coordinate": placement.coordinate(rank)}
    for axis, dtype in product(("dp", "tp"), (torch.float32, torch.bfloat16, torch.int64)):
        y = x.to(dtype)
        for dim in (0, 1):
            found["all_gather", axis, dtype, dim] = comm.all_gather(y, dim, axis)
            found["reduce_scatter", axis, dtype, dim] = comm.reduce_scatter(y, dim, axis)
            found["all_to_all", axis, dtype, dim] = comm.all_to_all(y, dim, 1 - dim, axis)
        found["sum", axis, dtype] = comm.all_reduce(y, axis)
        found["max", axis, dtype] = comm.all_reduce(y, axis, "max")
        assert torch.equal(y, x.to(dtype))
    found["scalar"] = comm.all_gather(torch.tensor(float(rank)), 0, "tp")
    found["none"] = comm.all_reduce(x, "mb") is x
    groups.close()
    return found


@pytest.mark.parametrize("ranks", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_collectives_in_mesh_order(ranks):
    answers = pool(4).run(collectives, ranks)
    placement = StageRanks(Mesh(("dp", "mb", "tp"), (2, 3, 2)), ranks)
    for rank, found in enumerate(answers):
        for axis, dtype in product(("dp", "tp"), (torch.float32, torch.bfloat16, torch.int64)):
            group = placement.group(rank, (axis,))
            place = group.index(rank)
            values = [(torch.arange(24.0).reshape(4, 6) + 100 * r).to(dtype) for r in group]
            total = sum(v.double() for v in values).to(dtype)
            for dim in (0, 1):
                assert torch.equal(found["all_gather", axis, dtype, dim], torch.cat(values, dim))
                assert torch.equal(found["reduce_scatter", axis, dtype, dim], total.chunk(2, dim)[place])
                swapped = torch.cat([v.chunk(2, dim)[place] for v in values], 1 - dim)
                assert torch.equal(found["all_to_all", axis, dtype, dim], swapped)
            assert torch.equal(found["sum", axis, dtype], total)
            assert torch.equal(found["max", axis, dtype], torch.stack(values).amax(0))
        assert found["scalar"].tolist() == [float(r) for r in placement.group(rank, ("tp",))]
        assert found["none"]


def keys(rank):
    from shardplan.runtime.comm import DistComm
    from shardplan.runtime.groups import Groups

    placement = StageRanks(Mesh(("dp", "mb", "tp"), (2, 2, 2)), (0, 1, 2, 3))
    groups = Groups()
    for axis in ("dp", "tp"):
        groups.of_stage(placement, (axis,))
    comm = DistComm(placement, rank, groups, seed=7)
    found = {}
    for step, microbatch, site in product(range(2), range(2), range(2)):
        comm.step, comm.microbatch = step, microbatch
        found[step, microbatch, site] = comm.key(site)
    groups.close()
    return found


def test_ranks_and_microbatches_draw_by_one_key_that_steps_and_ops_change():
    answers = pool(4).run(keys)
    assert all(answer == answers[0] for answer in answers)
    assert all(answers[0][step, 0, site] == answers[0][step, 1, site] for step, site in product(range(2), range(2)))
    assert len(set(answers[0].values())) == 4


# -- messages ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["gpipe", "1f1b", "zb", "interleaved", "zbv"]),
    stages=st.integers(1, 6),
    microbatches=st.integers(1, 7),
    skips=st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5))),
)
def test_receipts_are_proofs(kind, stages, microbatches, skips):
    edges = {(a, a + 1) for a in range(stages - 1)} | {(a, b) for a, b in skips if a < b < stages}
    chunks = 2 if kind in schedules.CHUNKED and stages % 2 == 0 and stages > 2 else 1
    if kind == "zbv" and chunks == 1:
        kind = "zb"
    schedule = schedules.build(kind, stages, microbatches, edges, chunks=chunks)
    home = {i.stage: position for position, line in enumerate(schedule) for i in line}
    after = {}  # instruction -> those that directly follow it in time
    for line in schedule:
        for one, two in pairwise(line):
            after.setdefault(one, []).append(two)
    consumer = {}
    for line in schedule:
        for sent in line:
            if sent.is_send:
                ops = (Op.FORWARD,) if sent.op is Op.SEND_ACT else (Op.BACKWARD, Op.BACKWARD_INPUT)
                there = [
                    i for i in schedule[home[sent.peer]] if (i.stage, i.microbatch) == (sent.peer, sent.microbatch)
                ]
                consumer[sent] = next(i for i in there if i.op in ops)
                after.setdefault(sent, []).append(consumer[sent])
    for position, line in enumerate(schedule):
        found = receipts(schedule, position, lambda _: True)
        released = [n for sends in found.values() for n in sends]
        assert len(released) == len(set(released))
        for index, sends in found.items():
            for sent in sends:
                reached, open_ = set(), [consumer[line[sent]]]
                while open_:
                    here = open_.pop()
                    if here not in reached:
                        reached.add(here)
                        open_ += after.get(here, ())
                assert sent < index and line[index] in reached
        kept = {n for n, i in enumerate(line) if i.op is Op.SEND_ACT and home[i.peer] != position} - set(released)
        assert not kept, "every activation is answered by a gradient"


def watched(rank, program, state, batch, separate):
    """-> loss, gradients, and the most microbatches and unconfirmed sends that were held at once."""
    engine = engine_of(rank, program, state, separate=separate)
    executor = engine.executor("train")
    most = {"flights": 0, "sending": 0}

    def watch(handler):
        def run(index, instruction):
            handler(index, instruction)
            most["flights"] = max(most["flights"], len(executor.runs[0]._flights))
            most["sending"] = max(most["sending"], len(executor.runs[0].shared.sending))

        return run

    executor._handlers = [watch(handler) for handler in executor._handlers]
    loss = engine.step(batch)
    gradients = engine.full_gradients()
    engine.close()
    return loss, gradients, most


@pytest.mark.parametrize("separate", [False, True])
def test_pipeline_holds_few_microbatches(separate):
    microbatches = 8
    program, state = two_stages(microbatches), weights("w0", "w1")
    x = torch.randn(2 * microbatches, HIDDEN)
    answers = pool(2).run(watched, program, state, {"x": x}, separate)
    leaves = {name: w.clone().requires_grad_() for name, w in state.items()}
    loss = (torch.relu(x @ leaves["w0"].t()) @ leaves["w1"].t()).square().sum()
    loss.backward()
    for rank, (mine, gradients, most) in enumerate(answers):
        torch.testing.assert_close(mine, loss.detach())
        assert most["flights"] <= 2 - rank + 1 and most["sending"] <= 3, most
        for name in gradients:
            torch.testing.assert_close(gradients[name], leaves[name].grad)
    assert set(answers[0][1]) == {"w0", "w1"}


def step(rank, program, state, batch, factory=None):
    engine = engine_of(rank, program, state, factory)
    try:
        loss = engine.train_step(batch) if factory else engine.step(batch)
        return loss, engine.full_gradients(), engine.full_state_dict()
    finally:
        engine.close()


def test_failure_names_the_place():
    program = two_stages(second='if comm.microbatch == 2: raise ValueError("boom")\n    return (h.sum() * w.sum(),)')
    with pytest.raises(RankError) as caught:
        pool(2).run(step, program, weights("w0", "w1"), {"x": torch.randn(8, HIDDEN)})
    text = caught.value.failures[1]
    assert 'raise ValueError("boom")' in text and "<shardplan train stage1>" in text
    assert "on rank 1 (stage 1; dp 0, tp 0) at instruction" in text and "[1F2]" in text


def mismatch(rank, program, state):
    engine = engine_of(rank, program, state)
    found = []
    for batch in ({}, {"x": torch.zeros(6, HIDDEN)}, {"x": torch.zeros(8, HIDDEN, dtype=torch.float64)}):
        try:
            engine.executor("train").runs[0].inputs.start(batch) if rank == 0 else found.append("")
        except InputMismatch as error:
            found.append(str(error))
    engine.close()
    return found


def test_wrong_batch():
    found = pool(2).run(mismatch, two_stages(), weights("w0", "w1"))[0]
    assert "x is missing" in found[0] and "[6, 4]" in found[1] and "float64" in found[2]


# -- gradients ---------------------------------------------------------------------------------------------------------


def decay(parameters):
    return torch.optim.SGD(parameters, lr=0.5, weight_decay=0.5)


def test_tied_parameter_without_a_gradient_in_one_stage():
    program = two_stages(second="return ((h @ w.detach().t()).square().sum(),)", tied=True)
    state, x = weights("w"), torch.randn(8, HIDDEN)
    answers = pool(2).run(step, program, state, {"x": x}, decay)
    leaf = state["w"].clone().requires_grad_()
    (torch.relu(x @ leaf.t()) @ leaf.detach().t()).square().sum().backward()
    torch.testing.assert_close(answers[0][1]["w"], leaf.grad)
    decay([leaf]).step()
    torch.testing.assert_close(answers[0][2]["w"], leaf.detach())


def test_parameter_without_a_gradient_is_left_alone():
    program = two_ranks(R, stage="return ((x * w.detach().sum()).sum() * torch.ones((), requires_grad=True),)")
    state = weights("w", rows=12)
    answers = pool(2).run(step, program, state, {"x": torch.randn(2, HIDDEN)}, decay)
    assert answers[0][1] == {}
    assert torch.equal(answers[0][2]["w"], state["w"])


def test_optimizers_that_need_whole_tensors():
    from shardplan.runtime import optim

    parameters = [torch.nn.Parameter(torch.zeros(4, 4))]
    for factory in (torch.optim.Adafactor, torch.optim.Muon):
        assert optim.make(factory, parameters, sharded=False)
        with pytest.raises(NotSupported, match="whole matrices"):
            optim.make(factory, parameters, sharded=True)
    with pytest.raises(NotSupported, match="LBFGS"):
        optim.make(torch.optim.LBFGS, parameters, sharded=False)
    with pytest.warns(UserWarning, match="Own steps on parts"):
        optim.make(type("Own", (torch.optim.SGD,), {"__module__": "own"}), parameters, sharded=True)
    assert optim.make(torch.optim.SGD, [], sharded=True) is None


def test_meta_parameters_are_refused():
    from shardplan.runtime.parameters import Shards
    from shardplan.runtime.supply import Supply

    program = two_stages()
    whole = {spec.name: torch.empty(HIDDEN, HIDDEN, device="meta") for spec in program.parameters}
    with pytest.raises(UsageError, match="meta device"):
        Shards(program, 0, torch.device("cpu")).load(Supply(whole))


# -- state -------------------------------------------------------------------------------------------------------------

SECTIONS = S(0, (4, 6, 2))


@st.composite
def layouts(draw):
    size = draw(st.sampled_from([1, 2]))
    mesh = Mesh(("dp", "tp"), (draw(st.sampled_from([1, 2])), size))
    options = [R, S(0), S(1), SECTIONS]
    return mesh, (draw(st.sampled_from([R, S(1)])), draw(st.sampled_from(options)))


@settings(max_examples=60, deadline=None)
@given(layouts(), layouts(), st.integers(0, 3), st.integers(0, 3))
def test_overlaps_move_what_two_layouts_share(mine, theirs, a, b):
    whole = torch.arange(12 * 8).reshape(12, 8)
    parts, pieces = [], []
    for (mesh, layout), index in ((mine, a), (theirs, b)):
        slices = local_slices((12, 8), layout, mesh, {"dp": index // 2 % mesh.sizes[0], "tp": index % mesh.sizes[1]})
        part = torch.full([sum(stop - start for start, stop in dim) for dim in slices], -1)
        for there, here in runs(slices):
            part[here] = whole[there]
        parts.append(part)
        pieces.append(slices)
    into = torch.full_like(parts[0], -1)
    for here, there in overlaps(pieces[0], pieces[1]):
        into[here] = parts[1][there]
    shared = torch.isin(parts[0], parts[1])
    assert torch.equal(into, torch.where(shared, parts[0], -1))


def numbered(parameters):
    """An optimizer whose state has a Python number, a bool tensor and a tensor like the parameter."""
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    optimizer.register_step_post_hook(
        lambda o, *_: [o.state[p].update(seen=3, flag=torch.tensor(True)) for g in o.param_groups for p in g["params"]]
    )
    return optimizer


def saving(rank, program, state, batch, path):
    engine = engine_of(rank, program, state, numbered)
    engine.train_step(batch)
    engine.optimizer.param_groups[0]["lr"] = 0.25
    engine.save(path, {"epoch": 3})
    answer = engine.full_state_dict(), engine.optimizer.state[engine.shards.parameters["w"]]["momentum_buffer"]
    engine.close()
    return answer


def loading(rank, program, state, path):
    from shardplan.errors import CheckpointError

    engine = engine_of(rank, program, state, numbered)
    try:
        facts = engine.load(path)
    except CheckpointError as error:
        engine.close()
        return str(error)
    kept = engine.optimizer.state[engine.shards.parameters["w"]]
    answer = engine.full_state_dict(), kept, engine.optimizer.param_groups[0]["lr"], facts, engine.steps
    engine.close()
    return answer


def test_checkpoint_of_sections_loads_as_plain_shards(tmp_path):
    state, zeros = weights("w", rows=12), {"w": torch.zeros(12, HIDDEN)}
    path = str(tmp_path / "saved")
    answers = pool(2).run(saving, two_ranks(SECTIONS), state, {"x": torch.randn(2, HIDDEN)}, path)
    loaded = pool(2).run(loading, two_ranks(S(0)), zeros, path)
    assert torch.equal(loaded[0][0]["w"], answers[0][0]["w"])
    momentum = torch.zeros(12, HIDDEN)
    for rank in range(2):
        mesh = Mesh(("tp",), (2,))
        for there, here in runs(local_slices((12, HIDDEN), (SECTIONS,), mesh, {"tp": rank})):
            momentum[there] = answers[rank][1][here]
    for rank, (_, kept, rate, facts, steps) in enumerate(loaded):
        assert torch.equal(kept["momentum_buffer"], momentum.chunk(2)[rank])
        assert kept["seen"] == 3 and kept["flag"].dtype == torch.bool
        assert (rate, facts, steps) == (0.25, (1, {"epoch": 3}), 1)
    (tmp_path / "saved" / "rank-00001.safetensors").write_bytes(b"torn")
    for text in pool(2).run(loading, two_ranks(SECTIONS), zeros, path):  # only rank 1 needs that file
        assert "is damaged" in text and "rank 1" in text and "torn" in text


def as_dtensors(rank, program, state, path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import DTensor

    engine = engine_of(rank, program, state)
    held = engine.state_dict()["w"]
    assert isinstance(held, DTensor)
    placements, whole = held.placements, held.full_tensor()
    dcp.save({"w": held}, checkpoint_id=path, no_dist=False)
    engine.load_full({"w": torch.zeros_like(whole)})
    again = engine.state_dict()
    dcp.load(again, checkpoint_id=path)
    engine.load_state_dict(again)
    answer = str(placements), whole, engine.full_state_dict()
    engine.close()
    return answer


@pytest.mark.parametrize(("layout", "placements"), [(S(0), "Shard"), (R, "Replicate"), (SECTIONS, "Replicate")])
def test_state_dict_in_distributed_tensors(tmp_path, layout, placements):
    state = weights("w", rows=12)
    answers = pool(2).run(as_dtensors, two_ranks(layout), state, str(tmp_path / "dcp"))
    for text, whole, _ in answers:
        assert placements in text and torch.equal(whole, state["w"])
    assert torch.equal(answers[0][2]["w"], state["w"])


def measured(rank, program, state, batch):
    engine = engine_of(rank, program, state)
    engine.step(batch)
    before = {name: p.grad.clone() for name, p in engine.named_parameters()}
    found = engine.measure(batch, 3)
    after = {name: p.grad for name, p in engine.named_parameters()}
    assert all(torch.equal(before[name], after[name]) for name in before) and before
    engine.close()
    return found


def test_measure():
    found = pool(2).run(measured, two_stages(), weights("w0", "w1"), {"x": torch.randn(8, HIDDEN)})[0]
    assert found["step_seconds"] > 0 and len(found["stages"]) == 2 and len(found["peak_nbytes"]) == 2
    for stage, track in zip(found["stages"], found["timeline"].tracks, strict=True):
        phases = stage.phases
        assert 0 < phases["forward"] < 1 and 0 < phases["backward"] < 1 and phases["wait"] >= 0
        assert all(
            one.end_seconds <= two.start_seconds for one, two in zip(track.events, track.events[1:], strict=False)
        )
        assert sum(event.category == "forward" for event in track.events) == 4
