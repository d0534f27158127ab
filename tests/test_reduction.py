"""Gradient buckets on gloo ranks: what is summed, when it starts, where gradients lie, and that it is exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardplan.planner import schedules
from shardplan.planner.placement import D, Mesh, R, S
from shardplan.rewrite.program import Argument, Program, Result, StageCode, StageRanks, TensorSpec
from tests.ranks import pool

F32 = torch.float32
WIDTH = 4
NAMES = ("a", "b", "unused", "c", "big", "d")


def chain(microbatches, bucket_nbytes=300, read="unused.detach()", dtype=F32):
    """Linear layers a, b, c, d with the batch split over dp and microbatches; "unused" is read as `read` says."""
    mesh = Mesh(("mb", "dp", "tp"), (microbatches, 2, 1))
    sizes = {name: (WIDTH, 64) if name == "big" else (WIDTH, WIDTH) for name in NAMES}
    source = (
        "import torch\ndef stage(comm, device, x, a, b, unused, c, big, d):\n    L = torch.ops.aten.linear.default\n"
        f"    h = L(torch.tanh(L(x, a)), b) + L(x, {read})\n"
        "    return ((L(torch.tanh(L(h, c)) @ big @ big.t(), d)).square().sum(),)\n"
    )
    code = StageCode(
        source,
        (Argument("input", "x", (2, WIDTH), F32), *(Argument("param", n, sizes[n], F32) for n in NAMES)),
        (Result("loss", "loss", (), F32, True, layout=(R, R, R)),),
    )
    layout = (R, D, R)
    return Program(
        "train",
        (code,),
        (StageRanks(mesh, (0, 1)),),
        schedules.build("1f1b", 1, microbatches, set()),
        microbatches,
        tuple(TensorSpec(n, sizes[n], dtype, layout, True, ("dp",), (0,)) for n in NAMES),
        (),
        (TensorSpec("x", (4 * microbatches, WIDTH), F32, (S(0), S(0), R), stages=(0,)),),
        loss_stage=0,
        bucket_nbytes=bucket_nbytes,
    )


def weights():
    torch.manual_seed(0)
    return {n: torch.randn(WIDTH, 64 if n == "big" else WIDTH) / 8 for n in NAMES}


def expected(state, x, read=False):
    leaves = {n: w.clone().requires_grad_() for n, w in state.items()}
    lin = torch.nn.functional.linear
    unused = leaves["unused"] if read else leaves["unused"].detach()
    h = lin(torch.tanh(lin(x, leaves["a"])), leaves["b"]) + lin(x, unused)
    lin(torch.tanh(lin(h, leaves["c"])) @ leaves["big"] @ leaves["big"].t(), leaves["d"]).square().sum().backward()
    return {n: leaf.grad for n, leaf in leaves.items()}


def engine_of(rank, programs, state):
    from shardplan.runtime.engine import Engine

    engine = Engine(programs, rank, 2, "cpu")
    engine.load_full(state)
    return engine


def buckets_of(sums):
    return [bucket for stage in sums._stages.values() for bucket in stage.buckets]


def watched(sums, seen):
    """Note which buckets are under way when the backward is done."""
    finish = sums.finish

    def noting():
        seen.append([bucket.launched for bucket in buckets_of(sums)])
        finish()

    sums.finish = noting


def steps(rank, programs, state, batches, zero):
    engine = engine_of(rank, programs, state)
    seen, found, places = [], [], []
    for key in programs:
        watched(engine.executor(key).sums, seen)
    for key, batch in batches:
        if zero == "none":
            engine.zero_grad()
        elif zero == "fill":
            for _, parameter in engine.named_parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
        engine.step({"x": batch}, key)
        found.append({n: None if p.grad is None else p.grad.clone() for n, p in engine.named_parameters()})
        places.append({n: p.grad.data_ptr() for n, p in engine.named_parameters() if p.grad is not None})
    leaves = [[len(b.leaves) for b in buckets_of(engine.executor(key).sums)] for key in programs]
    engine.close()
    return found, seen, places, leaves


def assert_grads(found, wanted):
    for name, gradient in wanted.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("zero", ["none", "fill"])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_buckets_start_in_backward_and_gradients_keep_their_places(microbatches, zero):
    program, state = chain(microbatches), weights()
    batches = [("train", torch.randn(4 * microbatches, WIDTH)) for _ in range(3)]
    for found, seen, places, leaves in pool(2).run(steps, {"train": program}, state, batches, zero):
        assert leaves == [[1, 4, 1]]  # big alone; d, c, unused, b; a
        for (_, x), grads in zip(batches, found, strict=True):
            assert_grads(grads, expected(state, x))
        # In the first step the bucket that waits for "unused" is started late; after that all but it are on their way.
        assert not all(seen[0]) and all(seen[1]) and all(seen[2])
        assert all(places[1][name] == places[2][name] for name in ("d", "c", "b"))


def test_gradients_add_up_over_steps_and_programs():
    """Two programs that share their parameters; one of them gives a gradient where the other gives none."""
    state = weights()
    programs = {"train": chain(2), "other": chain(1, bucket_nbytes=1 << 20, read="unused")}
    batches = [("train", torch.randn(8, WIDTH)), ("other", torch.randn(4, WIDTH)), ("train", torch.randn(8, WIDTH))]
    for found, *_ in pool(2).run(steps, programs, state, batches, "keep"):
        wanted: dict[str, torch.Tensor | None] = dict.fromkeys(NAMES)
        for (key, x), grads in zip(batches, found, strict=True):
            for name, gradient in expected(state, x, read=key == "other").items():
                before = wanted[name]
                wanted[name] = gradient if before is None else before if gradient is None else before + gradient
            assert_grads(grads, wanted)


def test_a_gradient_that_comes_only_in_a_later_step_is_summed():
    """A parameter that had none before, so that its bucket is not held up for it, and then has one."""
    state = weights()
    read = "(unused if x.sum() > 0 else unused.detach())"
    x = torch.ones(4, WIDTH) + torch.randn(4, WIDTH) / 9
    batches = [("train", sign * x) for sign in (-1, -1, 1, 1, -1)]
    for found, *_ in pool(2).run(steps, {"train": chain(1, read=read)}, state, batches, "none"):
        for (_, batch), grads in zip(batches, found, strict=True):
            assert_grads(grads, expected(state, batch, read=bool(batch.sum() > 0)))


def test_parameters_of_leaves_are_summed_at_the_end():
    state, x = weights(), torch.randn(8, WIDTH)
    program = replace(chain(2), late=frozenset({"a", "c"}))
    for found, _, _, leaves in pool(2).run(steps, {"train": program}, state, [("train", x)] * 2, "none"):
        assert sum(leaves[0]) == len(NAMES) - 2
        for grads in found:
            assert_grads(grads, expected(state, x))


def test_sums_sent_in_bf16_are_rounded():
    state, x = weights(), torch.randn(8, WIDTH)
    program = replace(chain(2), reduction="bf16")
    for found, *_ in pool(2).run(steps, {"train": program}, state, [("train", x)] * 2, "none"):
        for grads in found:
            for name, gradient in expected(state, x).items():
                if gradient is not None:
                    torch.testing.assert_close(grads[name], gradient, rtol=2e-2, atol=2e-2)
                    assert grads[name].dtype == torch.float32
                    assert torch.equal(grads[name], grads[name].bfloat16().float())


def test_packing():
    from shardplan.runtime.reduction import packed

    def sizes(found):
        return [(group, [len(t) for t in leaves]) for group, leaves in found]

    tensors = [torch.zeros(n, dtype=torch.float64 if n == 3 else F32) for n in (10, 3, 4, 4, 60, 1)]
    assert sizes(packed([("g", tensors)], 72 * 4)) == [("g", [3]), ("g", [60]), ("g", [10, 4, 4, 1])]
    assert sizes(packed([("g", tensors)], 72 * 4, 14 * 4)) == [("g", [3]), ("g", [10, 4]), ("g", [60]), ("g", [4, 1])]
    # Buckets of two groups are started in the order in which they are complete.
    mixed = [("g", tensors[:1]), ("h", tensors[2:3]), ("g", tensors[3:4])]
    assert sizes(packed(mixed, 1 << 20)) == [("h", [4]), ("g", [10, 4])]


# -- in the cost model -------------------------------------------------------------------------------------------------


def test_buckets_are_spread_over_backward():
    from shardplan.planner.reductions import spread

    # The last segment has half of the bytes and a quarter of the backward.
    segments = [(3.0, 1.0, 100.0), (1.0, 1.0, 100.0)]
    assert spread(segments, 100) == ((0.25, 1.0), (1.0, 1.0))
    assert spread(segments, 50) == ((0.125, 0.5), (0.25, 0.5), (0.625, 0.5), (1.0, 0.5))
    assert spread(segments, 1000) == ((1.0, 2.0),)
    assert spread([(1.0, 0.0, 0.0)], 10) == ()
    fine = spread([(1.0, 3.0, 1e6)] * 7, 1)
    assert len(fine) == 64 and sum(seconds for _, seconds in fine) == pytest.approx(21.0)


@given(st.floats(1e-6, 1e-3), st.floats(1e8, 1e11), st.floats(1e5, 1e10), st.floats(1e-4, 1.0))
def test_the_bucket_size_is_worth_it(latency, bandwidth, nbytes, backward):
    from shardplan.planner.plan import BUCKET_NBYTES
    from shardplan.planner.reductions import bucket_nbytes, spread
    from shardplan.planner.simulate import StageTimes

    def end(size):
        count = min(max(round(nbytes / size), 1), 64)
        whole = count * (latency + nbytes / count / bandwidth)
        return StageTimes(1.0, backward, reductions=spread([(backward, whole, nbytes)], size)).summed(0.0, backward)[1]

    found = bucket_nbytes([(nbytes, backward)], lambda size: latency + size / bandwidth)
    if nbytes / found < 64 and nbytes / BUCKET_NBYTES < 64:  # more are taken together
        assert end(found) <= end(BUCKET_NBYTES) * (1 + 1e-9)
    assert found == BUCKET_NBYTES or end(found) < end(BUCKET_NBYTES) or nbytes / min(found, BUCKET_NBYTES) >= 64
